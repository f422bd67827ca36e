"""Draws the sweeps of the decoders: loss against rate, by layer, momenta, and effective rates.

`python figures/decoder_sweeps.py [RESULT] [PICTURE] [SHORT_RESULT]` reads results only.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hessian_tools as ht

Line = dict[str, Any]
COLOURS = {
    "sgd": "#555555",
    "adamw": "#1f5fa8",
    "adafactor": "#2a9d5c",
    "lion": "#d55e00",
    "signum": "#e6a000",
    "muon": "#8e44ad",
    "soap": "#c2185b",
    "shampoo2_short_sides": "#7f6000",
    "adalayer": "#e6a000",
    "adalayer_star": "#2a9d5c",
    "sgd_adalayer": "#d55e00",
    "sgd_adalayer_last": "#c2185b",
    "frozen_adalayer_short": "#8e44ad",
    "adam_equal_betas": "#2a9d5c",
}
LABELS = {
    "sgd_adalayer": "SGD + Adalayer (last, norms)",
    "sgd_adalayer_last": "SGD + Adalayer (last)",
    "frozen_adalayer_short": "frozen Adalayer*",
    "adalayer_star": "adalayer*",
    "adam_equal_betas": "adam, b2 = b1",
}
LEAST_RATES = 3
CEILING = 7.0  # a loss near that of guessing, above which nothing is drawn


def chosen(lines: Iterable[Line], **wanted: object) -> list[Line]:
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def curve(axes: Axes, name: str, lines: Iterable[Line], dashed: bool = False) -> None:
    """Loss against rate of one optimizer; the best is marked."""
    kept = sorted((line["rate"], line["loss"]) for line in lines if line["loss"] is not None)
    kept = [(rate, loss) for rate, loss in kept if loss < CEILING]
    if not kept:
        return
    rates, losses = np.array(kept).T
    best = int(np.argmin(losses))
    style = {"color": COLOURS[name], "linewidth": 1.3, "linestyle": "--" if dashed else "-"}
    axes.plot(rates, losses, marker=".", markersize=4, label=LABELS.get(name, name), **style)
    axes.plot(rates[best], losses[best], "o", color=COLOURS[name], markersize=6)


def against_rate(axes: Axes, lines: list[Line], claim: str, title: str) -> None:
    names = [name for name in COLOURS if chosen(lines, claim=claim, optimizer=name)]
    for name in names:
        curve(axes, name, chosen(lines, claim=claim, optimizer=name))
    axes.set_xscale("log")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("largest learning rate")
    axes.set_ylabel("training loss, last tenth (nats)")


def momenta(axes: Axes, lines: list[Line]) -> None:
    """The best loss over rates, by momentum."""
    for name in ("sgd", "adamw", "signum", "adam_equal_betas"):
        by_momentum: dict[float, list[float]] = defaultdict(list)
        for line in chosen(lines, claim="b", optimizer=name):
            by_momentum[line["momentum"]].append(np.inf if line["loss"] is None else line["loss"])
        # a sweep that was cut off after a rate or two says little of the best
        swept = {m: min(of) for m, of in by_momentum.items() if len(of) >= LEAST_RATES}
        if swept:
            places = 1 - np.array(sorted(swept))
            losses = [swept[momentum] for momentum in sorted(swept)]
            axes.plot(places, losses, ".-", color=COLOURS[name], label=LABELS.get(name, name))
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
    axes.set_xticks(ticks, [f"{1 - tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("momentum (first beta)")
    axes.set_ylabel("training loss at the best rate (nats)")
    axes.set_title("(b) 1 M, 120 short steps: momenta", fontsize=9)


def effective(axes: Axes, found: dict[str, Any]) -> None:
    """Quantiles of AdamW's effective rates over training, of the logits and of two tensors."""
    shown = {
        "by logit": ("logits", "#c2185b"),
        "blocks.0.fc.weight": ("first MLP matrix", "#1f5fa8"),
        "blocks.0.norm1.weight": ("first norm", "#2a9d5c"),
    }
    for name, (label, colour) in shown.items():
        low, _, median, _, high = found["rates"][name].T
        axes.fill_between(found["steps"], low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(found["steps"], median, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("rate / sqrt(v)")
    axes.set_title("(c) 1 M, AdamW: effective rates, median and 5 to 95 %", fontsize=9)


def main(
    source: str = "results/decoder_sweeps/result",
    target: str = __file__.replace(".py", ".png"),
    short: str = "results/decoder_sweeps_short/result",
) -> None:
    found = ht.load(source)
    lines = chosen(found["lines"], seed=0)
    figure = Figure((15, 8.2), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, size, variant, words in (
        (panels[0, 0], "1M", "standard", "(a) 1 M, QK-norm and z-loss"),
        (panels[0, 1], "1M", "plain", "(a) 1 M, neither"),
        (panels[0, 2], "6M", "standard", "(a) 6 M, QK-norm and z-loss"),
    ):
        against_rate(axes, chosen(lines, size=size, variant=variant), "a", words)
    layered = chosen(lines, size="1M", variant="standard")
    against_rate(panels[1, 0], layered, "c", "(c) 1 M: adaptivity by layer; dashed, AdamW")
    curve(panels[1, 0], "adamw", chosen(layered, claim="a", optimizer="adamw"), dashed=True)
    if "1M" in found["effective"]:
        effective(panels[1, 1], found["effective"]["1M"])
    momenta(panels[1, 2], chosen(ht.load(short)["lines"], seed=0))
    for axes in panels.flat:
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7.5, frameon=False)
    title = "Optimizers on two small decoders: Shakespeare and Brown, 2,048 tokens of BPE"
    figure.suptitle(title, fontsize=11)
    figure.savefig(target, dpi=120, metadata={"Title": title})


if __name__ == "__main__":
    main(*sys.argv[1:])
