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
    "unnormalised": "literature's JS0 (unnormalised)",
    "bounded": "bounded JS",
    "log": "JS on a log axis",
    "wasserstein": "Wasserstein on a log axis",
    "scale": "spread of block scales",
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
        readings = [
            js.scale_spread if key == "scale" else js.readings[key] for js in found.values()
        ]
        for row, (name, reading) in enumerate(zip(names, readings, strict=True)):
            style = {"fmt": "o", "markersize": 6, "elinewidth": 1.2, "capsize": 2}
            panel.errorbar(
                reading.mean,
                row,
                xerr=2 * reading.standard_error,
                color=COLOURS[zoo.SPECS[name].family],
                **style,
            )
        panel.set_yticks(range(len(names)), names)
        low, high = min(r.mean for r in readings), max(r.mean for r in readings)
        if key in ("unnormalised", "bounded"):
            panel.set_xscale("log")
            panel.set_xlim(
                10 ** math.floor(math.log10(low / 1.2)), 10 ** math.ceil(math.log10(high * 1.2))
            )
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_xlim(0, 1.15 * high)
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(readings[0].unit, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, ncols=4, loc="outside lower center", fontsize=8, frameon=False)
    figure.suptitle(
        "Heterogeneity of block spectra at initialisation (mean over pairs, with two "
        "standard errors)",
        fontsize=10,
    )
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
