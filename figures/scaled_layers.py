"""Draws what scaling layers apart does to SGD and Adam, and the gap against four readings.

`python figures/scaled_layers.py [RESULT] [PICTURE]` reads results only.
"""

import math
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation

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
# reading -> label, and whether its axis is logarithmic
READINGS = {
    "scale": ("spread of block scales [decades]", False),
    "curvature": ("curvature distance [decades]", False),
    "unnormalised": ("JS0, as in the literature", True),
    "block rates / one rate": ("predicted progress of block rates over one rate", True),
}
DARK = "#666666"


def of_pattern(positions: dict[str, Any], pattern: str) -> dict[int, Any]:
    """What was found by decades, the network as it is at 0."""
    found = {0: positions[START]}
    for name, position in positions.items():
        if name.startswith(f"{pattern} "):
            found[int(name.split()[1])] = position
    return found


def accuracies(panel: Axes, found: dict[int, Any]) -> None:
    decades = list(found)
    for optimizer, (_, colour) in OPTIMIZERS.items():
        intervals = [found[d]["accuracy"][optimizer] for d in decades]
        means, lows, highs = (
            [100 * value for value in values] for values in zip(*intervals, strict=True)
        )
        panel.fill_between(decades, lows, highs, color=colour, alpha=0.15, lw=0)
        panel.plot(decades, means, color=colour, marker="o", markersize=3.5, linewidth=1.3)
    panel.set_xlabel("decades between largest and smallest c²", fontsize=8)


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
    label, is_logarithmic = READINGS[reading]
    if is_logarithmic:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.1, 0.4)))
        panel.tick_params(which="minor", labelsize=7)
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
        accuracies(panel, of_pattern(positions, pattern))
        panel.set_title(label, fontsize=10)
    for panel, reading in zip(panels[1], READINGS, strict=True):
        against(panel, positions, reading)
        mean, low, high = result["correlations"][reading]
        panel.set_title(f"rank correlation {mean:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
        panel.axhline(0, color="#bbbbbb", linewidth=0.7, zorder=0)
    for panel in panels.flat:
        panel.tick_params(labelsize=8, labelleft=True)
    panels[0, 0].set_ylabel("validation accuracy [%]\n(band: 95 % over seeds)", fontsize=8.5)
    panels[1, 0].set_ylabel("gap: (L_sgd - L_adam) / (L_0 - L_adam)", fontsize=8.5)
    legend(figure)
    title = "An MLP whose layers are scaled apart, the same function at the start"
    figure.suptitle(title, fontsize=12)
    figure.savefig(target, dpi=120, metadata={"Title": title})


if __name__ == "__main__":
    main(*sys.argv[1:])
