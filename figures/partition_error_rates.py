"""Draws what became of right and of wrong claims, by planted kind.

`python figures/partition_error_rates.py [RESULT] [PICTURE]` reads results only.
"""

import sys
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import hessian_tools as ht

Record = Mapping[str, str | int]
OUTCOMES = {"the right verdict": "#1f7a4d", "undecided": "#c9c9c9", "an error": "#d55e00"}


def outcome(truth: str, verdict: str) -> str:
    if verdict == "undecided":
        return verdict
    return "the right verdict" if (verdict == "follows") == (truth == "right") else "an error"


def draw(panel: Axes, records: Sequence[Record], kinds: Sequence[str], truth: str) -> None:
    """A bar a kind."""
    for place, kind in enumerate(kinds):
        own = [r for r in records if (r["kind"], r["truth"]) == (kind, truth)]
        total = sum(int(r["count"]) for r in own)
        left = 0.0
        for name, colour in OUTCOMES.items():
            found = [r for r in own if outcome(truth, str(r["estimated"])) == name]
            share = sum(int(r["count"]) for r in found) / max(total, 1)
            panel.barh(place, share, left=left, color=colour, height=0.8)
            left += share
        panel.text(1.02, place, str(total) if total else "none", fontsize=7, va="center")
    panel.set_title(f"{truth} claims", fontsize=9)
    panel.set_yticks(range(len(kinds)), kinds, fontsize=8)
    panel.set_xlim(0, 1)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def main(
    source: str = "results/partition_error_rates/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    records = ht.load(source)
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.6), sharey=True, layout="constrained")
    for panel, truth in zip(panels, ("right", "wrong"), strict=True):
        draw(panel, records, kinds, truth)
    panels[0].invert_yaxis()
    figure.supxlabel("share of claims (numbers: how many)", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in OUTCOMES.values()]
    place = {"ncols": len(OUTCOMES), "loc": "outside upper center"}
    figure.legend(handles, OUTCOMES, fontsize=8, frameon=False, **place)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
