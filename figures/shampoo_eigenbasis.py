"""Draws how far Adafactor in Shampoo's eigenbasis is from Shampoo: by the book, and in practice.

`python figures/shampoo_eigenbasis.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import hessian_tools as ht

COLOURS = {"1": "#009e73", "10": "#1f5fa8", "50": "#d55e00", "plain": "#888888"}
STYLES = {"0.95": "-", "0.99": "--"}
PLACES = {"initial": "#1f5fa8", "trained": "#d55e00"}
DIFFERENCE = 0  # column of what was measured at fixed weights
BASIS_COSINE, KEPT_COSINE, FULL_COSINE = 1, 3, 4  # and on the trajectory
PRACTICE = {
    "Stale basis, moments of the averages:\nAdafactor against Shampoo": BASIS_COSINE,
    "Stale basis, moments kept over refreshes:\nAdafactor against Shampoo": KEPT_COSINE,
    "SOAP's full second moment\nagainst its rank-one form": FULL_COSINE,
}
Floats = np.ndarray


def over_seeds(found: dict, *keys: str) -> Floats:
    values = []
    for seed in found["seeds"]:
        for key in keys:
            seed = seed[key]
        values.append(seed)
    return np.stack(values)


def equality(axes: Axes, found: dict) -> None:
    """A dot a seed and matrix: the relative difference at fixed weights."""
    names = [name.removesuffix(".weight") for name in found["matrices"]]
    for place, colour in PLACES.items():
        values = over_seeds(found, "fixed", place)[..., DIFFERENCE]
        heights = np.broadcast_to(np.arange(len(names)), values.shape)
        shift = 0.15 if place == "trained" else -0.15
        axes.plot(values.ravel(), heights.ravel() + shift, "o", ms=4, color=colour, alpha=0.7)
        axes.plot([], [], "o", ms=4, color=colour, label=f"{place} weights")
    axes.axvline(np.finfo(float).eps, color="#aaaaaa", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(1e-16, 1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("relative difference of the two directions", fontsize=8.5)
    axes.set_title("By the book: equal to rounding\n(grey: float64's precision)", fontsize=9.5)
    axes.legend(fontsize=7.5, frameon=False, loc="lower right")


def in_practice(axes: Axes, found: dict, column: int) -> None:
    """Lines over steps: the median over matrices, mean over seeds; the band is the seeds' range."""
    for key in found["seeds"][0]["along"]:
        beta, method = key.split()
        values = over_seeds(found, "along", key)
        if method == "plain" and column != KEPT_COSINE:
            continue
        of_seeds = np.median(values[..., 1 if method == "plain" else column], axis=2)
        steps = np.arange(of_seeds.shape[1]) + len(found["seeds"][0]["losses"]) - len(of_seeds[0])
        colour = COLOURS[method]
        axes.fill_between(steps, of_seeds.min(0), of_seeds.max(0), color=colour, alpha=0.12, lw=0)
        axes.plot(steps, of_seeds.mean(0), STYLES[beta], color=colour, linewidth=1.2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("step", fontsize=8.5)
    axes.set_ylabel("cosine of the two directions", fontsize=8.5)


def handles() -> list[Line2D]:
    methods = {"no rotation" if m == "plain" else f"bases refreshed every {m}": m for m in COLOURS}
    made = [Line2D([], [], color=COLOURS[m], label=label) for label, m in methods.items()]
    betas = STYLES.items()
    made += [Line2D([], [], ls=style, color="black", label=f"b2 = {b}") for b, style in betas]
    return made


def main(
    source: str = "results/shampoo_eigenbasis/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    found = ht.load(source)
    figure = Figure((15, 5), layout="constrained")
    first, *others = figure.subplots(1, 4, width_ratios=[1.25, 1, 1, 1])
    equality(first, found)
    for axes, (text, column) in zip(others, PRACTICE.items(), strict=True):
        in_practice(axes, found, column)
        axes.set_title(text, fontsize=9.5)
    for axes in (first, *others):
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles(), loc="outside lower right", ncols=6, fontsize=8, frameon=False)
    title = "Shampoo with power 1/2 and Adafactor in its eigenbasis, on gradients of a small GPT"
    figure.suptitle(title, fontsize=11)
    figure.savefig(target, dpi=120, metadata={"Title": title})


if __name__ == "__main__":
    main(*sys.argv[1:])
