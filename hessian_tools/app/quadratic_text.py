"""What ``hessian-tools quadratic`` prints: tables, or their numbers as JSON."""

from typing import TypedDict

import numpy as np

from hessian_tools.app import report
from hessian_tools.app.report import json_number
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.quadratic.lineup import Standing, standing_rows, winner
from hessian_tools.quadratic.practice import BoundCheck, check_rows
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import Constants, theory_rows
from hessian_tools.results import JsonObject
from hessian_tools.spectra.quadrature import Floats
from hessian_tools.tables import table

Numbers = JsonObject


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
        table(*standing_rows(places, tolerance), left=2),
        winner(places),
        table(("theory (Adam: beta1 = 0, beta2 = 1)", "value"), theory_rows(result["constants"])),
        table(*check_rows(result["checks"])),
    ]
    if result["heterogeneity"] is not None:
        parts.append(report.readings_table({problem.name: result["heterogeneity"]}))
    return "\n\n".join(parts)


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
