"""Draws errors by arithmetic, against the probes' own error.

`python figures/precision.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht

STYLES = {  # label -> (colour, marker)
    "float32": ("#8a8a8a", "s"),
    "TF32": ("#d08c2e", "D"),
    "TF32 emulated": ("#d08c2e", "D"),
    "bfloat16": ("#1f4e79", "o"),
    "rounded weights": ("#1f4e79", "x"),
    "autocast": ("#2a7f62", "^"),
}
WORDS = {
    "rounded weights": "only weights and data rounded to bfloat16",
    "autocast": "float32 weights, bfloat16 autocast",
}
PROBES = "standard error of probes"
GROUPS = {  # heading -> quantities: all that start so
    "whole Hessian": ("largest", "smallest", "moment", "rms"),
    "single blocks": ("blocks",),
    "heterogeneity": ("bounded", "unnormalised", "log", "wasserstein", "scale"),
}
FLOOR = 1e-8  # errors below are drawn there


def main(
    source: str = "results/precision/result", target: str = __file__.replace(".py", ".png")
) -> None:
    found: dict[str, dict[str, dict[str, float]]] = ht.load(source)
    quantities = list(next(iter(found.values()))[PROBES])
    rows, ticks, y = {}, [], 0.0
    for starts in GROUPS.values():
        for quantity in (q for q in quantities if q.startswith(starts)):
            rows[quantity] = y
            ticks.append((y, quantity))
            y += 1
        y += 0.6
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(2.6 + 3.4 * len(found), 0.27 * y + 1.7),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for panel, (name, columns) in zip(axes[0], found.items(), strict=True):
        for quantity, row in rows.items():
            panel.barh(
                row, columns[PROBES][quantity], left=0, height=0.9, color="#ececec", zorder=0
            )
        for label, values in columns.items():
            if label != PROBES:
                colour, marker = STYLES[label]
                face = colour if marker == "x" or label == "bfloat16" else "white"
                spots = [max(values[quantity], FLOOR) for quantity in rows]
                panel.scatter(
                    spots,
                    rows.values(),
                    color=face,
                    edgecolors=colour if marker != "x" else None,
                    marker=marker,
                    s=30,
                    linewidths=1.3,
                )
        panel.set_xscale("log")
        panel.set_xlim(FLOOR / 2, 10)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("relative error against float64 (spectrum: moved by, decades)", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", linewidth=0.4, alpha=0.6)
        panel.set_axisbelow(True)
    axes[0, 0].set_yticks(*zip(*ticks, strict=True))
    axes[0, 0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color="#dcdcdc")]
    labels = ["standard error from the probes"]
    for label in [label for label in STYLES if label in next(iter(found.values()))]:
        colour, marker = STYLES[label]
        face = colour if marker == "x" or label == "bfloat16" else "white"
        handles.append(
            plt.Line2D(
                [], [], color="none", marker=marker, markerfacecolor=face, markeredgecolor=colour
            )
        )
        labels.append(WORDS.get(label, label))
    figure.legend(handles, labels, ncols=3, loc="outside lower center", fontsize=8, frameon=False)
    figure.suptitle(
        "What coarser arithmetic costs (same probes for all): marks inside a grey bar are "
        "lost in the probes' error",
        fontsize=10,
    )
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
