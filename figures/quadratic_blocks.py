"""Draws loss curves on three blocks and on the first alone.

`python figures/quadratic_blocks.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

import hessian_tools as ht

STYLES = {
    "blockwise GD": ("#009e73", "-"),
    "GD": ("#1f4e79", "--"),
    "Adam-mini, β₂ = 1": ("#cc79a7", "-"),
    "Adam, β₂ = 1": ("#d55e00", "-"),
    "Adam, β₁ = 0, β₂ = 0.999": ("#d55e00", "--"),
}
LOWEST = 1e-12


def main(
    source: str = "results/quadratic_blocks/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found = ht.load(source)
    figure, panels = plt.subplots(
        1, len(found), figsize=(11, 4.2), sharey=True, layout="constrained"
    )
    for panel, (name, of) in zip(panels, found.items(), strict=True):
        for label, runs in of["runs"].items():
            colour, dash = STYLES[label]
            low, middle, high = np.quantile(
                np.nan_to_num(runs.losses), (0.25, 0.5, 0.75), axis=0, method="inverted_cdf"
            )
            steps, below = np.maximum(runs.recorded, 0.7), LOWEST / 1e3  # out of sight
            panel.plot(
                steps, np.clip(middle, below, 1e3), dash, color=colour, linewidth=1.6, label=label
            )
            ends = np.clip(low, below, 1e3), np.clip(high, below, 1e3)
            panel.fill_between(steps, *ends, color=colour, alpha=0.12, linewidth=0)
        rates = ", ".join(f"{rate:.2g}" for rate in of["rates"])
        panel.set_title(f"{name}; own step of each block: {rates}", fontsize=9)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(LOWEST, 10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(linewidth=0.3, alpha=0.7)
    panels[0].set_ylabel("f / f(w₀), median and quartiles", fontsize=9)
    panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        "One learning rate a block beats Adam, Adam beats one for all; on one block it loses",
        fontsize=10,
    )
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
