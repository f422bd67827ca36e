"""Draws what predicts the gap of SGD to Adam: all correlations, and the three best as points.

`python figures/evidence_verdict.py [RESULT] [PICTURE]` reads results only.
"""

import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hessian_tools as ht

LABELS = {
    "js0": "JS0, as in the literature",
    "log": "log distance",
    "wasserstein": "Wasserstein distance",
    "scale": "spread of scales",
    "curvature": "curvature distance",
    "block_progress": "progress of block rates",
    "adam_progress": "progress of Adam's diagonal",
    "gradient_range": "range of gradient norms",
    "gradient_gini": "gradient heterogeneity",
    "top_spread": "spread of top eigenvalues",
    "num_blocks": "number of blocks",
    "num_parameters": "number of parameters",
    "is_transformer": "is a Transformer",
    "is_text": "is text",
    "gradient_norm": "norm of the gradient",
}
KINDS = {
    "Transformers": "#d55e00",
    "other text": "#1f5fa8",
    "images and others": "#2a9d5c",
}
LOGARITHMIC = ("js0",)  # stored as log10(1 + value)


def kind_of(pair: dict[str, Any]) -> str:
    if pair["is_transformer"]:
        return "Transformers"
    return "other text" if pair["is_text"] else "images and others"


def correlations(panel: Axes, table: dict[str, Any]) -> None:
    """A line an interval; predictors above, baselines below, the best first."""
    groups = (table["predictors"], table["baselines"])
    place = 0
    ticks, names = [], []
    for group, colour in zip(groups, ("#222222", "#888888"), strict=True):
        for name in sorted(group, key=lambda name: -(group[name]["correlation"] or -1)):
            found = group[name]
            ticks.append(place)
            names.append(LABELS.get(name, name))
            if found["low"] is not None:
                panel.plot([found["low"], found["high"]], [place, place], color=colour)
                panel.plot([found["correlation"]], [place], "o", color=colour, markersize=4)
            place -= 1
        place -= 0.7
    panel.set_yticks(ticks, names, fontsize=8)
    panel.axvline(0, color="#bbbbbb", linewidth=0.8)
    for side in (-1, 1):
        panel.axvline(side * table["chance"], color="#c0392b", linewidth=0.8, linestyle="--")
    panel.set_xlim(-1, 1)
    panel.set_xlabel(
        "Spearman's correlation with g1, 95 % interval over families\n"
        "(dashed: what the best of the predictors reaches by chance)",
        fontsize=8,
    )


def scatter(panel: Axes, points: dict[str, Any], target: str, name: str) -> None:
    for kind, colour in KINDS.items():
        chosen = [pair for pair in points.values() if kind_of(pair) == kind]
        x = np.array([pair[name] for pair in chosen], dtype=float)
        y = np.array([pair[target] for pair in chosen], dtype=float)
        panel.plot(x, y, "o", color=colour, markersize=4, alpha=0.8, label=kind)
    panel.axhspan(-0.02, 0.02, color="#eeeeee", zorder=0)
    inside = f"log10(1 + {name})" if name in LOGARITHMIC else LABELS.get(name, name)
    panel.set_xlabel(inside, fontsize=8)


def draw(result: dict[str, Any]) -> Figure:
    table = result["open"][0]
    target = table["target"]
    found = table["predictors"]
    best = sorted(found, key=lambda name: -(found[name]["correlation"] or -1))[:2]
    shown = ["js0", *(name for name in best if name != "js0")]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(len(shown), 2, width_ratios=(1.5, 1))
    left = figure.add_subplot(grid[:, 0])
    correlations(left, table)
    left.set_title(f"{target}: {table['pairs']} pairs, {table['families']} families", fontsize=9)
    for row, name in enumerate(shown):
        panel = figure.add_subplot(grid[row, 1])
        scatter(panel, result["points"], target, name)
        panel.set_ylabel("g1: SGD loses", fontsize=8)
        panel.tick_params(labelsize=7)
        if not row:
            panel.legend(fontsize=7)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    result: str = "results/evidence_verdict/result",
    target: str = "figures/evidence_verdict.png",
) -> None:
    draw(ht.load(result)).savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
