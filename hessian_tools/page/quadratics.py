"""Runs on a quadratic on the page: standings, theory beside practice, loss curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.page.curves import NOTHING, Curve, Drawing, PanelOf, drawing, thinned
from hessian_tools.page.views import Headline, Table, plain_table
from hessian_tools.page.words import sentence
from hessian_tools.quadratic.lineup import standing_rows, standings, winner
from hessian_tools.quadratic.practice import BoundCheck, check_rows
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import Constants, theory_rows

TOLERANCE = 1e-6
LOWEST = 1e-12  # relative loss that is drawn
_FIRST_STEP = 0.7  # where a log axis of steps shows step 0
_BANDED = ("gd", "adam_frozen")  # whose quartiles are drawn


@dataclass(frozen=True)
class QuadraticView:
    """Tables of the methods, of the theorems' constants and of the bounds, and loss curves."""

    tables: tuple[Table, ...]
    drawing: Drawing


def quadratic_view(
    runs: Mapping[str, Runs],
    tolerance: float,
    exact: Constants | None,
    checks: Sequence[BoundCheck],
) -> QuadraticView:
    """``exact`` None, and no checks: of an interrupted run."""
    places = standings(dict(runs), tolerance)
    header, rows = standing_rows(places, tolerance)
    tables = [plain_table("Methods, the fastest first", header, rows)]
    if exact is not None:
        header = ("theory (Adam: beta1 = 0, beta2 = 1)", "value")
        tables.append(plain_table("Constants of the theorems", header, theory_rows(exact)))
    if checks:
        tables.append(plain_table("Bounds held against every step", *check_rows(checks)))
    return QuadraticView(tuple(tables), _curves(runs))


def quadratic_headline(runs: Mapping[str, Runs], tolerance: float) -> Headline:
    """Gradient descent or Adam."""
    places = standings(dict(runs), tolerance)
    first, *others = winner(places).splitlines()
    label = f"{places[0].name} is fastest"
    return Headline("plain", label, sentence(first), tuple(map(sentence, others)))


def _curves(runs: Mapping[str, Runs]) -> Drawing:
    curves = [_curve(name, some, style) for style, (name, some) in enumerate(runs.items())]
    title = "f / f(start), median over starts (bands: quartiles)"
    panel = PanelOf(title, curves, is_log=True, limits=(LOWEST, 30.0))
    described = f"Relative loss by step of {len(curves)} methods"
    return drawing([panel], "step", described, is_log=True, panel_height=300)


def _curve(name: str, runs: Runs, style: int) -> Curve:
    losses = np.nan_to_num(runs.losses, nan=0.0)
    quartiles = np.quantile(losses, (0.25, 0.5, 0.75), axis=0, method="inverted_cdf")
    known = np.flatnonzero(np.isfinite(quartiles[1]))
    kept = known[thinned(len(known))]
    low, middle, high = np.clip(quartiles[:, kept], LOWEST, 1e3)
    middle = np.where(middle > LOWEST, middle, np.nan)  # which ends the line
    is_banded = name in _BANDED
    return Curve(
        name,
        np.maximum(runs.recorded[kept], _FIRST_STEP).astype(float),
        middle,
        low if is_banded else NOTHING,
        high if is_banded else NOTHING,
        style,
    )


def tolerance_of(runs: Mapping[str, Runs], asked: float | None) -> float:
    """The tolerance that a run was asked for; without one, the usual or the smallest watched."""
    watched = next(iter(runs.values())).tolerances
    wanted = TOLERANCE if asked is None else asked
    is_watched = np.isclose(watched, wanted, rtol=1e-12, atol=0).any()
    return wanted if is_watched else float(watched.min())
