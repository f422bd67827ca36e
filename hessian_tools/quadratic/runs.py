"""Runs of one method with step sizes that are given, known from theory, or found by a sweep.

Shapes: N problems, E step sizes, S starts, d coordinates, T recorded steps, K tolerances, P last
iterates. ``...`` is (N,) of a batched problem, (E,) of several step sizes, and (S,).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hessian_tools.quadratic.methods import Settings
from hessian_tools.quadratic.plan import TOLERANCES, Observer, Plan, planned
from hessian_tools.quadratic.problems import Quadratic, starts_of
from hessian_tools.quadratic.simulation import simulate
from hessian_tools.quadratic.steps import Step, given_steps, is_sequence, named_steps
from hessian_tools.quadratic.sweeps import STARTS_OF_A_SWEEP, best_step
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Floats


@registered
@dataclass(frozen=True, eq=False)
class Runs:
    """What became of the runs; ``...`` is explained in :mod:`hessian_tools.quadratic.runs`."""

    method: str
    settings: Settings
    step: str  # how the step size was chosen
    steps: Floats  # (...) eta of each run
    num_steps: int
    first_losses: Floats = field(repr=False)  # (...) f(w_0)
    recorded: NDArray[np.int_] = field(repr=False)  # (T,) steps whose losses are kept, 0 first
    # (..., T) f / f(w_0); inf once diverged, nan where the run was stopped
    losses: Floats = field(repr=False)
    tolerances: Floats = field(repr=False)  # (K,)
    # (..., K) first step with f / f(w_0) <= tolerance, inf where never
    reached: Floats = field(repr=False)
    # (...) step at which the run was taken out, inf where it was not
    diverged_at: Floats = field(repr=False)
    final: Floats = field(repr=False)  # (..., d) the last iterate, zero where the run diverged
    tail: Floats = field(repr=False)  # (P, ..., d) the last P iterates that were asked for

    @property
    def diverged(self) -> NDArray[np.bool_]:
        """(...) whether the run diverged."""
        return np.isfinite(self.diverged_at)

    def iterations_to(self, tolerance: float) -> Floats:
        """(...) first step with f / f(w_0) <= ``tolerance``, inf where never.

        Raises:
            ValueError: for a tolerance that the run did not watch.
        """
        # 1e-6 and 10.0**-6 differ in the last digit
        places = np.flatnonzero(np.isclose(self.tolerances, tolerance, rtol=1e-12, atol=0))
        if not len(places):
            watched = ", ".join(f"{t:g}" for t in self.tolerances)
            raise ValueError(
                f"tolerance is {tolerance}; the run watched {watched}; "
                "pass tolerances= with yours to it"
            )
        return self.reached[..., places[0]]

    def quantiles(
        self,
        tolerance: float,
        probabilities: Sequence[float] = (0.25, 0.5, 0.75),
    ) -> Floats:
        """(len(probabilities), ...) quantiles over starts of ``iterations_to``.

        They are runs' own values: inf where too few runs came to ``tolerance``.
        """
        iterations = self.iterations_to(tolerance)
        return np.quantile(iterations, probabilities, axis=-1, method="inverted_cdf")

    def median_iterations(self, tolerance: float) -> Floats:
        """(...) median over starts of ``iterations_to``."""
        return self.quantiles(tolerance, (0.5,))[0]


def run(
    problem: Quadratic,
    method: str,
    *,
    step: Step = "best",
    num_starts: int = 100,
    num_steps: int = 10_000,
    seed: int = 0,
    starts: ArrayLike | None = None,
    tolerance: float = 1e-6,
    tolerances: Sequence[float] = TOLERANCES,
    num_recorded: int = 200,
    tail: int = 0,
    stop_at: float | None = None,
    observe: Observer | None = None,
    progress: bool = True,
    **settings: object,
) -> Runs:
    """Runs one method from random starts, all at once, on the problem's device, in float64.

    Args:
        method: one of ``METHODS``; ``settings`` are its own (beta1, beta2, eps, ...).
        step: eta, a sequence of E of them (an axis in front of the starts), or one of "optimal",
            "safe", "theorem" and "best", see :mod:`hessian_tools.quadratic.steps`.
        num_starts: S starts from N(0, I), drawn from ``seed``.
        starts: instead of drawn ones, (S, d), or (N, S, d) for a batched problem.
        tolerance: what "best" is best for.
        tolerances: relative losses whose first crossing is watched.
        num_recorded: losses kept of each run, evenly spaced in log t.
        tail: last iterates kept.
        stop_at: a tolerance after which a run need not go on; losses beyond may be nan.
        observe: sees every loss of every run, see :mod:`hessian_tools.quadratic.plan`.
    Raises:
        ValueError: for an argument out of range, an unknown method or setting, or a named step that
            the method does not have.
    """
    plan = planned(
        method,
        settings,
        num_steps,
        tolerances=tolerances,
        num_recorded=num_recorded,
        tail=tail,
        stop_at=stop_at,
        observe=observe,
    )
    w0 = starts_of(problem, starts, num_starts, seed)
    eta, chosen = _chosen_steps(problem, plan, w0, step, tolerance, progress)
    arrays = simulate(problem, plan, w0, eta, progress=progress)
    shape = _result_shape(problem, eta, w0, step)
    last = arrays.pop("tail")
    return Runs(
        method,
        plan.settings,
        chosen,
        eta.expand(-1, -1, w0.shape[1]).reshape(shape).cpu().numpy(),
        num_steps,
        recorded=plan.recorded,
        tolerances=np.array(plan.tolerances),
        tail=last.reshape(len(last), *shape, problem.size),
        **{name: array.reshape(*shape, *array.shape[3:]) for name, array in arrays.items()},
    )


def _chosen_steps(
    problem: Quadratic,
    plan: Plan,
    starts: Tensor,
    step: Step,
    tolerance: float,
    progress: bool,
) -> tuple[Tensor, str]:
    """(N, E, S) step sizes, and how they were chosen."""
    n, s, _ = starts.shape
    if isinstance(step, str) and step == "best":
        return _swept_steps(problem, plan, starts, tolerance, progress)
    if isinstance(step, str):
        return named_steps(problem, plan, starts, step)[:, None].expand(n, 1, s), step
    sizes = given_steps(step, starts.device)
    return sizes[None, :, None].expand(n, len(sizes), s), "given"


def _swept_steps(
    problem: Quadratic,
    plan: Plan,
    starts: Tensor,
    tolerance: float,
    progress: bool,
) -> tuple[Tensor, str]:
    """(N, 1, S) the best step size of each problem, found on some of the starts."""
    n, s, _ = starts.shape
    some = starts[:, :STARTS_OF_A_SWEEP]
    sweep = best_step(
        problem,
        plan.method,
        tolerance=tolerance,
        num_steps=plan.num_steps,
        starts=some if problem.batched else some[0],
        progress=progress,
        **plan.settings,
    )
    best = torch.as_tensor(np.reshape(sweep.best, (n, 1, 1)), device=starts.device)
    at_edge = ", at the edge of the steps tried" if sweep.at_edge else ""
    return best.expand(n, 1, s), f"best of a sweep for {tolerance:g}{at_edge}"


def _result_shape(
    problem: Quadratic,
    eta: Tensor,
    starts: Tensor,
    step: Step,
) -> tuple[int, ...]:
    """(...) of the results: axes of problems and step sizes only where there may be several."""
    shape = [starts.shape[1]]
    if is_sequence(step):
        shape.insert(0, eta.shape[1])
    if problem.batched:
        shape.insert(0, problem.num_problems)
    return tuple(shape)
