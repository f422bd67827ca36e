"""Figures of races: loss curves at the best rates, and loss against rate."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hessian_tools.plots.spectra import titled, written
from hessian_tools.plots.style import line_style
from hessian_tools.training.races import Race, RaceEntry
from hessian_tools.training.sweeps import WITHIN
from hessian_tools.training.trajectory import Floats

_PANEL = (4.6, 3.8)  # inches
_MOST_POINTS = 500  # of a curve
_LEGEND = 1.5  # inches
# decades of an axis, and what is labelled between its powers of ten without running together
LABELLED = ((1.0, (2, 3, 4, 5, 6, 7, 8, 9)), (2.0, (2, 5)), (math.inf, ()))


def draw(folder: Path, race: Race, title: str, kind: str = "png") -> list[Path]:
    """Writes a race's pictures, as png, pdf or svg, and returns their paths: curves and rates."""
    curves = loss_curves(race, title=f"{title}: loss at the best rate")
    rates = rate_curves(race, title=f"{title}: loss against learning rate")
    return [
        written(curves, folder / f"curves.{kind}"),
        written(rates, folder / f"rates.{kind}"),
    ]


def loss_curves(race: Race, *, title: str = "") -> Figure:
    """Smoothed training loss against steps, a panel a batch size, both axes logarithmic.

    The line is the mean over seeds and the band reaches from the lowest to the highest. Crosses are
    validation losses. A dotted line is the level to which steps are counted.
    """
    figure, panels = _panels(race)
    for axes, size in zip(panels, race.batch_sizes, strict=True):
        entries = _of(race, size)
        for number, entry in enumerate(entries):
            curve(axes, entry, number)
        level = entries[0].level
        if math.isfinite(level):
            axes.axhline(level, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
        _fitted_to_curves(axes, entries)
        axes.set_xscale("log")
        _finished(axes, entries[0], "step")
        axes.legend(fontsize=7, frameon=False, loc="lower left")
    panels[0].set_ylabel(_loss_label(race), fontsize=9)
    titled(figure, title)
    return figure


def rate_curves(race: Race, *, title: str = "") -> Figure:
    """Final loss against learning rate, a panel a batch size.

    Each optimizer has a line a round, the shorter the run the fainter; a ring is its best rate, and
    crosses at the top are rates that diverged. The grey band is within 5 % of the best loss of all.
    """
    figure, panels = _panels(race)
    for axes, size in zip(panels, race.batch_sizes, strict=True):
        entries = _of(race, size)
        for number, entry in enumerate(entries):
            _rounds(axes, entry, *line_style(number))
        best = min(entry.loss for entry in entries)
        if math.isfinite(best):
            axes.axhspan(best, best + WITHIN * abs(best), color="#eeeeee", zorder=-1)
        axes.set_xscale("log")
        _fitted_to_rates(axes, entries)
        _finished(axes, entries[0], "learning rate")
    panels[0].set_ylabel("loss at the end of a run (log scale)", fontsize=9)
    panels[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    titled(figure, title)
    return figure


def _panels(race: Race) -> tuple[Figure, Sequence[Axes]]:
    count = len(race.batch_sizes)
    width, height = _PANEL
    figure = Figure((width * count + _LEGEND, height), layout="constrained")
    panels = figure.subplots(1, count, sharey=False, squeeze=False)[0]
    return figure, list(panels)


def _of(race: Race, size: int | None) -> list[RaceEntry]:
    """In the order in which they were named, so that colours stay."""
    return [entry for entry in race.entries if entry.batch_size == size]


def curve(axes: Axes, entry: RaceEntry, number: int) -> None:
    """The loss of one optimizer at its best rate, in the style of its number."""
    colour, dash = line_style(number)
    curves = _smoothed(entry)
    steps = np.arange(1, curves.shape[1] + 1)
    shown = np.unique(np.geomspace(1, len(steps), _MOST_POINTS).astype(int)) - 1
    mean = curves.mean(axis=0)
    label = f"{entry.optimizer}, rate {entry.rate:.2g}"
    axes.plot(steps[shown], mean[shown], dash, color=colour, linewidth=1.4, label=label)
    if len(curves) > 1:
        low, high = curves.min(axis=0), curves.max(axis=0)
        axes.fill_between(
            steps[shown], low[shown], high[shown], color=colour, alpha=0.15, linewidth=0
        )
    for run in entry.runs:
        places, losses = run.validation_steps, run.validation_losses
        axes.plot(places, losses, "x", color=colour, markersize=4, alpha=0.7)


def _smoothed(entry: RaceEntry) -> Floats:
    """(S, T) up to the end of the shortest run."""
    length = min(run.steps for run in entry.runs)
    return np.stack([run.smoothed()[:length] for run in entry.runs])


def _fitted_to_curves(axes: Axes, entries: Sequence[RaceEntry]) -> None:
    """A curve that shoots up may leave the picture."""
    curves = [curve for entry in entries for curve in _smoothed(entry)]
    finite = [curve[np.isfinite(curve)] for curve in curves]
    start = max((curve[0] for curve in finite if len(curve)), default=math.nan)
    lowest = min((curve.min() for curve in finite if len(curve)), default=math.nan)
    _limits(axes, lowest, start)


def _rounds(axes: Axes, entry: RaceEntry, colour: str, dash: str) -> None:
    count = len(entry.rounds)
    top = axes.get_xaxis_transform()
    for number, tried in enumerate(entry.rounds, start=1):
        is_last = number == count
        finite = np.isfinite(tried.losses)
        axes.plot(
            tried.rates[finite],
            tried.losses[finite],
            f"o{dash}",
            color=colour,
            markersize=3.5,
            linewidth=1.2,
            alpha=number / count,
            label=entry.optimizer if is_last else None,
        )
        outside = tried.rates[~finite]
        height = np.full(len(outside), 0.97)
        axes.plot(outside, height, "x", color=colour, markersize=5, transform=top)
    axes.plot(entry.rate, entry.loss, "o", color=colour, markersize=9, fillstyle="none")


def _fitted_to_rates(axes: Axes, entries: Sequence[RaceEntry]) -> None:
    losses = [tried.losses for entry in entries for tried in entry.rounds]
    finite = np.concatenate([some[np.isfinite(some)] for some in losses] or [np.empty(0)])
    starts = [run.losses[0] for entry in entries for run in entry.runs]
    lowest = finite.min() if len(finite) else math.nan
    _limits(axes, float(lowest), float(max(starts)))


def _limits(axes: Axes, lowest: float, highest: float) -> None:
    """A log axis with room at both ends; a linear one where losses are not all positive."""
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        return
    if lowest > 0:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.1, 1.25 * max(highest, lowest))
        axes.yaxis.set_major_formatter("{x:g}")
        decades = math.log10(max(highest, lowest) / lowest)
        labelled = next(subs for most, subs in LABELLED if decades <= most)
        axes.yaxis.set_minor_locator(LogLocator(subs=labelled))
        axes.yaxis.set_minor_formatter("{x:g}")


def _finished(axes: Axes, entry: RaceEntry, below: str) -> None:
    axes.set_xlabel(below, fontsize=9)
    size = entry.batch_size
    batches = "batches as given" if size is None else f"batches of {size}"
    axes.set_title(f"{batches}, {entry.num_steps:,} steps", fontsize=9)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(linewidth=0.3, alpha=0.7)


def _loss_label(race: Race) -> str:
    seeds = f"mean of {len(race.seeds)} seeds" if len(race.seeds) > 1 else "one seed"
    return f"training loss, smoothed ({seeds})\ncrosses: validation loss"
