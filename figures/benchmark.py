"""Draws the side-by-side benchmark: a panel a model, a row a job, time as a multiple of ours.

`python figures/benchmark.py [RESULT] [PICTURE]` reads results only.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "side_by_side_cpu.json"
STYLES = {
    "ours": ("#1f4e79", "o"),
    "eigenthings": ("#d08c2e", "s"),
    "curvlinops": ("#2a7f62", "D"),
    "pyhessian": ("#8c3f6b", "^"),
    "official": ("#8a8a8a", "v"),
}


def main(source: str = str(RESULT), target: str = __file__.replace(".py", ".png")) -> None:
    result = json.loads(Path(source).read_text())
    models, contenders = result["models"], result["contenders"]
    letters = sorted({letter for model in models.values() for letter in model["jobs"]})
    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(3.1 * len(models) + 1.2, 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, model) in zip(axes[0], models.items(), strict=True):
        for letter, job in model["jobs"].items():
            row = letters.index(letter)
            for place, contender in enumerate(contenders):
                draw(
                    panel,
                    row + 0.13 * (place - (len(contenders) - 1) / 2),
                    contender,
                    job["contenders"].get(contender, {}),
                )
        panel.axvline(1, color=STYLES["ours"][0], linewidth=0.8, zorder=0)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_yticks(range(len(letters)), [f"({letter})" for letter in letters])
        panel.grid(axis="x", linewidth=0.4, alpha=0.6)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("time / ours", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    handles = [
        plt.Line2D(
            [],
            [],
            color=STYLES[key][0],
            marker=STYLES[key][1],
            linestyle="",
            label=contender["label"],
        )
        for key, contender in contenders.items()
    ]
    handles.append(
        plt.Line2D(
            [], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="wrong"
        )
    )
    figure.legend(
        handles=handles, ncols=len(handles), loc="outside lower center", fontsize=8, frameon=False
    )
    hardware = result["hardware"]
    place = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    figure.suptitle(
        f"Median and quartiles over rounds, {place}; a hollow mark is a wrong result", fontsize=10
    )
    figure.savefig(target, dpi=150)


def draw(panel, height: float, contender: str, entry: dict) -> None:
    """One contender on one job; nothing for one that failed, which the table tells."""
    if "ratio" not in entry:
        return
    colour, marker = STYLES[contender]
    ratio = entry["ratio"]
    panel.plot([ratio["low"], ratio["high"]], [height, height], color=colour, linewidth=1.2)
    face = colour if entry["right"] else "white"
    panel.plot(ratio["median"], height, marker, color=colour, markerfacecolor=face, markersize=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
