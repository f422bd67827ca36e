"""Curves over one horizontal axis, in one panel or several above each other.

What comes out is what ``templates/drawing.html`` draws: paths, ticks, and the numbers that are read
off under the pointer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hessian_tools.page.scales import Scale, Tick, fitted
from hessian_tools.spectra.quadrature import Floats

WIDTH = 640.0
LEFT, RIGHT = 58.0, 14.0  # margins: ticks' labels, and half a label of the last tick
TOP, BOTTOM = 20.0, 44.0
MOST_POINTS = 160  # of a curve
NUM_STYLES = 11  # of colours and dashes in templates/report.css
NOTHING = np.empty(0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Numbers to draw.

    Attributes:
        label: unique in its panel; curves of one label share colour and legend in all panels.
        x, y: (N,), nan in ``y`` where there is nothing.
        low, high: (N,) of a band around it; empty: none.
        style: number of its colour and dash.
        drawn_as: "line", "dots" (a line with dots) or "crosses".
        strength: from 1 down, of what is to stand back.
    """

    label: str
    x: Floats
    y: Floats
    low: Floats = field(default_factory=lambda: NOTHING)
    high: Floats = field(default_factory=lambda: NOTHING)
    style: int = 0
    drawn_as: str = "line"
    strength: float = 1.0


@dataclass(frozen=True)
class PanelOf:
    """Curves over one vertical axis.

    Attributes:
        levels: horizontal lines, with a word each.
        is_log: None: where that suits.
        limits: of the vertical axis; None: what holds all curves.
    """

    title: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = ()
    is_log: bool | None = None
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class DrawnCurve:
    """A curve in places, as SVG paths.

    ``numbers``: what is read off: x, y (N,) places, and at, values (N,) what they stand for.
    """

    label: str
    style: int
    strength: float
    drawn_as: str
    path: str
    band: str
    marks: str
    numbers: dict[str, list[float]]


@dataclass(frozen=True)
class DrawnPanel:
    """From ``top`` to ``bottom``."""

    title: str
    top: float
    bottom: float
    curves: list[DrawnCurve]
    ticks: list[Tick]
    levels: list[Tick]


@dataclass(frozen=True)
class Drawing:
    """A figure of panels above each other, with one legend."""

    described: str  # for those who do not see it
    x_label: str
    height: float
    panels: list[DrawnPanel]
    ticks: list[Tick]
    width: float = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT

    @property
    def legend(self) -> list[DrawnCurve]:
        """One curve a label, the strongest; none of those that their panel's title names."""
        by_label: dict[str, DrawnCurve] = {}
        for panel in self.panels:
            for curve in panel.curves:
                known = by_label.get(curve.label)
                is_stronger = known is None or curve.strength > known.strength
                if curve.label != panel.title and is_stronger:
                    by_label[curve.label] = curve
        return list(by_label.values())

    @property
    def numbers(self) -> list[dict[str, object]]:
        """What the script reads off, a curve each."""
        curves = [curve for panel in self.panels for curve in panel.curves]
        return [{"label": curve.label, "style": curve.style, **curve.numbers} for curve in curves]


def drawing(
    panels: Sequence[PanelOf],
    x_label: str,
    described: str,
    *,
    is_log: bool = False,
    panel_height: float = 200.0,
) -> Drawing:
    """Lays out ``panels``; ``is_log`` of the horizontal axis."""
    every = [curve.x for panel in panels for curve in panel.curves]
    along = _horizontal(np.concatenate(every), is_log)
    drawn = []
    top = TOP
    for panel in panels:
        drawn.append(_panel(panel, along, top, top + panel_height))
        top += panel_height + TOP + 12
    height = top - TOP - 12 + BOTTOM
    return Drawing(described, x_label, height, drawn, along.ticks(8))


def _horizontal(x: Floats, is_log: bool) -> Scale:
    low, high = float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))
    if low >= high:  # a single place, or none
        return fitted(x, LEFT, WIDTH - RIGHT)
    return Scale(low, high, LEFT, WIDTH - RIGHT, is_log and low > 0)


