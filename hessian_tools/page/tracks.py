"""What a tracker has followed, on the page: curvature beside the loss."""

from dataclasses import dataclass

import numpy as np

from hessian_tools.page.curves import Curve, Drawing, PanelOf, drawing, thinned
from hessian_tools.page.trainer_log import LossLog
from hessian_tools.page.views import NUMBERS, Column, Headline, Row, Table, number
from hessian_tools.page.words import counted, sentence, shown
from hessian_tools.spectra.quadrature import Floats
from hessian_tools.tracking.track import Track

LOSS = "loss"
_BOUNDS = ("_low", "_high")  # of an interval of the reading whose name they follow
_ERRORS = ("_residual", "_error")  # how far off it may be
_TITLES = {
    "largest": "largest eigenvalue",
    "smallest": "smallest eigenvalue",
    "scale": "spread of block scales",
    "preconditioned_scale": "spread of block scales, preconditioned",
    "update_sharpness": "sharpness along the update",
    "critical_sharpness": "critical sharpness",
}
_DECADES = ("scale", "preconditioned_scale")  # of which negative estimates stand for zero


@dataclass(frozen=True)
class TrackView:
    """The loss on top, then a panel a reading, and all numbers.

    ``drawing`` None: there is nothing to draw.
    """

    drawing: Drawing | None
    table: Table
    notes: tuple[str, ...]


def track_view(track: Track, log: LossLog | None) -> TrackView:
    """Curves and their numbers; ``log`` of the training that was followed."""
    names = _readings(track)
    panels = [_panel(track, name) for name in names if name != LOSS]
    losses = _losses(track, log)
    if losses:
        panels.insert(0, PanelOf("loss", losses))
    panels = [panel for panel in panels if any(len(curve.x) for curve in panel.curves)]
    described = f"Readings along training: {', '.join(panel.title for panel in panels)}"
    drawn = None
    if panels:
        drawn = drawing(panels, "step", described, panel_height=104)
    columns = (Column("step", NUMBERS), *(Column(name, NUMBERS) for name in track.readings))
    rows = [
        Row((number(int(step)), *(number(float(v[i])) for v in track.readings.values())))
        for i, step in enumerate(track.steps)
    ]
    return TrackView(drawn, Table("Measurements", columns, tuple(rows)), _notes(track, log))


def _notes(track: Track, log: LossLog | None) -> tuple[str, ...]:
    spent = f"measuring took {shown(float(track.seconds.sum()))} s in all"
    notes = [f"{counted(len(track), 'measurement')}; {spent}"]
    if LOSS not in track.readings and log is None:
        notes.append(
            "there is no loss to stand beside: name the reading 'loss', or keep transformers' "
            "trainer_state.json in this folder"
        )
    if log is not None:
        notes.append(f"training losses are those of {log.file.name} in {log.file.parent.name}")
    return tuple(notes)


def _readings(track: Track) -> list[str]:
    """Without those that say how sure another is."""
    ends = _BOUNDS + _ERRORS
    return [
        name
        for name in track.readings
        if not any(name.removesuffix(end) in track.readings and name.endswith(end) for end in ends)
    ]


def _panel(track: Track, name: str) -> PanelOf:
    values = _values(track, name)
    taken = np.isfinite(values)
    title = f"{_title(name)}, decades" if name in _DECADES else _title(name)
    low, high = (edge[taken] for edge in _band(track, name))
    curve = Curve(
        title,
        track.steps[taken].astype(float),
        values[taken],
        low,
        high,
        drawn_as="dots",
    )
    return PanelOf(title, [curve])


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _values(track: Track, name: str) -> Floats:
    values = track.readings[name]
    return np.maximum(values, 0.0) if name in _DECADES else values


def _band(track: Track, name: str) -> tuple[Floats, Floats]:
    """The interval around a reading; nan where there is none."""
    values = track.readings[name]
    if f"{name}_low" in track.readings:
        return track.readings[f"{name}_low"], track.readings[f"{name}_high"]
    for end in _ERRORS:
        if name + end in track.readings:
            error = track.readings[name + end]
            return values - error, values + error
    nothing = np.full(len(values), np.nan)
    return nothing, nothing


def _losses(track: Track, log: LossLog | None) -> list[Curve]:
    curves = []
    if LOSS in track.readings:
        values = track.readings[LOSS]
        taken = np.isfinite(values)
        steps = track.steps[taken].astype(float)
        curves.append(Curve("loss on the tracker's batches", steps, values[taken], drawn_as="dots"))
    if log is not None:
        kept = log.training[thinned(len(log.training))]
        curves.append(Curve("training loss", kept[:, 0], kept[:, 1], style=2))
        if len(log.held_out):
            at, held_out = log.held_out.T
            curves.append(Curve("evaluation loss", at, held_out, style=3, drawn_as="crosses"))
    return curves


def track_headline(track: Track) -> Headline:
    """How readings went from the first measurement to the last."""
    if not len(track):
        return Headline("open", "nothing measured", "The journal holds no measurement.")
    steps = f"Steps {int(track.steps[0]):,} to {int(track.steps[-1]):,}"
    went = []
    for name in _readings(track):
        values = _values(track, name)
        known = values[np.isfinite(values)]
        if len(known):
            unit = " decades" if name in _DECADES else ""
            ends = f"{shown(float(known[0]))} → {shown(float(known[-1]))}"
            went.append(f"{_title(name)} {ends}{unit}")
    label = counted(len(track), "measurement")
    reason = sentence(f"{steps}: {'; '.join(went[:2])}")
    rest = (sentence("; ".join(went[2:])),) if went[2:] else ()
    return Headline("plain", label, reason, rest)
