"""Draws what a tolerance costs, and how far from the official setting it ends.

`python figures/tolerance.py [RESULT] [PICTURE]` reads results only.

A row a network, a column a reading, a point a run: its share of the official products and its
deviation from the reference. The shaded corner is the claim: within 5 % for at most a third.
Crosses did not meet their tolerance, and say so; grey points are the official setting's own runs.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht

TITLES = {
    "scale": "spread of block scales",
    "unnormalised": "literature's JS0",
    "log": "JS on a log axis",
    "wasserstein": "Wasserstein",
}


def main(
    source: str = "results/tolerance/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    shape = (len(found), len(TITLES))
    figure, axes = plt.subplots(
        *shape, figsize=(11, 2.1 * shape[0] + 1), squeeze=False, layout="constrained"
    )
    for index, (row, (model, readings)) in enumerate(zip(axes, found.items(), strict=True)):
        for panel, (reading, title) in zip(row, TITLES.items(), strict=True):
            r = readings[reading]
            panel.fill_between([0, 100 / 3], -5, 5, color="#2a7f62", alpha=0.15, linewidth=0)
            panel.axhline(0, color="black", linewidth=0.6)
            official = [100 * (value / r["reference"] - 1) for value in r["official"]]
            panel.plot(
                [100] * len(official), official, "o", color="#8a8a8a", markersize=5, clip_on=False
            )
            for estimate, share, met in zip(r["estimates"], r["share"], r["met"], strict=True):
                deviation = 100 * (estimate / r["reference"] - 1)
                panel.plot(
                    100 * share,
                    deviation,
                    "o" if met else "x",
                    color="#1f4e79" if met else "#b03a2e",
                )
            reach = max(
                8.0, *(abs(line) for curve in panel.lines[1:] for line in curve.get_ydata())
            )
            panel.set_xlim(0, 104)
            panel.set_ylim(-1.15 * reach, 1.15 * reach)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            if index == 0:
                panel.set_title(title, fontsize=10)
            if index == len(axes) - 1:
                panel.set_xlabel("products, % of the official setting", fontsize=8)
        row[0].set_ylabel(f"{model}\ndeviation [%]", fontsize=9)
    style = {"linestyle": "", "marker": "o", "color": "#1f4e79"}
    handles = [
        plt.Line2D([], [], label="tolerance 5 %, met", **style),
        plt.Line2D(
            [], [], label="not met, and told", **{**style, "marker": "x", "color": "#b03a2e"}
        ),
        plt.Line2D(
            [],
            [],
            label="official: 10 probes of 100 steps, not corrected",
            **{**style, "color": "#8a8a8a"},
        ),
        plt.Rectangle(
            (0, 0), 1, 1, color="#2a7f62", alpha=0.15, label="within 5 % for at most a third"
        ),
    ]
    figure.legend(handles=handles, ncols=4, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
