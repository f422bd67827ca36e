"""Draws what became of right and of wrong claims, by planted contrast.

`python figures/partition_error_rates.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht

OUTCOMES = {
    "the exact verdict": "#1f7a4d",
    "undecided": "#c9c9c9",
    "another contradiction": "#b8860b",
    "the opposite": "#d55e00",
}
LEVEL = 4  # the contrast from which the checker tells blocks apart


def outcome(exact: str, estimated: str) -> str | None:
    """None where the exact matrix leaves nothing to be right about."""
    if exact == "undecided":
        return None
    if estimated in (exact, "undecided"):
        return "undecided" if estimated == "undecided" else "the exact verdict"
    return "the opposite" if "follows" in (exact, estimated) else "another contradiction"


def main(
    source: str = "results/partition_error_rates/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    records = ht.load(source)
    textures = list(dict.fromkeys(r["texture"] for r in records))
    contrasts = sorted({r["contrast"] for r in records})
    figure, panels = plt.subplots(
        2,
        len(textures),
        figsize=(3.1 * len(textures) + 0.8, 5.4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for column, texture in enumerate(textures):
        for row, (title, is_right) in enumerate((("right claims", True), ("wrong claims", False))):
            panel = panels[row, column]
            for place, contrast in enumerate(contrasts):
                own = [r for r in records if (r["texture"], r["contrast"]) == (texture, contrast)]
                own = [
                    (outcome(r["exact"], r["estimated"]), r["count"])
                    for r in own
                    if (r["exact"] == "follows") == is_right
                ]
                total, bottom = sum(n for name, n in own if name), 0.0
                for name, colour in OUTCOMES.items():
                    share = sum(n for found, n in own if found == name) / max(total, 1)
                    panel.bar(place, share, bottom=bottom, color=colour, width=0.85)
                    bottom += share
                panel.text(place, 1.01, str(total), fontsize=6.5, ha="center")
            panel.axvline(
                sum(c < LEVEL for c in contrasts) - 0.5, color="black", linewidth=0.8, linestyle=":"
            )
            panel.set_xticks(range(len(contrasts)), [f"{c:g}" for c in contrasts], fontsize=8)
            panel.set_title(f"{title}, {texture}", fontsize=9, pad=12)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
    figure.supxlabel(
        f"planted contrast, mean square inside over outside (dotted: the checker's level, "
        f"{LEVEL}); above "
        "bars: claims",
        fontsize=8,
    )
    figure.supylabel("share of claims", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in OUTCOMES.values()]
    names = [f"estimated: {name}" for name in OUTCOMES]
    place = {"ncols": min(4, len(textures)), "loc": "outside upper center"}
    figure.legend(handles, names, fontsize=8, frameon=False, **place)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
