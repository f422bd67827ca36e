"""Figures of quadratic problems: spectra by block, loss curves with the theorems' bounds."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessian_tools.plots.spectra import written
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import Constants
from hessian_tools.tables import shortened


class Style(NamedTuple):
    """How a method is drawn."""

    label: str
    colour: str
    dash: str
    shaded: bool = False  # whether its quartiles are


# Okabe & Ito's colours, which are distinct in every kind of colour vision; dashes distinguish the
# methods that share one
STYLES = {
    "gd": Style("GD", "#1f4e79", "-", shaded=True),
    "heavy_ball": Style("heavy ball", "#56b4e9", "-"),
    "nesterov": Style("Nesterov", "#56b4e9", "--"),
    "blockwise_gd": Style("blockwise GD", "#009e73", "-", shaded=True),
    "jacobi": Style("Jacobi", "#009e73", ":"),
    "adam_frozen": Style("Adam, β₂ = 1", "#d55e00", "-", shaded=True),
    "adam_mini_frozen": Style("Adam-mini, β₂ = 1", "#cc79a7", "-", shaded=True),
    "adam": Style("Adam (0.9, 0.999)", "#d55e00", "--"),
    "adagrad": Style("AdaGrad", "#e69f00", "-"),
    "sign": Style("sign descent", "#777777", "-"),
}
_FIRST_STEP = 0.7  # where a log axis of steps shows step 0


def draw(
    folder: Path,
    problem: Quadratic,
    runs: Mapping[str, Runs],
    constants: Constants,
    title: str,
    kind: str = "png",
) -> Path:
    """Writes quadratic.png (pdf, svg): the blocks' spectra and the loss curves of all methods."""
    figure = Figure((12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    block_eigenvalues(left, problem)
    loss_curves(right, runs, constants)
    figure.suptitle(title, fontsize=10)
    return written(figure, folder / f"quadratic.{kind}")


def block_eigenvalues(axes: Axes, problem: Quadratic, *, most: int = 24) -> None:
    """A row a block, its eigenvalues over a log axis, with the block's kappa."""
    names = problem.block_names
    shown = min(most, len(names))
    labels = shortened(names) if shown > 1 else list(names)
    beside = axes.get_yaxis_transform()
    for row, values in enumerate(list(problem.by_block().values())[:shown]):
        axes.hlines(row, values[0], values[-1], color="#cccccc", linewidth=1)
        axes.plot(values, np.full(len(values), row), "|", color="#1f4e79", markersize=9)
        kappa = f"κ = {short(values[-1] / values[0])}"
        axes.text(1.02, row, kappa, transform=beside, fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_yticks(range(shown), labels[:shown], fontsize=7)
    axes.set_ylim(shown - 0.5, -0.5)
    axes.set_xlabel("eigenvalue", fontsize=9)
    more = f" (first {most} of {len(names)})" if most < len(names) else ""
    axes.set_title(f"eigenvalues by block{more}; κ = {short(float(problem.kappa[0]))}", fontsize=9)


def loss_curves(
    axes: Axes,
    runs: Mapping[str, Runs],
    constants: Constants | None = None,
    *,
    lowest: float = 1e-12,
) -> None:
    """Median over starts of f / f(w_0) against steps, both logarithmic.

    Quartiles are shaded for some methods. With ``constants`` the theorems' bounds are drawn too.
    """
    for name, some in runs.items():
        _loss_curve(axes, some, STYLES[name], below=lowest / 1e3)
    last = max((some.num_steps for some in runs.values()), default=1)
    if constants is not None:
        _bounds(axes, constants, last)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(lowest, 30)
    axes.set_xlim(_FIRST_STEP, last)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("f / f(w₀), median over starts (band: quartiles)", fontsize=9)
    axes.grid(linewidth=0.3, alpha=0.7)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _loss_curve(axes: Axes, runs: Runs, style: Style, below: float) -> None:
    """One method's curve; ``below`` is out of sight, where vanished losses are drawn."""
    losses = np.nan_to_num(runs.losses, nan=0.0)
    quartiles = np.quantile(losses, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
    kept = np.isfinite(quartiles[1])
    steps = np.maximum(runs.recorded, _FIRST_STEP)[kept]
    low, middle, high = quartiles[:, kept]
    axes.plot(
        steps,
        np.maximum(middle, below),
        style.dash,
        color=style.colour,
        linewidth=1.6,
        label=style.label,
    )
    if style.shaded:
        axes.fill_between(
            steps,
            np.clip(low, below, 1e3),
            np.clip(high, below, 1e3),
            color=style.colour,
            alpha=0.13,
            linewidth=0,
        )


def _bounds(axes: Axes, constants: Constants, last: int) -> None:
    """GD's worst start at the best step, and Adam's upper bound from the median start."""
    steps = np.geomspace(_FIRST_STEP, last, 300)
    axes.plot(
        steps,
        constants.gd_lower[0] ** steps,  # (1 - 2 / (kappa + 1))^(2t)
        color=STYLES["gd"].colour,
        linewidth=1,
        dashes=(1, 1.5),
        label="GD's worst start, any step (Thm 3.2)",
    )
    axes.plot(
        steps,
        np.median(constants.adam_upper[0]) ** steps,  # max_l (1 - 1 / (r kappa_l))^t
        color=STYLES["adam_frozen"].colour,
        linewidth=1,
        dashes=(1, 1.5),
        label="Adam's upper bound (median start)",
    )


def short(value: float) -> str:
    """A condition number in three digits, or whole."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