def _panel(panel: PanelOf, along: Scale, top: float, bottom: float) -> DrawnPanel:
    up = fitted(_heights(panel), bottom, top, panel.is_log)
    if panel.limits:
        up = Scale(*panel.limits, bottom, top, up.is_log)
    levels = [Tick(round(float(up.at(level)), 1), word) for level, word in panel.levels]
    curves = [_curve(curve, along, up) for curve in panel.curves]
    most = max(3, round((bottom - top) / 40))
    return DrawnPanel(panel.title, top, bottom, curves, up.ticks(most), levels)


def _heights(panel: PanelOf) -> Floats:
    """What the vertical axis is to hold: curves and levels, and bands as far as they leave these
    readable."""
    middles = np.concatenate([curve.y for curve in panel.curves])
    middles = np.append(middles, [level for level, _ in panel.levels])
    middles = middles[np.isfinite(middles)]
    edges = np.concatenate([edge for curve in panel.curves for edge in (curve.low, curve.high)])
    if not len(middles):
        return middles
    room = float(np.ptp(middles)) or abs(float(middles[0]))
    is_near = (edges >= middles.min() - room) & (edges <= middles.max() + room)
    return np.concatenate([middles, edges[is_near]])


def _curve(curve: Curve, along: Scale, up: Scale) -> DrawnCurve:
    """A curve that leaves the panel runs along its edge; what is not finite is not drawn."""
    x, y = along.at(curve.x), _inside(up, curve.y)
    known = np.isfinite(x) & np.isfinite(y)
    band = ""
    if len(curve.low):
        band = band_path(x, _inside(up, curve.low), _inside(up, curve.high))
    numbers = {
        "x": np.round(x[known], 1).tolist(),
        "y": np.round(y[known], 1).tolist(),
        "at": [float(f"{value:.9g}") for value in curve.x[known]],
        "values": [float(f"{value:.4g}") for value in curve.y[known]],
    }
    marks = _marks(curve.drawn_as, numbers["x"], numbers["y"])
    path = line_path(x, y)
    return DrawnCurve(
        curve.label,
        curve.style % NUM_STYLES,
        curve.strength,
        curve.drawn_as,
        path,
        band,
        marks,
        numbers,
    )


def _marks(drawn_as: str, x: Sequence[float], y: Sequence[float]) -> str:
    """Points without length, which round caps make dots of, or crosses."""
    pairs = zip(x, y, strict=True)
    if drawn_as == "crosses":
        return "".join(f"M{a - 3:g} {b - 3:g}l6 6m0-6l-6 6" for a, b in pairs)
    return "".join(f"M{a:g} {b:g}h0" for a, b in pairs) if drawn_as == "dots" else ""


def _inside(up: Scale, values: Floats) -> Floats:
    finite = np.where(np.isfinite(values), values, np.nan)
    return up.at(np.clip(finite, up.low, up.high))


def line_path(x: Floats, y: Floats) -> str:
    """An SVG path through the points, broken where ``y`` is nan."""
    pieces = []
    is_down = False
    for place, height in zip(np.round(x, 1).tolist(), np.round(y, 1).tolist(), strict=True):
        if not (np.isfinite(place) and np.isfinite(height)):
            is_down = False
            continue
        pieces.append(f"{'L' if is_down else 'M'}{place:g} {height:g}")
        is_down = True
    return "".join(pieces)


def band_path(x: Floats, low: Floats, high: Floats) -> str:
    """A closed path between two curves, where both are known."""
    known = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return ""
    around = np.concatenate([x[known], x[known][::-1]])
    edge = np.concatenate([low[known], high[known][::-1]])
    return f"{line_path(around, edge)}Z"


def thinned(length: int, most: int = MOST_POINTS, is_log: bool = False) -> list[int]:
    """Places of at most ``most`` of ``length`` points, both ends among them."""
    if length <= most:
        return list(range(length))
    spaced = np.geomspace(1, length, most) - 1 if is_log else np.linspace(0, length - 1, most)
    places: list[int] = np.unique(np.round(spaced).astype(int)).tolist()
    return places
