"""Draws off-diagonal over diagonal mass against the number of classes, with fits.

`python figures/class_laws.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import hessian_tools as ht

COLOURS = {
    "H_ww, MSE": "#56b4e9",
    "H_ww, CE": "#1f4e79",
    "H_vv, CE": "#d55e00",
    "H_vv, CE, by pairs": "#e69f00",
}
WORDS = {"H_ww": r"$H_{ww}$ (hidden neurons)", "H_vv": r"$H_{vv}$ (outputs)"}


def main(
    source: str = "results/class_laws/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    classes = found["classes"]
    figure, axes = plt.subplots(figsize=(7.4, 5), layout="constrained")
    for law, ratios in found["ratios"].items():
        colour, (slope, half) = COLOURS[law], found["exponents"][law]
        layer, loss = law.split(", ", 1)
        spread = np.exp(
            np.random.default_rng(0).uniform(-0.05, 0.05, len(ratios))
        )  # so that seeds can be told apart
        for column, count in enumerate(classes):
            axes.plot(count * spread, ratios[:, column], ".", color=colour, markersize=4, alpha=0.6)
        middle = np.exp(np.log(ratios).mean())
        fit = middle * (classes / np.exp(np.log(classes).mean())) ** slope
        power = found["laws"][law]
        label = f"{WORDS[layer]}, {loss}: exponent {slope:.3f} ± {half:.3f} (law: {power})"
        axes.plot(classes, fit, color=colour, linewidth=1.5, label=label)
        law_line = fit[0] * (classes / classes[0]) ** float(power)
        axes.plot(classes, law_line, color=colour, linewidth=0.9, linestyle=":")
        known = [(int(count), value) for count, value in found["reference"].get(law, {}).items()]
        for count, value in (pair for pair in known if pair[0] in classes):
            axes.plot(count, value, "o", color=colour, markersize=8, markerfacecolor="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(classes, [str(c) for c in classes])
    axes.minorticks_off()
    axes.set_xlabel("classes C", fontsize=9)
    axes.set_ylabel(r"mean $\|H_{ij}\|_F^2$, $i\neq j$, over mean $\|H_{ii}\|_F^2$", fontsize=9)
    axes.set_title(
        r"$f=V\,\mathrm{relu}(Wx)$ at initialisation: the more classes, the more block-diagonal"
        "\n(dots: seeds; lines: fits; dotted: the law from the fit's first point; rings: "
        "measured before)",
        fontsize=9.5,
    )
    axes.grid(linewidth=0.3, alpha=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="lower left")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
