"""The methods that are usually held against each other, each with its step size, and their runs on one problem."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.simulation import TOLERANCES, Runs
from hessian_tools.quadratic.sweeps import run

TEXTBOOK = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "bias_correction": True,
}  # Kingma & Ba, arXiv 1412.6980
# name -> method, settings, step size from theory where there is one
LINEUP: dict[str, tuple[str, dict[str, Any], str]] = {
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


@dataclass(frozen=True)
class Standing:
    """One method's place: quartiles over starts of the iterations to the tolerance, and the factor to GD."""

    name: str
    step: str  # how its step size was chosen
    eta: float  # median over starts
    quartiles: tuple[float, float, float]  # inf where more are needed than were made
    diverged: float  # share of runs
    speedup: float  # GD's median over this one's; nan where neither came to the tolerance


def compare(
    problem: Quadratic, names: Iterable[str] = tuple(LINEUP), *, tuned: bool = False, num_starts: int = 100,
    num_steps: int = 20_000, tolerance: float = 1e-6, seed: int = 0, progress: bool = True,
) -> dict[str, Runs]:  # fmt: skip
    """Runs of every method of ``names`` (of ``LINEUP``) from the same starts.

    ``tuned``: every method has the best step of a sweep, not only those without a step from theory.

    Raises:
        ValueError: for an unknown name, or what :func:`hessian_tools.quadratic.run` refuses.
    """
    chosen, found = list(names), {}
    unknown = [name for name in chosen if name not in LINEUP]
    if unknown or not chosen:
        raise ValueError(f"names is {chosen}; choose among {', '.join(LINEUP)}")
    tolerances = sorted({*TOLERANCES, tolerance}, reverse=True)
    for name in chosen:
        method, settings, step = LINEUP[name]
        found[name] = run(
            problem, method, step="best" if tuned else step, num_starts=num_starts, num_steps=num_steps, seed=seed,
            tolerance=tolerance, tolerances=tolerances, progress=progress, **settings,
        )  # fmt: skip
    return found


def standings(runs: dict[str, Runs], tolerance: float = 1e-6) -> list[Standing]:
    """The methods of one problem in order of their medians; GD, named "gd", is what ``speedup`` compares with."""
    reference = float(runs["gd"].median_iterations(tolerance)) if "gd" in runs else math.nan
    found = []
    for name, of in runs.items():
        low, middle, high = (float(q) for q in of.quantiles(tolerance))
        factor = (
            math.nan
            if math.isinf(reference) and math.isinf(middle)
            else reference / max(middle, 1.0)
        )
        eta = float(np.median(of.steps))
        found.append(
            Standing(name, of.step, eta, (low, middle, high), float(of.diverged.mean()), factor)
        )
    return sorted(found, key=lambda place: place.quartiles[1])
