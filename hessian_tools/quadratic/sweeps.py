"""Runs of a method with a step size that is given, known from theory, or found: tuned against tuned.

Named steps, with a the eigenvalues of P^1/2 H P^1/2 for methods w <- w - eta P g (gradient descent: P = I; Adam with
beta2 = 1: P = diag(1 / |g_0|), another for every start):
    "optimal"  2 / (a_min + a_max), the least contraction factor (Polyak 1987, section 1.4); heavy ball
               4 / (sqrt(L) + sqrt(mu))^2, Nesterov 1 / L, with the momenta of their rules
    "safe"     1 / a_max
    "theorem"  min_l C1_l of Adam's upper bound, see :mod:`hessian_tools.quadratic.theory`
    "best"     one for all starts, found by :func:`best_step`

Shapes: N problems, E step sizes, S starts, d coordinates, G step sizes tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.quadratic.methods import settings_of
from hessian_tools.quadratic.preconditioning import extremes, first_gradient_ratios
from hessian_tools.quadratic.problems import Quadratic, draw_starts
from hessian_tools.quadratic.simulation import TOLERANCES, Observer, Runs, simulate
from hessian_tools.results import registered

STEPS = ("optimal", "safe", "theorem", "best")
MOST_DIVERGED = 0.1  # share of runs
_COARSE, _FINE = 3, 5  # step sizes a decade, and between two neighbours in a refinement
_REFINEMENTS, _EXTENSIONS = 2, 3
_SWEPT = 32  # starts of a sweep


@registered
@dataclass(frozen=True, eq=False)
class Sweep:
    """Step sizes tried, ascending, and the best of them.

    The best has the least median of iterations among those at which at most a tenth of the runs diverge (or, where
    there is none, as few as can be), then the least median of the loss left. Without that limit the median alone would
    choose a step at which just under half of the runs diverge.
    """

    method: str
    settings: dict[str, Any]
    tolerance: float
    num_starts: int
    num_steps: int
    steps: np.ndarray = field(repr=False)  # (..., G)
    medians: np.ndarray = field(
        repr=False
    )  # (..., G) iterations to the tolerance, inf if half of the runs need more
    losses: np.ndarray = field(
        repr=False
    )  # (..., G) median of the last f / f(w_0), inf where diverged, 0 where stopped
    diverged: np.ndarray = field(repr=False)  # (..., G) share of the runs that diverged
    best: np.ndarray  # (...)
    at_edge: bool  # the best is the smallest or largest tried, after all extensions: a better one may lie beyond


def run(
    problem: Quadratic, method: str, *, step: Any = "best", num_starts: int = 100, num_steps: int = 10_000,
    seed: int = 0, starts: Any = None, tolerance: float = 1e-6, tolerances: Sequence[float] = TOLERANCES,
    num_recorded: int = 200, tail: int = 0, stop_at: float | None = None, observe: Observer | None = None,
    progress: bool = True, **settings: Any,
) -> Runs:  # fmt: skip
    """Runs of one method from random starts, all at once, on the problem's device, in float64.

    Args:
        method: one of ``METHODS``; ``settings`` are its own (beta1, beta2, eps, ...).
        step: eta, a sequence of E of them (an axis in front of the starts), or one of "optimal", "safe", "theorem" and
            "best" (see the module).
        num_starts: S starts from N(0, I), drawn from ``seed``; or ``starts``, (S, d), (N, S, d) of a batched problem.
        tolerance: what "best" is best for. tolerances: relative losses whose first crossing is watched.
        num_recorded: losses kept of each run, evenly spaced in log t. tail: last iterates kept.
        stop_at: a tolerance after which a run need not go on; losses beyond may be nan.
        observe: sees every loss of every run, see :mod:`hessian_tools.quadratic.simulation`.
    Raises:
        ValueError: for an argument out of range, an unknown method or setting, or a named step the method has not.
    """
    settings = settings_of(method, settings)
    _check_counts(num_starts=num_starts, num_steps=num_steps, num_recorded=num_recorded)
    watched = _tolerances(tolerances, stop_at)
    if not isinstance(tail, int) or tail < 0 or (tail and stop_at is not None):
        raise ValueError(
            f"tail is {tail!r} with stop_at {stop_at}; 0 or more last iterates, without stopping early"
        )
    w0 = _starts(problem, starts, num_starts, seed)
    eta, told = _steps(problem, method, settings, w0, step, num_steps, tolerance, progress)
    found = simulate(
        problem, method, settings, w0, eta, num_steps, tolerances=watched, num_recorded=num_recorded, tail=tail,
        stop_at=stop_at, observe=observe, progress=progress,
    )  # fmt: skip
    many, several = [problem.num_problems] * problem.batched, [eta.shape[1]] * _is_list(step)
    shape = (*many, *several, w0.shape[1])
    kept = {"recorded": found.pop("recorded"), "tolerances": found.pop("tolerances")}
    tails = found.pop("tail")
    arrays = {name: array.reshape(*shape, *array.shape[3:]) for name, array in found.items()}
    ends = tails.reshape(len(tails), *shape, problem.size)
    sizes = eta.expand(-1, -1, w0.shape[1]).reshape(shape).cpu().numpy()
    return Runs(method, settings, told, sizes, num_steps, **kept, **arrays, tail=ends)


def best_step(
    problem: Quadratic, method: str, *, tolerance: float = 1e-6, num_starts: int = _SWEPT, num_steps: int = 10_000,
    seed: int = 0, starts: Any = None, progress: bool = False, **settings: Any,
) -> Sweep:  # fmt: skip
    """The step size with the least median number of iterations to ``tolerance``, one for all starts of a problem.

    A log grid of 3 a decade, from 1e-4 to 100 times 2 / a_max where that is known and from 1e-7 to 10 times the rms of
    the starts' entries elsewhere, extended where the best lies at an end, then refined twice between its neighbours.

    Raises:
        ValueError: as :func:`run`.
    """
    settings = settings_of(method, settings)
    _check_counts(num_starts=num_starts, num_steps=num_steps)
    _tolerances((tolerance,), None)
    w0 = _starts(problem, starts, num_starts, seed)
    unit, lowest, highest = _natural(problem, method, settings, w0)
    factors = 10.0 ** (torch.arange(lowest * _COARSE, highest * _COARSE + 1).double() / _COARSE)
    tried = _Tried(problem, method, settings, w0, num_steps, tolerance, progress)
    tried.add(unit * factors.to(unit))
    for _ in range(_EXTENSIONS):
        if not tried.at_edge():
            break
        ends = 10.0 ** (torch.arange(1, 2 * _COARSE + 1).double() / _COARSE)
        tried.add(
            torch.cat([tried.steps[:, :1] / ends, tried.steps[:, -1:] * ends], dim=1).to(unit)
        )
    for _ in range(_REFINEMENTS):
        tried.add(tried.between(_FINE).to(unit))
    kept = slice(None) if problem.batched else 0
    steps, medians, losses, diverged = (score.numpy()[kept] for score in tried.scores)
    best, edge = np.asarray(tried.best().numpy()[kept]), tried.at_edge()
    return Sweep(
        method,
        settings,
        tolerance,
        w0.shape[1],
        num_steps,
        steps,
        medians,
        losses,
        diverged,
        best,
        edge,
    )


class _Tried:
    """Step sizes that were run, ascending, with their medians, losses and shares diverged: ``scores``, (N, G) each."""

    def __init__(self, problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor, num_steps: int,
                 tolerance: float, progress: bool) -> None:  # fmt: skip
        self.problem, self.method, self.settings, self.starts = problem, method, settings, starts
        self.num_steps, self.tolerance, self.progress = num_steps, tolerance, progress
        self.scores = [torch.empty(problem.num_problems, 0, dtype=torch.float64)] * 4

    @property
    def steps(self) -> Tensor:
        return self.scores[0]

    def add(self, steps: Tensor) -> None:
        s = self.starts.shape[1]
        found = simulate(
            self.problem, self.method, self.settings, self.starts, steps[..., None].expand(-1, -1, s), self.num_steps,
            tolerances=(self.tolerance,), num_recorded=2, stop_at=self.tolerance, progress=self.progress,
        )  # fmt: skip
        left = np.nan_to_num(found["losses"][..., -1], nan=0.0, posinf=np.inf)
        medians = (
            np.quantile(values, 0.5, axis=2, method="inverted_cdf")
            for values in (found["reached"][..., 0], left)
        )
        scores = [
            steps.cpu(),
            *map(torch.from_numpy, (*medians, np.isfinite(found["diverged_at"]).mean(axis=2))),
        ]
        joined = [torch.cat(pair, dim=1) for pair in zip(self.scores, scores, strict=True)]
        order = joined[0].argsort(dim=1)
        self.scores = [part.gather(1, order) for part in joined]

    def index(self) -> Tensor:
        """(N, 1) place of the best."""
        _, medians, losses, diverged = self.scores
        allowed = diverged <= diverged.amin(1, keepdim=True).clamp(min=MOST_DIVERGED)
        medians = torch.where(allowed, medians, math.inf)
        tied = allowed & (medians == medians.amin(1, keepdim=True))
        return torch.where(tied, losses, math.inf).argmin(1, keepdim=True)

    def best(self) -> Tensor:
        return self.steps.gather(1, self.index())[:, 0]

    def at_edge(self) -> bool:
        place = self.index()
        return bool(((place == 0) | (place == self.steps.shape[1] - 1)).any())

    def between(self, count: int) -> Tensor:
        """(N, 2 count) step sizes between the best and its neighbours, evenly in the logarithm."""
        place, last = self.index(), self.steps.shape[1] - 1
        middle = self.steps.gather(1, place).log()
        inner = torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)
        sides = [self.steps.gather(1, (place + side).clamp(0, last)).log() for side in (-1, 1)]
        return torch.cat([middle + inner * (side - middle) for side in sides], dim=1).exp()


def _natural(
    problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor
) -> tuple[Tensor, int, int]:
    """(N, 1) unit of step sizes, and the powers of ten of it that a sweep spans."""
    try:
        _, highest = extremes(problem, method, settings, starts)
        return 2 / highest.median(dim=1, keepdim=True).values, -4, 2
    except ValueError:
        if method in ("heavy_ball", "nesterov"):
            return 2 / problem.largest[:, None], -4, 2
        return starts.square().mean((1, 2)).sqrt()[:, None], -7, 1


def _steps(
    problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor, step: Any, num_steps: int,
    tolerance: float, progress: bool,
) -> tuple[Tensor, str]:  # fmt: skip
    """(N, E, S) step sizes, and how they were chosen."""
    n, s, _ = starts.shape
    if isinstance(step, str):
        if step == "best":
            fewer = starts[:, :_SWEPT] if problem.batched else starts[0, :_SWEPT]
            sweep = best_step(
                problem,
                method,
                tolerance=tolerance,
                num_steps=num_steps,
                starts=fewer,
                progress=progress,
                **settings,
            )
            found = torch.as_tensor(np.reshape(sweep.best, (n, 1)), device=starts.device)
            at_edge = ", at the edge of the steps tried" if sweep.at_edge else ""
            return found[..., None].expand(n, 1, s), f"best of a sweep for {tolerance:g}{at_edge}"
        return _named(problem, method, settings, starts, step)[:, None].expand(n, 1, s), step
    if isinstance(step, bool) or not (isinstance(step, Real) or _is_list(step)):
        raise ValueError(
            f"step is {step!r}; give a number, a sequence of numbers, or one of {', '.join(STEPS)}"
        )
    sizes = torch.as_tensor(step, dtype=torch.float64, device=starts.device).reshape(-1)
    if not len(sizes) or not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise ValueError(f"step is {step!r}; positive finite numbers are needed")
    return sizes[None, :, None].expand(n, len(sizes), s), "given"


def _named(
    problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor, step: str
) -> Tensor:
    """(N, S) or what expands to it."""
    if step not in STEPS:
        raise ValueError(
            f"step is {step!r}; give a number, a sequence of numbers, or one of {', '.join(STEPS)}"
        )
    low, high = problem.smallest[:, None], problem.largest[:, None]
    if step == "optimal" and method == "heavy_ball":
        return 4 / (high.sqrt() + low.sqrt()) ** 2
    if step == "optimal" and method == "nesterov":
        return 1 / high
    if step == "theorem":
        if method != "adam" or not is_theorems(settings):
            raise ValueError(
                "step is 'theorem', which is of adam with beta1 = 0, beta2 = 1 and eps = 0 only"
            )
        return first_gradient_ratios(problem, starts @ problem.hessian)[0].amin(-1)
    low, high = extremes(problem, method, settings, starts)
    return 2 / (low + high) if step == "optimal" else 1 / high


def is_theorems(settings: dict[str, Any]) -> bool:
    """Whether Adam's settings are the theorem's."""
    return (settings["beta1"], settings["beta2"], settings["eps"]) == (0, 1, 0)


def _starts(problem: Quadratic, starts: Any, num_starts: int, seed: int) -> Tensor:
    """(N, S, d) on the problem's device."""
    if starts is None:
        return draw_starts(problem, num_starts, seed)
    given = torch.as_tensor(starts, dtype=torch.float64, device=problem.hessian.device)
    needed = "(N, S, d)" if problem.batched else "(S, d)"
    shaped = given if problem.batched else given[None]
    if shaped.ndim != 3 or (shaped.shape[0], shaped.shape[2]) != (
        problem.num_problems,
        problem.size,
    ):
        raise ValueError(
            f"starts has shape {tuple(given.shape)}; {needed} with N {problem.num_problems}, d {problem.size}"
        )
    if not bool(shaped.isfinite().all()) or not bool((shaped != 0).any(-1).all()):
        raise ValueError(
            "starts holds a start that is zero, the minimum, or not finite; leave it out"
        )
    return shaped


def _tolerances(tolerances: Sequence[float], stop_at: float | None) -> tuple[float, ...]:
    every = tuple(tolerances) + (() if stop_at is None else (stop_at,))
    if not every or not all(0 < t < 1 for t in every):
        raise ValueError(f"tolerances are {every}; relative losses between 0 and 1 are needed")
    return tuple(sorted(set(every), reverse=True))


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; an integer of at least 1 is needed")


def _is_list(step: Any) -> bool:
    return not isinstance(step, str) and np.ndim(step) > 0
