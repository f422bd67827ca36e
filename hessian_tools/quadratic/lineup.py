"""The methods that are usually compared, each with its step size, and their runs on one problem."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hessian_tools.quadratic.methods import Settings
from hessian_tools.quadratic.plan import TOLERANCES
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import Runs, run

# Kingma & Ba, arXiv 1412.6980
TEXTBOOK: Settings = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "bias_correction": True,
}
# name -> method, settings, step size from theory where there is one
LINEUP: dict[str, tuple[str, Settings, str]] = {
    "gd": ("gd", {}, "optimal"),
    "heavy_ball": ("heavy_ball", {}, "optimal"),
    "nesterov": ("nesterov", {}, "optimal"),
    "blockwise_gd": ("blockwise_gd", {}, "optimal"),
    "jacobi": ("jacobi", {}, "optimal"),
    "adam_frozen": ("adam", {}, "safe"),
    "adam_mini_frozen": ("adam_mini", {}, "safe"),
    "adam": ("adam", TEXTBOOK, "best"),
    "adagrad": ("adagrad", {}, "best"),
    "sign": ("sign", {}, "best"),
}
# methods of GD's side and of Adam's; momentum alone is worth much, so like meets like
_DUELS = (
    ("without momentum", ("gd",), ("adam_frozen", "sign")),
    ("with momentum", ("heavy_ball", "nesterov"), ("adam",)),
)


@dataclass(frozen=True)
class Standing:
    """One method's place: quartiles over starts of its iterations to the tolerance."""

    name: str
    step: str  # how its step size was chosen
    eta: float  # median over starts
    quartiles: tuple[float, float, float]  # inf where more are needed than were made
    diverged: float  # share of runs
    speedup: float  # GD's median over this one's; nan where neither came to the tolerance


def compare(
    problem: Quadratic,
    names: Iterable[str] = tuple(LINEUP),
    *,
    tuned: bool = False,
    num_starts: int = 100,
    num_steps: int = 20_000,
    tolerance: float = 1e-6,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Runs]:
    """Runs of every method of ``names`` (of ``LINEUP``) from the same starts.

    ``tuned``: every method has the best step of a sweep, not only those without a step from theory.

    Raises:
        ValueError: for an unknown name, or what :func:`hessian_tools.quadratic.run` refuses.
    """
    chosen = list(names)
    unknown = [name for name in chosen if name not in LINEUP]
    if unknown or not chosen:
        raise ValueError(f"names is {chosen}; choose among {', '.join(LINEUP)}")
    tolerances = sorted({*TOLERANCES, tolerance}, reverse=True)
    runs = {}
    for name in chosen:
        method, settings, step = LINEUP[name]
        runs[name] = run(
            problem,
            method,
            step="best" if tuned else step,
            num_starts=num_starts,
            num_steps=num_steps,
            seed=seed,
            tolerance=tolerance,
            tolerances=tolerances,
            progress=progress,
            **settings,
        )
    return runs


def standings(runs: dict[str, Runs], tolerance: float = 1e-6) -> list[Standing]:
    """The methods of one problem in order of their medians.

    ``speedup`` compares with the method named "gd"; it is nan where there is none.
    """
    reference = float(runs["gd"].median_iterations(tolerance)) if "gd" in runs else math.nan
    places = [_standing(name, some, tolerance, reference) for name, some in runs.items()]
    return sorted(places, key=lambda place: place.quartiles[1])


def _standing(name: str, runs: Runs, tolerance: float, reference: float) -> Standing:
    low, middle, high = (float(q) for q in runs.quantiles(tolerance))
    neither_arrives = math.isinf(reference) and math.isinf(middle)
    return Standing(
        name,
        runs.step,
        eta=float(np.median(runs.steps)),
        quartiles=(low, middle, high),
        diverged=float(runs.diverged.mean()),
        speedup=math.nan if neither_arrives else reference / max(middle, 1.0),
    )


def standing_rows(
    places: list[Standing],
    tolerance: float,
) -> tuple[tuple[str, ...], list[list[str]]]:
    """The places as a table, header and rows."""
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
    return header, rows


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
