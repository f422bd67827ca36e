"""Draws loss curves of the literature's cases, with the theorems' bounds.

`python figures/quadratics.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht
from hessian_tools.plots.quadratic import loss_curves, short

WORDS = {
    "case 1": "GPT-2's blocks",
    "case 2": "ResNet-18's blocks",
    "case 3": "heterogeneous",
    "case 4": "homogeneous",
}


def main(
    source: str = "results/quadratics/result", target: str = __file__.replace(".py", ".png")
) -> None:
    curves = ht.load(source)["curves"]
    rows = -(-len(curves) // 2)
    figure, panels = plt.subplots(
        rows, 2, figsize=(12, 3.7 * rows + 0.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (name, of) in zip(panels.flat, curves.items(), strict=True):
        loss_curves(panel, of["runs"], of["constants"])
        found, js = of["constants"], of["heterogeneity"]
        panel.get_legend().remove()
        wasserstein = js.readings["wasserstein"].mean
        told = rf"κ {short(found.kappa[0])}, $\max\,\kappa_l$ {short(found.block_kappas.max())}"
        panel.set_title(
            f"{name} ({WORDS[name]}): {told}, Wasserstein {wasserstein:.2f} decades", fontsize=9
        )
    for panel in panels[:, 1]:
        panel.set_ylabel("")
    for panel in panels[:-1].flat:
        panel.set_xlabel("")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        ncols=4,
        loc="outside lower center",
        fontsize=8,
        frameon=False,
    )
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
