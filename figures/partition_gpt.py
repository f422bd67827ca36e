"""Draws verdicts on a small GPT: a row a weight, a column a claim, at both times.

`python figures/partition_gpt.py [RESULT] [PICTURE]` reads results only.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import hessian_tools as ht
from hessian_tools.plots.partition import COLOURS
from hessian_tools.structure.judgement import VERDICTS

STRIP = 0.035  # width of the edge that tells the likely verdict
TITLES = {
    "adam_mini": "adam_mini",
    "neuron": "neuron\n(all by output)",
    "tensor": "tensor\n(all whole)",
    "stored rows": "rows as stored\n(naive, axis 0)",
}
SHORT = {
    "elements": "entries",
    "columns": "inputs",
    "rows": "outputs",
}  # of a weight, whichever way it is stored
TOKENS = {
    "transformer.wte.weight": {"rows": "tokens", "columns": "features"},
    "transformer.wpe.weight": {"rows": "positions", "columns": "features"},
}


def cell(report: ht.structure.PartitionReport, name: str) -> tuple[str, str, str] | None:
    """Verdict, words, and the verdict by the estimates alone, on one weight or the tensor that it
    is a role of.
    """
    found = next((t for t in report.tensors if t.name in (name, name.partition("[")[0])), None)
    if found is None:
        return None
    words = TOKENS.get(name, SHORT).get(found.claim, found.claim)
    likely = (
        f", likely {found.likely}"
        if found.verdict == "undecided" and found.likely != "undecided"
        else ""
    )
    return found.verdict, f"{words} {_percent(found.claimed.share)}{likely}", found.likely


def panel(axes: plt.Axes, found: dict, names: tuple[str, ...]) -> None:
    for column, claim in enumerate(found["reports"]):
        row = 0
        while row < len(names):
            shown, span = cell(found["reports"][claim], names[row]), 1
            whole = not any(t.name == names[row] for t in found["reports"][claim].tensors)
            while (
                whole
                and row + span < len(names)
                and names[row + span].split("[")[0] == names[row].split("[")[0]
            ):
                span += 1
            if shown is not None:
                box = {"facecolor": COLOURS[shown[0]], "edgecolor": "white", "linewidth": 1.5}
                axes.add_patch(plt.Rectangle((column, row), 1, span, **box))
                if shown[0] == "undecided":
                    edge = {"facecolor": COLOURS[shown[2]], "edgecolor": "none"}
                    axes.add_patch(plt.Rectangle((column, row + 0.04), STRIP, span - 0.08, **edge))
                text = (
                    shown[1]
                    if span == 1
                    else f"q, k, v together\n{shown[1].replace(', ', chr(10))}"
                )
                axes.text(
                    column + 0.5 + STRIP / 2,
                    row + span / 2,
                    text,
                    fontsize=6.6,
                    color="white",
                    ha="center",
                    va="center",
                )
            row += span
    for row, name in enumerate(names):
        top = found["extremes"].largest[found["extremes"].names.index(name)]
        axes.text(len(found["reports"]) + 0.08, row + 0.5, f"{top:.2g}", fontsize=7, va="center")
    axes.text(len(found["reports"]) + 0.08, -0.12, "$\\lambda_{max}$", fontsize=7.5, va="bottom")
    axes.set_xlim(0, len(found["reports"]) + 0.45)
    axes.set_ylim(len(names), 0)
    axes.set_xticks(
        [i + 0.5 for i in range(len(found["reports"]))],
        [TITLES[c] for c in found["reports"]],
        fontsize=8,
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main(
    source: str = "results/partition_gpt/result", target: str = __file__.replace(".py", ".png")
) -> None:
    result = ht.load(source)
    names = next(iter(result.values()))["extremes"].names
    figure, panels = plt.subplots(
        1,
        len(result),
        figsize=(6.6 * len(result) + 1.4, 0.27 * len(names) + 2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, (time, found) in zip(panels[0], result.items(), strict=True):
        panel(axes, found, names)
        rates = found["savings"]["adam_mini"].split(" for ")[0]
        told = found["reports"]["adam_mini"].savings
        axes.set_title(
            f"{time}, loss {found['loss']:.2f}\nadam_mini: {rates}; suggested in its place: "
            f"{told.num_blocks:,}, {told.saved_percent:.1f} % less state than Adam",
            fontsize=9.5,
            pad=8,
        )
    labels = [n.removeprefix("transformer.").replace(".weight", "") for n in names]
    panels[0, 0].set_yticks([i + 0.5 for i in range(len(names))], labels, fontsize=7.5)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[verdict]) for verdict in VERDICTS]
    figure.legend(
        handles,
        VERDICTS,
        ncols=len(VERDICTS),
        loc="outside lower center",
        fontsize=8.5,
        frameon=False,
    )
    title = (
        "Does the partition follow the Hessian? A GPT-2 of 4 layers, width 128, on "
        "Shakespeare's bytes; in each cell: "
        "what is a block,\nand the share of the tensor's own Hessian mass (squared Frobenius "
        "norm) inside them; "
        "grey: not significant, edge and words tell what is likely"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, dpi=150)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.095 else f"{share:.0%}".replace("%", " %")


if __name__ == "__main__":
    main(*sys.argv[1:])
