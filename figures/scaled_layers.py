"""Draws what scaling layers apart does to SGD and Adam, and the gap against four readings.

`python figures/scaled_layers.py [RESULT] [PICTURE]` reads results only.
"""

import math
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import hessian_tools as ht

START = "c = 1"
PATTERNS = {
    "ramp": "ramp over layers",
    "head": "head only",
    "first": "first layer only",
    "alternating": "alternating layers",
}
COLOURS = {
    "ramp": "#1f5fa8",
    "head": "#d55e00",
    "first": "#2a9d5c",
    "alternating": "#9b59b6",
}
OTHERS = {"mixer": ("MLP-Mixer", "*"), "cnn": ("CNN", "^")}
OPTIMIZERS = {"sgd": ("SGD with momentum", "#c0392b"), "adam": ("Adam", "#222222")}
# reading -> label, scale of its axis, and whether that spans a decade or two
READINGS = {
    "scale": ("spread of block scales [decades]", "linear", False),
    "curvature": ("curvature distance [decades]", "linear", False),
    "unnormalised": ("JS0, as in the literature", "log", False),
    "block rates / one rate": ("predicted progress of block rates over one rate", "log", True),
}
DARK = "#666666"


def of_pattern(positions: dict[str, Any], pattern: str) -> dict[int, Any]:
    """What was found by decades, the network as it is at 0."""
    found = {0: positions[START]}
    for name, position in positions.items():
        if name.startswith(f"{pattern} "):
            found[int(name.split()[1])] = position
    return found


def validation_errors(panel: Axes, found: dict[int, Any]) -> None:
    """Every seed as a dot, the line through their means."""
    for optimizer, (_, colour) in OPTIMIZERS.items():
        wrong = {
            decades: 100 * (1 - position["runs"][optimizer]["right"].mean(axis=1))
            for decades, position in found.items()
        }
        for decades, by_seed in wrong.items():
            places = [decades] * len(by_seed)
            panel.plot(places, by_seed, ".", color=colour, markersize=4, alpha=0.5)
        means = [by_seed.mean() for by_seed in wrong.values()]
        panel.plot(list(wrong), means, color=colour, linewidth=1.4)
    panel.set_yscale("log")
    few_ticks(panel.yaxis)
    panel.set_xlabel("decades between largest and smallest c²", fontsize=8)


def few_ticks(axis: Axis) -> None:
    """A logarithmic axis over a decade or two, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def against(panel: Axes, positions: dict[str, Any], reading: str) -> None:
    """Every position, the pattern in colour, and the other two networks."""
    for pattern, colour in COLOURS.items():
        found = of_pattern(positions, pattern).values()
        values = [position["predictors"][reading] for position in found]
        gaps = [position["gap"][0] for position in found]
        panel.plot(values, gaps, color=colour, marker="o", markersize=3.5, linewidth=0.8)
    for name, (_, marker) in OTHERS.items():
        value, gap = positions[name]["predictors"][reading], positions[name]["gap"][0]
        if math.isfinite(value):
            panel.plot(value, gap, color=DARK, marker=marker, markersize=9, linestyle="none")
    label, scale, has_few_ticks = READINGS[reading]
    panel.set_xscale(scale)
    if has_few_ticks:
        few_ticks(panel.xaxis)
    panel.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    panel.set_xlabel(label, fontsize=8)


def legend(figure: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=4, label=label)
        for label, colour in OPTIMIZERS.values()
    ]
    handles += [
        Line2D([], [], color=colour, marker="o", markersize=4, label=PATTERNS[pattern])
        for pattern, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color=DARK, marker=marker, markersize=8, linestyle="none", label=label)
        for label, marker in OTHERS.values()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5
    )


def main(
    source: str = "results/scaled_layers/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    result = ht.load(source)
    positions = result["positions"]
    figure = Figure((15, 7.4), layout="constrained")
    panels = figure.subplots(2, 4, sharey="row")
    for panel, (pattern, label) in zip(panels[0], PATTERNS.items(), strict=True):
        validation_errors(panel, of_pattern(positions, pattern))
        panel.set_title(label, fontsize=10)
    for panel, reading in zip(panels[1], READINGS, strict=True):
        against(panel, positions, reading)
        mean, low, high = result["correlations"][reading]
        panel.set_title(f"rank correlation {mean:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
        panel.axhline(0, color="#bbbbbb", linewidth=0.7, zorder=0)
    for panel in panels.flat:
        panel.tick_params(labelsize=8, labelleft=True)
    panels[0, 0].set_ylabel("validation error [%]\n(dots: seeds)", fontsize=8.5)
    panels[1, 0].set_ylabel(
        "gap: (L_sgd - L_adam) / (L_0 - L_adam)\n(linear below 0.01)", fontsize=8.5
    )
    legend(figure)
    title = "An MLP whose layers are scaled apart, the same function at the start"
    figure.suptitle(title, fontsize=12)
    figure.savefig(target, dpi=120, metadata={"Title": title})


if __name__ == "__main__":
    main(*sys.argv[1:])
