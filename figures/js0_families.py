"""Draws every reading at initialisation, CNNs against Transformers.

A panel a reading, a bar a network.

`python figures/js0_families.py [RESULT] [PICTURE]` reads results only.
"""

import math
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

import hessian_tools as ht
from hessian_tools.problem import zoo

COLOURS = {"CNN": "#2a7f62", "MLP": "#8a8a8a", "Mixer": "#d08c2e", "Transformer": "#1f4e79"}
TITLES = {
    "scale": "spread of block scales",
    "curvature": "curvature",
    "log": "JS on a log axis",
    "wasserstein": "Wasserstein on a log axis",
    "unnormalised": "literature's JS0, with its floor",
}


def main(
    source: str = "results/js0_families/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found: dict[str, ht.heterogeneity.JSHeterogeneity] = ht.load(source)
    names = list(found)
    figure, axes = plt.subplots(
        1, len(TITLES), figsize=(13, 0.34 * len(names) + 1.6), sharey=True, layout="constrained"
    )
    for panel, (key, title) in zip(axes, TITLES.items(), strict=True):
        readings = [js.every_reading[key] for js in found.values()]
        for row, (name, reading) in enumerate(zip(names, readings, strict=True)):
            _drawn(panel, row, reading, COLOURS[zoo.SPECS[name].family])
        panel.set_yticks(range(len(names)), names)
        if key == "unnormalised":
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_xlim(0, None)
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(readings[0].unit, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, ncols=4, loc="outside lower center", fontsize=8, frameon=False)
    figure.suptitle(
        "Heterogeneity of block spectra at initialisation (with 95 % intervals; hollow: not "
        "resolved at 4 probes of 40 steps)",
        fontsize=10,
    )
    figure.savefig(target, dpi=150)


def _drawn(panel, row, reading, colour):
    """A point with its interval; hollow where there is none, a bar from the floor for JS0."""
    if reading.floor > 0:
        panel.plot([reading.floor, reading.mean], [row, row], color=colour, linewidth=1.2)
        panel.plot(reading.floor, row, "|", color=colour, markersize=8)
    is_resolved = not math.isnan(reading.low)
    if is_resolved:
        ends = [[reading.mean - reading.low], [reading.high - reading.mean]]
        panel.errorbar(reading.mean, row, xerr=ends, color=colour, elinewidth=1.2, capsize=2)
    face = colour if is_resolved or reading.floor > 0 else "white"
    panel.plot(reading.mean, row, "o", color=colour, markerfacecolor=face, markersize=6)


if __name__ == "__main__":
    main(*sys.argv[1:])
