"""The best step size of a method, found by trying: tuned methods are compared with tuned methods.

Shapes: N problems, S starts, d coordinates, G step sizes tried.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hessian_tools.quadratic.methods import Settings
from hessian_tools.quadratic.plan import Plan, planned
from hessian_tools.quadratic.preconditioning import fixed_preconditioner
from hessian_tools.quadratic.problems import Quadratic, starts_of
from hessian_tools.quadratic.simulation import simulate
from hessian_tools.quadratic.steps import natural_range
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Floats

MOST_DIVERGED = 0.1  # share of runs
STARTS_OF_A_SWEEP = 32
_PER_DECADE = 3  # step sizes of the first grid
_BETWEEN = 5  # step sizes between two neighbours in a refinement
_REFINEMENTS = 2  # at least
_MOST_REFINEMENTS = 6
_EXTENSIONS = 3
_SCAN = 150_000  # steps of all step sizes of a scan together, from one start
_MOST_SCANNED = 2400  # step sizes
_CLOSER = 2  # further scans around the best of the one before
_CANDIDATES = 12  # step sizes of a scan that are run to the end


@registered
@dataclass(frozen=True, eq=False)
class Sweep:
    """Step sizes tried, ascending, and the best of them.

    The best has the least median of iterations among those at which at most a tenth of the runs
    diverge (or, where there is none, as few as can be), then the least median of the loss left.
    Without that limit the median alone would choose a step at which just under half of the runs
    diverge.
    """

    method: str
    settings: Settings
    tolerance: float
    num_starts: int
    num_steps: int
    steps: Floats = field(repr=False)  # (..., G)
    # (..., G) median iterations to the tolerance, inf if half of the runs need more
    medians: Floats = field(repr=False)
    # (..., G) median of the last f / f(w_0), inf where diverged, 0 where stopped
    losses: Floats = field(repr=False)
    diverged: Floats = field(repr=False)  # (..., G) share of the runs that diverged
    best: Floats  # (...)
    # the best is the smallest or largest tried, after all extensions: a better may lie beyond
    at_edge: bool


def best_step(
    problem: Quadratic,
    method: str,
    *,
    tolerance: float = 1e-6,
    num_starts: int = STARTS_OF_A_SWEEP,
    num_steps: int = 10_000,
    seed: int = 0,
    starts: ArrayLike | None = None,
    progress: bool = False,
    **settings: object,
) -> Sweep:
    """The step size with the least median of iterations to ``tolerance``, one for all starts.

    Tries a log grid of 3 a decade, from 1e-4 to 100 times 2 / a_max where that is known and from
    1e-7 to 10 times the rms of the starts' entries elsewhere. The grid is extended where the best
    lies at an end.

    With a fixed preconditioner the loss after t steps is a convex function of the step size, so
    that one valley is left. Other methods (momentum, Adam) oscillate, and their iterations have
    many dips: up to 2,400 step sizes over the whole range, then more around the best of them, are
    run for as many steps as the best needs so far, and the winners are run to the end.

    At last it is refined between the best and its neighbours until these are so close that they
    differ by less than an iteration.

    Raises:
        ValueError: as :func:`hessian_tools.quadratic.runs.run`.
    """
    plan = planned(
        method,
        settings,
        num_steps,
        tolerances=(tolerance,),
        num_recorded=2,
        stop_at=tolerance,
    )
    w0 = starts_of(problem, starts, num_starts, seed)
    unit, lowest, highest = natural_range(problem, plan, w0)

    def tried(steps: Tensor) -> "_Tried":
        return _try(problem, plan, w0, steps.to(unit), progress)

    so_far = tried(unit * _grid(lowest, highest).to(unit))
    for _ in range(_EXTENSIONS):
        if not so_far.at_edge():
            break
        so_far = so_far.merged(tried(so_far.beyond()))
    if fixed_preconditioner(problem, method, plan.settings, w0[:, :1]) is None:
        so_far = so_far.merged(tried(_scanned(problem, plan, w0, so_far)))
    for number in range(_MOST_REFINEMENTS):
        if number >= _REFINEMENTS and so_far.is_fine():
            break
        so_far = so_far.merged(tried(so_far.between()))
    kept = slice(None) if problem.batched else 0
    return Sweep(
        method,
        plan.settings,
        tolerance,
        w0.shape[1],
        num_steps,
        steps=so_far.steps.numpy()[kept],
        medians=so_far.medians.numpy()[kept],
        losses=so_far.losses.numpy()[kept],
        diverged=so_far.diverged.numpy()[kept],
        best=np.asarray(so_far.best().numpy()[kept]),
        at_edge=so_far.at_edge(),
    )


class _Tried(NamedTuple):
    """Step sizes that were run, ascending, (N, G), with what became of their runs."""

    steps: Tensor
    medians: Tensor  # of iterations to the tolerance
    losses: Tensor  # medians of the last f / f(w_0)
    diverged: Tensor  # shares of runs

    def merged(self, other: "_Tried") -> "_Tried":
        joined = [torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)]
        order = joined[0].argsort(dim=1)
        return _Tried(*(part.gather(1, order) for part in joined))

    def place(self) -> Tensor:
        """(N, 1) index of the best."""
        # where every step has more than a tenth diverge, the fewest that any has
        limit = self.diverged.amin(1, keepdim=True).clamp(min=MOST_DIVERGED)
        allowed = self.diverged <= limit
        medians = torch.where(allowed, self.medians, math.inf)
        tied = allowed & (medians == medians.amin(1, keepdim=True))
        return torch.where(tied, self.losses, math.inf).argmin(1, keepdim=True)

    def best(self) -> Tensor:
        """(N,)."""
        return self.steps.gather(1, self.place())[:, 0]

    def at_edge(self) -> bool:
        place = self.place()
        return bool(((place == 0) | (place == self.steps.shape[1] - 1)).any())

    def least(self) -> Tensor:
        """(N,) the median of iterations at the best."""
        return self.medians.gather(1, self.place())[:, 0]

    def leading(self, count: int) -> Tensor:
        """(N, count) the step sizes with the least medians, where few runs diverge."""
        allowed = self.diverged <= MOST_DIVERGED
        medians = torch.where(allowed, self.medians, math.inf)
        order = medians.argsort(dim=1, stable=True)
        return self.steps.gather(1, order[:, :count])

    def is_fine(self) -> bool:
        """Whether the steps beside the best differ from it by less than half an iteration."""
        last = self.steps.shape[1] - 1
        place = self.place()
        logs = self.steps.log()
        ends = [logs.gather(1, (place + side).clamp(0, last)) for side in (-1, 1)]
        # iterations change as the step size does
        widths = (ends[1] - ends[0])[:, 0] / 2
        least = self.least()
        return bool((least.isinf() | (widths * least < 0.5)).all())

    def beyond(self) -> Tensor:
        """Two more decades of the grid at both ends."""
        factors = _grid(0, 2)[1:]
        return torch.cat([self.steps[:, :1] / factors, self.steps[:, -1:] * factors], dim=1)

    def between(self) -> Tensor:
        """Step sizes between the best and its two neighbours, evenly in the logarithm."""
        place = self.place()
        last = self.steps.shape[1] - 1
        middle = self.steps.gather(1, place).log()
        fractions = torch.arange(1, _BETWEEN + 1, dtype=torch.float64) / (_BETWEEN + 1)
        sides = []
        # a best at an end has one neighbour: the other side repeats the best, which costs little
        for side in (-1, 1):
            neighbour = self.steps.gather(1, (place + side).clamp(0, last)).log()
            sides.append(middle + fractions * (neighbour - middle))
        return torch.cat(sides, dim=1).exp()


def _scanned(problem: Quadratic, plan: Plan, starts: Tensor, so_far: _Tried) -> Tensor:
    """(N, _CANDIDATES) the most promising of many step sizes in the range of ``so_far``.

    They are run for no more steps than the best so far needs, as only fewer are of interest.
    """
    limit = _limit(so_far, plan)
    count = max(_CANDIDATES, min(_MOST_SCANNED, _SCAN // limit))
    ends = so_far.steps.log()[:, [0, -1]]
    spacing = (ends[:, 1:] - ends[:, :1]) / (count - 1)
    logs = ends[:, :1] + spacing * torch.arange(count)

    def tried(logs: Tensor) -> _Tried:
        short = replace(plan, num_steps=limit)
        return _try(problem, short, starts, logs.exp().to(starts.device), progress=False)

    scanned = tried(logs)
    for _ in range(_CLOSER):
        limit = min(limit, _limit(scanned, plan))
        middles = scanned.leading(max(1, count // 8)).log()
        offsets = torch.tensor([-2, -1, 1, 2]) / _BETWEEN * spacing[..., None]
        scanned = scanned.merged(tried((middles[..., None] + offsets).flatten(1)))
        spacing = spacing / _BETWEEN
    return scanned.leading(_CANDIDATES)


def _limit(so_far: _Tried, plan: Plan) -> int:
    """The most iterations that the best step size of any problem needs."""
    least = float(so_far.least().max())
    return plan.num_steps if math.isinf(least) else int(least)


def _grid(lowest: int, highest: int) -> Tensor:
    """(G,) from 10^lowest to 10^highest, evenly in the logarithm."""
    exponents = torch.arange(lowest * _PER_DECADE, highest * _PER_DECADE + 1).double()
    return 10.0 ** (exponents / _PER_DECADE)


def _try(
    problem: Quadratic,
    plan: Plan,
    starts: Tensor,
    steps: Tensor,
    progress: bool,
) -> _Tried:
    """Runs every step size (N, G) from all starts."""
    eta = steps[..., None].expand(-1, -1, starts.shape[1])
    runs = simulate(problem, plan, starts, eta, progress=progress)
    # a run that stopped early came to the tolerance: it has no last loss, which counts as 0
    left = np.nan_to_num(runs["losses"][..., -1], nan=0.0, posinf=np.inf)
    return _Tried(
        steps.cpu(),
        torch.from_numpy(_median(runs["reached"][..., 0])),
        torch.from_numpy(_median(left)),
        torch.from_numpy(np.isfinite(runs["diverged_at"]).mean(axis=2)),
    )


def _median(values: Floats) -> Floats:
    """(N, G) medians over starts that are runs' own values, as inf cannot be averaged."""
    return np.quantile(values, 0.5, axis=2, method="inverted_cdf")
