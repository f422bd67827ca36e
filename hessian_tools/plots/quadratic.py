"""Figures of quadratic problems: spectra by block, loss curves with the theorems' bounds, iterations of methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessian_tools.plots.spectra import shortened, written
from hessian_tools.quadratic import Constants, Quadratic, Runs
from hessian_tools.quadratic.lineup import Standing

# Okabe & Ito's colours, told apart in every kind of colour vision; dashes tell apart what shares one
STYLES = {
    "gd": ("GD", "#1f4e79", "-"), "heavy_ball": ("heavy ball", "#56b4e9", "-"),
    "nesterov": ("Nesterov", "#56b4e9", "--"), "blockwise_gd": ("blockwise GD", "#009e73", "-"),
    "jacobi": ("Jacobi", "#009e73", ":"),
    "adam_frozen": ("Adam, β₂ = 1", "#d55e00", "-"), "adam_mini_frozen": ("Adam-mini, β₂ = 1", "#cc79a7", "-"),
    "adam": ("Adam (0.9, 0.999)", "#d55e00", "--"), "adagrad": ("AdaGrad", "#e69f00", "-"),
    "sign": ("sign descent", "#777777", "-"),
}  # fmt: skip
_BAND = (
    "gd",
    "adam_frozen",
    "adam_mini_frozen",
    "blockwise_gd",
)  # methods whose quartiles are shaded


def draw(
    folder: Path, problem: Quadratic, runs: Mapping[str, Runs], found: Constants, title: str
) -> Path:
    """Writes quadratic.png: the spectra of the blocks and the loss curves of all methods."""
    figure = Figure((12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    block_eigenvalues(left, problem)
    loss_curves(right, runs, found)
    figure.suptitle(title, fontsize=10)
    return written(figure, folder / "quadratic.png")


def block_eigenvalues(axes: Axes, problem: Quadratic, *, most: int = 24) -> None:
    """A row a block, its eigenvalues over a log axis, with the block's kappa."""
    shown = range(min(most, len(problem.block_names)))
    labels = shortened(problem.block_names) if len(shown) > 1 else list(problem.block_names)
    for row in shown:
        values = problem.eigenvalues[row][0].cpu().numpy()
        axes.hlines(row, values[0], values[-1], color="#cccccc", linewidth=1)
        axes.plot(values, np.full(len(values), row), "|", color="#1f4e79", markersize=9)
        axes.text(
            1.02,
            row,
            f"κ = {short(values[-1] / values[0])}",
            transform=axes.get_yaxis_transform(),
            fontsize=7,
            va="center",
        )
    axes.set_xscale("log")
    axes.set_yticks(list(shown), [labels[row] for row in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("eigenvalue", fontsize=9)
    more = (
        f" (first {most} of {len(problem.block_names)})" if most < len(problem.block_names) else ""
    )
    axes.set_title(f"eigenvalues by block{more}; κ = {short(float(problem.kappa[0]))}", fontsize=9)


def loss_curves(
    axes: Axes, runs: Mapping[str, Runs], found: Constants | None = None, *, lowest: float = 1e-12
) -> None:
    """Median over starts of f / f(w_0) against steps, both logarithmic; quartiles shaded for some methods.

    With ``found`` also the bounds: GD's worst start at the best step, (1 - 2/(kappa + 1))^(2t), and Adam's median upper
    bound, max_l (1 - 1/(r kappa_l))^t.
    """
    last = 1
    for name, of in runs.items():
        label, colour, dash = STYLES[name]
        low, middle, high = np.quantile(
            np.nan_to_num(of.losses, nan=0.0), (0.25, 0.5, 0.75), axis=0, method="inverted_cdf"
        )
        steps = np.maximum(of.recorded, 0.7)
        kept = np.isfinite(middle)
        below = lowest / 1e3  # out of sight, where a curve comes back from too
        axes.plot(
            steps[kept],
            np.maximum(middle[kept], below),
            dash,
            color=colour,
            linewidth=1.6,
            label=label,
        )
        if name in _BAND:
            ends = np.clip(low[kept], below, 1e3), np.clip(high[kept], below, 1e3)
            axes.fill_between(steps[kept], *ends, color=colour, alpha=0.13, linewidth=0)
        last = max(last, of.num_steps)
    if found is not None:
        steps = np.geomspace(0.7, last, 300)
        axes.plot(steps, found.gd_lower[0] ** steps, color="#1f4e79", linewidth=1, dashes=(1, 1.5),
                  label="GD's worst start, any step (Thm 3.2)")  # fmt: skip
        axes.plot(steps, np.median(found.adam_upper[0]) ** steps, color="#d55e00", linewidth=1, dashes=(1, 1.5),
                  label="Adam's upper bound (median start)")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(lowest, 30)
    axes.set_xlim(0.7, last)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("f / f(w₀), median over starts (band: quartiles)", fontsize=9)
    axes.grid(linewidth=0.3, alpha=0.7)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def iteration_bars(axes: Axes, places: Sequence[Standing], num_steps: int) -> None:
    """Quartiles of iterations to the tolerance, a row a method, fastest on top; an arrow where more are needed."""
    for row, place in enumerate(places):
        colour = STYLES[place.name][1]
        low, middle, high = (min(max(q, 1.0), 2 * num_steps) for q in place.quartiles)
        axes.plot(
            [low, high], [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt"
        )
        beyond = place.quartiles[1] > num_steps
        axes.plot(middle, row, ">" if beyond else "o", color=colour, markersize=6)
        text = f"> {num_steps:,}" if beyond else f"{middle:,.0f}"
        axes.annotate(
            text, (high, row), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center"
        )
    axes.set_xscale("log")
    axes.set_xlim(1, 12 * num_steps)
    axes.set_yticks(range(len(places)), [STYLES[place.name][0] for place in places], fontsize=8)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3, alpha=0.7)


def short(value: float) -> str:
    """A condition number in three digits, or whole."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"
