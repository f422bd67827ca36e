"""Draws what a tolerance costs, and how far from a reference it ends.

`python figures/tolerance.py [RESULT] [PICTURE]` reads results only.

A row a network, a column a reading, a point a run: its share of the reference's products and its
deviation. The shaded band is the tolerance. Crosses did not meet it, and say so.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht

TITLES = {
    "scale": "spread of block scales",
    "curvature": "curvature",
    "log": "JS on a log axis",
    "wasserstein": "Wasserstein on a log axis",
}
MET, NOT_MET = "#1f4e79", "#b03a2e"


def main(
    source: str = "results/tolerance/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    shape = (len(found), len(TITLES))
    size = (11, 2.1 * shape[0] + 1)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for index, (row, (model, readings)) in enumerate(zip(axes, found.items(), strict=True)):
        for panel, (reading, title) in zip(row, TITLES.items(), strict=True):
            drawn(panel, readings[reading])
            if index == 0:
                panel.set_title(title, fontsize=10)
            if index == len(axes) - 1:
                panel.set_xlabel("products, % of the reference's", fontsize=8)
        row[0].set_ylabel(f"{model}\ndeviation [%]", fontsize=9)
    handles = [
        plt.Line2D([], [], linestyle="", marker="o", color=MET, label="tolerance 5 %, met"),
        plt.Line2D([], [], linestyle="", marker="x", color=NOT_MET, label="not met, and told"),
    ]
    figure.legend(handles=handles, ncols=2, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(target, dpi=150)


def drawn(panel, readings) -> None:
    panel.axhspan(-5, 5, color="#2a7f62", alpha=0.15, linewidth=0)
    panel.axhline(0, color="black", linewidth=0.6)
    runs = zip(readings["deviations"], readings["share"], readings["met"], strict=True)
    for deviation, share, met in runs:
        marker, colour = ("o", MET) if met else ("x", NOT_MET)
        panel.plot(100 * share, 100 * deviation, marker, color=colour)
    reach = max(8.0, *(100 * abs(deviation) for deviation in readings["deviations"]))
    panel.set_ylim(-1.15 * reach, 1.15 * reach)
    panel.set_xlim(0, 108 * max(readings["share"]))
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
