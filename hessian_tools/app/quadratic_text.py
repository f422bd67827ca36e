"""What ``hessian-tools quadratic`` prints: tables, or their numbers as JSON."""

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from hessian_tools.app import report
from hessian_tools.app.report import json_number
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.quadratic.lineup import Standing
from hessian_tools.quadratic.practice import GD_FORMS, BoundCheck
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import Constants
from hessian_tools.spectra.quadrature import Floats

Numbers = dict[str, Any]  # JSON-able
# methods of GD's side and of Adam's; momentum alone is worth much, so like meets like
_DUELS = (
    ("without momentum", ("gd",), ("adam_frozen", "sign")),
    ("with momentum", ("heavy_ball", "nesterov"), ("adam",)),
)


class QuadraticResult(TypedDict):
    """What the command computes and saves."""

    runs: dict[str, Runs]  # by method
    constants: Constants
    checks: tuple[BoundCheck, ...]
    heterogeneity: JSHeterogeneity | None  # None of a single block
    eigenvalues: dict[str, Floats]  # by block


def tables(
    problem: Quadratic,
    result: QuadraticResult,
    places: list[Standing],
    tolerance: float,
) -> str:
    """All tables, one after the other."""
    parts = [
        str(problem),
        methods_table(places, tolerance),
        winner(places),
        theory_table(result["constants"]),
        checks_table(result["checks"]),
    ]
    if result["heterogeneity"] is not None:
        parts.append(report.readings_table({problem.name: result["heterogeneity"]}))
    return "\n\n".join(parts)


def methods_table(places: list[Standing], tolerance: float) -> str:
    """A row a method, fastest first."""
    header = (
        "method",
        "step size",
        "eta",
        f"iterations to {tolerance:g}",
        "quartiles",
        "diverged",
        "times faster than gd",
    )
    rows = []
    for place in places:
        low, middle, high = (_iterations(q) for q in place.quartiles)
        row = [
            place.name,
            place.step,
            f"{place.eta:.3g}",
            middle,
            f"{low} - {high}",
            f"{place.diverged:.0%}",
            f"{place.speedup:.3g}",
        ]
        rows.append(row)
    return report.table(header, rows, left=2)


def _iterations(count: float) -> str:
    return f"{count:,.0f}" if math.isfinite(count) else "not reached"


def winner(places: list[Standing]) -> str:
    """Gradient descent against Adam, without momentum and with it, and by what factor."""
    medians = {place.name: place.quartiles[1] for place in places}
    lines = []
    for kind, of_gd, of_adam in _DUELS:
        gd = _fastest(medians, of_gd)
        adam = _fastest(medians, of_adam)
        if gd and adam:
            lines.append(f"{kind}: {_duel(medians, gd, adam)}.")
    return "\n".join(lines) or f"Fastest: {places[0].name}."


def _fastest(medians: Mapping[str, float], names: tuple[str, ...]) -> str | None:
    """Which of ``names`` needs the fewest iterations, None where none of them ran."""
    ran = [name for name in names if name in medians]
    return min(ran, key=lambda name: medians[name], default=None)


def _duel(medians: Mapping[str, float], one: str, other: str) -> str:
    ahead, behind = sorted((one, other), key=lambda name: medians[name])
    fast, slow = medians[ahead], medians[behind]
    if math.isinf(fast):
        return f"{one} and {other} both do not come to the tolerance; allow more --steps"
    if fast == slow:
        return f"{one} and {other} are even"
    if math.isinf(slow):
        return f"{ahead} beats {behind}, which does not come to the tolerance"
    return f"{ahead} beats {behind}, {slow / fast:.3g} times fewer iterations"


def theory_table(constants: Constants) -> str:
    """The theorems' constants; those of Adam are medians over starts."""
    worst = float(constants.block_kappas.max())
    r = float(np.median(constants.r))
    tight_r = float(np.median(constants.tight_r))
    upper = float(np.median(constants.adam_upper))
    upper_tight = float(np.median(constants.adam_upper_tight))
    lower = constants.gd_lower[0]
    wins = np.mean(constants.adam_wins)
    rows = [
        ["kappa", f"{constants.kappa[0]:.6g}"],
        ["max kappa_l", f"{worst:.6g}"],
        ["r = max C2^2 / min C1^2 (median)", f"{r:.4g}"],
        ["r' = max C2 / min C1 (median)", f"{tight_r:.4g}"],
        ["r max kappa_l (median)", f"{r * worst:.4g}"],
        ["starts with r max kappa_l <= kappa, where theory has Adam win", f"{wins:.0%}"],
        ["GD, factor of f a step, worst start at any step size, at least", f"{lower:.8g}"],
        ["Adam, factor of f a step, at most (median)", f"{upper:.8g}"],
        ["the same by r', squared", f"{upper_tight:.8g}"],
    ]
    return report.table(("theory (Adam: beta1 = 0, beta2 = 1)", "value"), rows)


def checks_table(checks: tuple[BoundCheck, ...]) -> str:
    """A row a bound: steps it was held against, and violations."""
    header = ("bound", "steps judged", "violations", "least margin (log)")
    rows = []
    for check in checks:
        bound = "GD lower bound" if check.name in GD_FORMS else "Adam upper bound"
        row = [
            f"{bound}: {check.name}",
            f"{check.steps:,}",
            f"{check.violations:,}",
            f"{check.margin:.2g}",
        ]
        rows.append(row)
    return report.table(header, rows)


def summary(
    problem: Quadratic,
    result: QuadraticResult,
    places: list[Standing],
) -> Numbers:
    """The numbers of all tables, JSON-able."""
    constants = result["constants"]
    kappas = constants.block_kappas[0].tolist()
    return {
        "problem": {
            "name": problem.name,
            "size": problem.size,
            "kappa": float(constants.kappa[0]),
            "block_kappas": dict(zip(problem.block_names, kappas, strict=True)),
        },
        "methods": [_method_numbers(place) for place in places],
        "winner": winner(places),
        "theory": {
            "r": float(np.median(constants.r)),
            "tight_r": float(np.median(constants.tight_r)),
            "adam_wins_predicted": float(np.mean(constants.adam_wins)),
            "gd_lower": float(constants.gd_lower[0]),
            "adam_upper": float(np.median(constants.adam_upper)),
        },
        "bounds": [_bound_numbers(check) for check in result["checks"]],
        "heterogeneity": _heterogeneity_numbers(result["heterogeneity"]),
    }


def _method_numbers(place: Standing) -> Numbers:
    return {
        "name": place.name,
        "step": place.step,
        "eta": place.eta,
        "quartiles": [json_number(q) for q in place.quartiles],
        "diverged": place.diverged,
        "times_faster_than_gd": json_number(place.speedup),
    }


def _bound_numbers(check: BoundCheck) -> Numbers:
    return {
        "name": check.name,
        "steps": check.steps,
        "violations": check.violations,
        "margin": json_number(check.margin),
    }


def _heterogeneity_numbers(js: JSHeterogeneity | None) -> dict[str, float | str]:
    if js is None:
        return {}
    readings = {name: reading.mean for name, reading in js.readings.items()}
    readings["scale_spread"] = js.scale_spread.value
    return {name: json_number(value) for name, value in readings.items()}
