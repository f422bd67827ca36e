"""Draws eight dense Hessians at three times, and shares against chance.

`python figures/transformer_structure.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

import hessian_tools as ht

DECADES = 4  # of a heat map's colours
WORDS = {"heads": "heads", "rows": "output neurons"}
TOKENS = ("embedding", "output layer")
OTHER = {"color": "#555555", "markersize": 5}  # cuts that are not claimed
MARKS = {"rows": "s", "columns": "D", "heads": "^"}
COLOURS = {
    "follows": "#1f7a4d",
    "too coarse": "#b8860b",
    "too fine": "#7b3fa0",
    "wrong axis": "#d55e00",
    "undecided": "#7f7f7f",
}


def heat(axes, colours: np.ndarray, blocks: int):
    image = axes.imshow(
        colours.astype(float), cmap="magma", vmin=-DECADES, vmax=0, interpolation="nearest"
    )
    for edge in np.arange(1, blocks) * len(colours) / blocks:
        for line in (axes.axhline, axes.axvline):
            line(edge - 0.5, color="white", linewidth=0.6 if blocks < 20 else 0.25, alpha=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def evidence(axes, tensors: dict, claims: dict) -> None:
    """A row a tensor: the excess of each cut's share over chance, the claimed one ringed."""
    for row, (name, found) in enumerate(tensors.items()):
        colour = COLOURS[found["verdict"]]
        axes.axhspan(row - 0.5, row + 0.5, color=colour, alpha=0.12, linewidth=0)
        for cut, values in found["cuts"].items():
            claimed = cut == claims[name]
            style = (
                {"color": colour, "markersize": 8, "markeredgecolor": "black"} if claimed else OTHER
            )
            axes.plot(values["excess"], row, MARKS[cut], zorder=3, **style)
        axes.text(1.05, row, found["verdict"], color=colour, fontsize=8, va="center")
    axes.set_ylim(len(tensors) - 0.5, -0.5)
    axes.set_xlim(-0.15, 1.4)
    axes.set_xticks((0, 0.5, 1))
    axes.tick_params(labelsize=8)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_xlabel("excess of mass inside blocks", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def main(
    source: str = "results/transformer_structure/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    found = ht.load(source)
    times, claims = found["times"], found["claims"]
    figure = plt.figure(figsize=(17.5, 2.75 * len(times) + 0.8), layout="constrained")
    grid = figure.subplots(len(times), 9, width_ratios=[1] * 8 + [1.9], squeeze=False)
    for row, (when, at) in enumerate(times.items()):
        for column, (name, tensor) in enumerate(at["tensors"].items()):
            panel, claim = grid[row, column], tensor["cuts"][claims[name]]
            image = heat(panel, tensor["heat map"], claim["blocks"])
            panel.set_xlabel(
                f"{claim['share']:.1%} inside\n(by chance {claim['chance']:.1%})", fontsize=8.5
            )
            if row == 0:
                word = "tokens" if name in TOKENS else WORDS[claims[name]]
                panel.set_title(f"{name}\n{claim['blocks']} {word}", fontsize=9.5)
        grid[row, 0].set_ylabel(f"{when}\nloss {at['loss']:.2f}", fontsize=9.5)
        evidence(grid[row, -1], at["tensors"], claims)
        grid[row, -1].set_yticks(range(len(at["tensors"])), list(at["tensors"]))
    handles = [
        Line2D([], [], marker=mark, color="#555555", linestyle="none", label=cut)
        for cut, mark in MARKS.items()
    ]
    handles.append(
        Line2D(
            [],
            [],
            marker="o",
            color="#bbbbbb",
            markeredgecolor="black",
            linestyle="none",
            markersize=8,
            label="claimed",
        )
    )
    grid[0, -1].legend(
        handles=handles,
        ncols=2,
        fontsize=7.5,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        title="0 by chance, 1 block-diagonal; text: verdict",
        title_fontsize=8,
    )
    bar = figure.colorbar(
        image, ax=grid[:, :-1], location="bottom", fraction=0.03, pad=0.01, aspect=70
    )
    bar.set_label(
        r"$\log_{10}|H_{ij}|$, largest of each picture = 0; lines: the claimed blocks", fontsize=9
    )
    figure.suptitle(
        "One-layer Transformer, width 16, 4 heads, on Shakespeare's characters: dense "
        "Hessian of each tensor and the "
        "blocks claimed for it",
        fontsize=11,
    )
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
