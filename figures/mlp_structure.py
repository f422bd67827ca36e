"""Draws the MLP's Hessian at three times, and its masses against the loss.

`python figures/mlp_structure.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import hessian_tools as ht

DECADES = 4  # of a heat map's colours
TIMES = ("initialisation", "half of training", "end of training")
STYLE = {"fontsize": 8, "frameon": False}


def heat(axes, colours: np.ndarray, rows: int, columns: int):
    """log10 |H| with borders between ``rows`` and ``columns`` blocks."""
    shown = colours.astype(float)
    image = axes.imshow(
        shown, cmap="magma", vmin=-DECADES, vmax=0, aspect="auto", interpolation="nearest"
    )
    for count, size, line in (
        (rows, shown.shape[0], axes.axhline),
        (columns, shown.shape[1], axes.axvline),
    ):
        for edge in np.arange(1, count) * size / count:
            line(edge - 0.5, color="white", linewidth=0.6 if count < 20 else 0.15, alpha=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def curves(panels, masses: dict) -> None:
    """Against the training loss, which falls to the right."""
    loss = [m["loss"] for m in masses.values()]
    lines = (
        {
            "H_ww: in hidden neurons": ("inside ww", "#1f4e79"),
            "H_vv: in outputs": ("inside vv", "#d55e00"),
            "whole H: in both": ("blocks", "#8a8a8a"),
        },
        {r"$\|H_{wv}\|$": ("wv", "#7b3fa0"), "its residual part": ("residual", "#009e73")},
        {
            r"$\|H_{wv}\|\,/\,\sqrt{\|H_{ww}\|\|H_{vv}\|}$": ("coupling", "#7b3fa0"),
            r"share of $\|H\|^2$ across layers": ("across", "#8a8a8a"),
        },
    )
    titles = (
        "share of mass inside blocks",
        "norm of the cross-layer block",
        "cross-layer coupling",
    )
    for panel, own, title in zip(panels, lines, titles, strict=True):
        for label, (key, colour) in own.items():
            panel.plot(
                loss,
                [m[key] for m in masses.values()],
                "o-",
                color=colour,
                markersize=3.5,
                label=label,
            )
        panel.set_title(title, fontsize=9.5)
        panel.set_xlim(max(loss) + 0.15, min(loss) - 0.15)
        panel.grid(linewidth=0.3, alpha=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.legend(**STYLE)
    for panel in panels[::2]:
        panel.set_ylim(bottom=0)
    panels[1].set_yscale("log")
    panels[2].set_xlabel("training loss (training goes to the right)", fontsize=8.5)


def main(
    source: str = "results/mlp_structure/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    pictures, masses, hidden = found["pictures"], found["masses"], found["hidden"]
    shown = pictures[next(iter(pictures))]["wv"].shape[1] // hidden
    figure, axes = plt.subplots(
        3,
        len(pictures) + 1,
        figsize=(14.5, 10.4),
        layout="constrained",
        width_ratios=[1] * len(pictures) + [1.15],
    )
    for column, (epoch, drawn) in enumerate(pictures.items()):
        m, classes = masses[epoch], found["classes"]
        heads = (
            f"{TIMES[column]}: loss {m['loss']:.2f}\n{m['inside ww']:.0%} of "
            f"$\\|H_{{ww}}\\|^2$ in neurons",
            f"{m['inside vv']:.0%} of $\\|H_{{vv}}\\|^2$ in outputs",
            f"residual part {m['residual'] / m['wv']:.0%} of $\\|H_{{wv}}\\|$",
        )
        sizes = (("ww", hidden, hidden), ("vv", classes, classes), ("wv", hidden, shown))
        for row, ((key, rows, columns), title) in enumerate(zip(sizes, heads, strict=True)):
            image = heat(axes[row, column], drawn[key], rows, columns)
            axes[row, column].set_title(title, fontsize=9.5)
    words = (
        f"$H_{{ww}}$: {hidden} hidden neurons,\n{found['drawn']} of {found['inputs'] // 3:,} "
        f"inputs each",
        f"$H_{{vv}}$: {found['classes']} outputs,\n{hidden} weights each",
        f"$H_{{wv}}$: hidden neurons (rows)\nagainst {shown} of {found['classes']} outputs",
    )
    for panel, word in zip(axes[:, 0], words, strict=True):
        panel.set_ylabel(word, fontsize=9.5)
    curves(axes[:, -1], masses)
    bar = figure.colorbar(
        image, ax=axes[:, :-1], location="bottom", fraction=0.02, pad=0.01, aspect=60
    )
    bar.set_label(
        r"$\log_{10}|H_{ij}|$, largest of each picture = 0; black rows and columns of blocks: "
        r"a neuron that has died",
        fontsize=9,
    )
    figure.suptitle(
        f"MLP {found['inputs']:,}-{hidden}-{found['classes']} without bias on Fashion-MNIST "
        f"at 3 x 32 x 32, 100 "
        "classes: 10 clusters in each real one (CIFAR-100 is not packaged)\n"
        "drawn: every fourth pixel of one of three equal channels; all numbers are of the "
        "whole Hessian",
        fontsize=10.5,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
