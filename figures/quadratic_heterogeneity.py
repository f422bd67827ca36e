"""Draws Adam's gain against every reading, and under rotations.

`python figures/quadratic_heterogeneity.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import hessian_tools as ht

TITLES = {
    "kappa": (r"$1\,/\,\max_l\,\kappa_l$", ""),
    "wasserstein": ("Wasserstein, log axis", "decades"),
    "spread": ("spread of block scales", "decades"),
    "log": ("JS, log axis", "nats"),
    "bounded": ("JS bounded (absolute kernel)", "nats"),
    "unnormalised": ("JS0, the literature's", "nats / dx"),
}
COLOURS = ("#56b4e9", "#999999")
CASES = {3: ("case 3", "#d55e00"), 4: ("case 4", "#1f4e79")}


def main(
    source: str = "results/quadratic_heterogeneity/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    found = ht.load(source)
    figure, panels = plt.subplots(2, 4, figsize=(14, 7.2), sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, TITLES, strict=False):
        _reading(panel, name, found)
    first = next(iter(found["dials"].values()))
    _dial(panels[1, 2], first["place"], first["gd"] / first["adam"])
    _rotations(panels[1, 3], found["angles"], found["rotations"])
    for panel in panels.flat:
        panel.set_yscale("log")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.grid(linewidth=0.3, alpha=0.6)
        panel.tick_params(labelsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("iterations of GD / of Adam\n(above 1: Adam is faster)", fontsize=9)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        ncols=4,
        loc="outside lower center",
        fontsize=9,
        frameon=False,
    )
    best = {
        "kappa": r"$\max_l\,\kappa_l$",
        **{name: title for name, (title, _) in TITLES.items() if name != "kappa"},
    }
    title = "Adam's gain over GD on the same eigenvalues (κ = 2000) put into blocks in all ways; "
    title += f"best predicted by: {best[found['best']]}"
    figure.suptitle(
        f"{title}\n(ρ: rank correlation with 95 % interval, in the order of the legend)",
        fontsize=10,
    )
    figure.savefig(target, dpi=150)


def _reading(panel: plt.Axes, name: str, found: dict) -> None:
    title, unit = TITLES[name]
    told = []
    for colour, (family, dial) in zip(COLOURS, found["dials"].items(), strict=True):
        gain = dial["gd"] / dial["adam"]
        panel.plot(
            dial[name],
            gain,
            "o",
            color=colour,
            markersize=3.5,
            alpha=0.6,
            markeredgewidth=0,
            label=family,
        )
        rho, low, high = found["correlations"][family][name]
        told.append(
            "ρ: it never changes" if np.isnan(rho) else f"ρ = {rho:.2f} ({low:.2f} to {high:.2f})"
        )
    first = next(iter(found["dials"].values()))
    for number, index in (
        (4, int(np.argmin(first["wasserstein"]))),
        (3, int(np.argmax(first["place"]))),
    ):
        label, colour = CASES[number]
        gain = first["gd"][index] / first["adam"][index]
        panel.plot(first[name][index], gain, "D", color=colour, markersize=7, label=label)
    panel.set_title("\n".join([title, *told]), fontsize=9)
    panel.set_xlabel(unit, fontsize=8)
    if name == "kappa":
        panel.set_xscale("log")
    elif name in ("bounded", "unnormalised"):
        panel.set_xlim(0, None)


def _dial(panel: plt.Axes, place: np.ndarray, gain: np.ndarray) -> None:
    for count in np.unique(place):
        some = gain[place == count]
        low, middle, high = np.quantile(some, (0.25, 0.5, 0.75))
        panel.plot(
            [count, count],
            [low, high],
            color=COLOURS[0],
            linewidth=5,
            alpha=0.5,
            solid_capstyle="butt",
        )
        panel.plot(count, middle, "o", color="#1f4e79", markersize=5)
        panel.annotate(
            f"{len(some)}",
            (count, high),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=7,
            ha="center",
        )
    panel.set_title(
        "the dial from case 4 to case 3\n(median, quartiles, number of ways)\n", fontsize=9
    )
    panel.set_xlabel("eigenvalues that are in their block of case 3, of 9", fontsize=8)


def _rotations(panel: plt.Axes, angles: np.ndarray, rotations: dict[str, np.ndarray]) -> None:
    for scope, colour, label in (
        ("blocks", "#009e73", "within blocks"),
        ("whole", "#d55e00", "as a whole"),
    ):
        _, gd, adam = rotations[scope].T
        panel.plot(
            np.maximum(angles, 1e-3), gd / adam, "o-", color=colour, markersize=4, label=label
        )
    panel.set_xscale("log")
    panel.set_title("case 3, its basis turned\n(theory: as a whole, Adam loses)\n", fontsize=9)
    panel.set_xlabel("angle of the rotation (left end: 0)", fontsize=8)
    panel.legend(fontsize=8, frameon=False, loc="lower left")


if __name__ == "__main__":
    main(*sys.argv[1:])
