"""Draws what Adam's preconditioner does to the condition number.

`python figures/quadratic_tau.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht

COLOURS = ("#1f4e79", "#56b4e9", "#d55e00", "#e69f00", "#009e73")


def main(
    source: str = "results/quadratic_tau/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for colour, (label, rows) in zip(COLOURS, found.items(), strict=False):
        tau, low, middle, high = rows.T
        axes.fill_between(tau, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            tau,
            middle,
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.4,
            label=label.replace("kappa", "κ(H)"),
        )
    axes.axhline(1, color="black", linewidth=0.8)
    for height, side, words in (
        (1.06, "bottom", "above: Adam's preconditioner hurts"),
        (0.9, "top", "below: it helps"),
    ):
        axes.text(0.01, height, words, fontsize=8, va=side, transform=axes.get_yaxis_transform())
    axes.set_yscale("log")
    axes.set_xlabel(
        r"$\tau=\sum|H_{ii}|\,/\,\sum|H_{ij}|$   (1: diagonal, left: dense)", fontsize=9
    )
    axes.set_ylabel(
        r"$\kappa(D_\mathrm{Adam} H)\,/\,\kappa(H)$,   $D_\mathrm{Adam}=\mathrm{diag}(1/|g_0|)$",
        fontsize=9,
    )
    axes.set_title(
        "One dense block, eigenvectors turned away from the axes\n(medians and quartiles)",
        fontsize=10,
    )
    axes.grid(linewidth=0.3, alpha=0.7)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
