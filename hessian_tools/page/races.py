"""A race of optimizers on the page: its table, loss curves, and loss against rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hessian_tools.page.curves import NOTHING, Curve, Drawing, PanelOf, drawing, thinned
from hessian_tools.page.views import Headline, Table, plain_table
from hessian_tools.page.words import sentence, shown
from hessian_tools.training.race_report import HEADER, findings, notes, race_rows
from hessian_tools.training.races import Race, RaceEntry
from hessian_tools.training.trajectory import Trajectory

_ROOM = 1.25  # above the loss at the start, which is where curves are cut off


@dataclass(frozen=True)
class RaceView:
    """The table, and a pair of drawings a batch size: loss curves, and loss against rate."""

    table: Table
    drawings: tuple[Drawing, ...]
    notes: tuple[str, ...]


def race_view(race: Race) -> RaceView:
    """Everything that a finished race has found."""
    drawings = []
    for size in race.batch_sizes:
        entries = [entry for entry in race.entries if entry.batch_size == size]
        drawings += [_loss_curves(entries), _rate_curves(entries)]
    table = plain_table("Optimizers, the lowest loss first", HEADER, race_rows(race))
    return RaceView(
        table,
        tuple(drawn for drawn in drawings if drawn is not None),
        tuple(notes(race)),
    )


def race_headline(race: Race) -> Headline:
    """Who leads."""
    first, *others = findings(race)
    leaders = list(dict.fromkeys(race.leaders.values()))
    label = f"{leaders[0]} leads" if len(leaders) == 1 else "the leader changes"
    return Headline("plain", label, sentence(first), tuple(map(sentence, others)))


def _batches(entry: RaceEntry) -> str:
    size = entry.batch_size
    return "batches as given" if size is None else f"batches of {size}"


def _loss_curves(entries: list[RaceEntry]) -> Drawing | None:
    curves = [_loss_curve(entry, style) for style, entry in enumerate(entries) if _runs(entry)]
    if not curves:
        return None
    start = max(float(run.losses[0]) for entry in entries for run in _runs(entry))
    level = entries[0].level
    levels = [(level, "level")] if math.isfinite(level) else []
    where = _batches(entries[0])
    title = f"training loss, smoothed; {where}"
    panel = PanelOf(title, curves, levels, limits=_limits(curves, start))
    described = f"Training loss by step of {len(curves)} optimizers at their best rates, {where}"
    return drawing([panel], "step", described, is_log=True, panel_height=240)


def _runs(entry: RaceEntry) -> list[Trajectory]:
    """At the best rate, as far as they took a step."""
    return [run for run in entry.runs if run.steps]


def _loss_curve(entry: RaceEntry, style: int) -> Curve:
    """The mean over seeds, and what lies between the lowest and the highest."""
    runs = _runs(entry)
    length = min(run.steps for run in runs)
    kept = thinned(length, is_log=True)
    smoothed = np.stack([run.smoothed()[:length][kept] for run in runs])
    label = f"{entry.optimizer}, rate {shown(entry.rate)}"
    steps = np.array(kept, dtype=float) + 1
    low, high = (smoothed.min(0), smoothed.max(0)) if len(runs) > 1 else (NOTHING, NOTHING)
    return Curve(label, steps, smoothed.mean(0), low, high, style)


def _limits(curves: list[Curve], start: float) -> tuple[float, float] | None:
    """From the lowest loss to the start: a curve that shoots up may leave the picture."""
    finite = [curve.y[np.isfinite(curve.y)] for curve in curves]
    lowest = float(np.concatenate(finite).min(initial=math.inf))
    if not (math.isfinite(lowest) and math.isfinite(start) and lowest > 0):
        return None
    return lowest / 1.1, _ROOM * max(start, lowest)


def _rate_curves(entries: list[RaceEntry]) -> Drawing | None:
    curves = [
        _rate_curve(entry, number, style)
        for style, entry in enumerate(entries)
        for number in range(len(entry.rounds))
    ]
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return None
    starts = [float(run.losses[0]) for entry in entries for run in _runs(entry)]
    where = _batches(entries[0])
    title = f"loss at the end of a run, shorter rounds fainter; {where}"
    panel = PanelOf(title, curves, limits=_limits(curves, max(starts, default=math.nan)))
    described = f"Loss against learning rate, {where}"
    return drawing([panel], "learning rate", described, is_log=True, panel_height=240)


def _rate_curve(entry: RaceEntry, number: int, style: int) -> Curve:
    """One round; the shorter its runs the fainter."""
    tried = entry.rounds[number]
    finite = np.isfinite(tried.losses)
    return Curve(
        entry.optimizer,
        tried.rates[finite],
        tried.losses[finite],
        style=style,
        drawn_as="dots",
        strength=(number + 1) / len(entry.rounds),
    )


def trained_view(trained: Mapping[str, Trajectory]) -> RaceView:
    """Single runs, such as an interrupted race has finished."""
    header = ("run", "steps", "final loss", "seconds")
    ordered = sorted(trained.items(), key=lambda pair: (-pair[1].num_steps, pair[1].final))
    rows = []
    for name, run in ordered:
        final = "diverged" if run.diverged else shown(run.final)
        rows.append([name, f"{run.steps:,}", final, shown(run.seconds)])
    best: dict[str, tuple[str, Trajectory]] = {}
    for name, run in ordered:
        if run.steps and not run.diverged:
            best.setdefault(name.partition(",")[0], (name, run))
    curves = []
    for style, (name, run) in enumerate(best.values()):
        kept = thinned(run.steps, is_log=True)
        x = np.array(kept, dtype=float) + 1
        curves.append(Curve(name, x, run.smoothed()[kept], style=style))
    drawings = []
    if curves:
        title = "training loss, smoothed: the best of the longest runs of each optimizer"
        described = f"Training loss by step of {len(curves)} finished runs"
        panel = PanelOf(title, curves)
        drawings.append(drawing([panel], "step", described, is_log=True, panel_height=240))
    table = plain_table("Finished runs, the longest first", header, rows)
    return RaceView(table, tuple(drawings), ())
