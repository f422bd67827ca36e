"""Learning rates and momenta tried on a grid, all on the same batches.

The grid has half a decade between rates. It is extended while the best lies at an end, and refined
to quarter decades beside the best on request. Runs start with the rate closest to the published
one, so that hopeless ones meet a good rival early.

Letters: G rates, S seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hessian_tools.optimizers.named import OPTIMIZERS
from hessian_tools.results import Journal, registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.training.budget import Budget, budget_of
from hessian_tools.training.loop import CLIP
from hessian_tools.training.runs import MakeModel, Runs, Setting, beyond, grid_of, hopeless
from hessian_tools.training.schedule import Schedule, cosine
from hessian_tools.training.stream import Stream
from hessian_tools.training.trajectory import Floats, Trajectory

WITHIN = 0.05  # of the best loss: what counts as about as good
MOST_EXTENSIONS = 6  # half decades beyond the grid
_QUARTER_DECADE = 10**0.25


@registered
@dataclass(frozen=True, eq=False)
class RateSweep(Tabular, Drawable):
    """The rates tried for one optimizer at one momentum.

    Attributes:
        momentum: None: the optimizer's own.
        num_steps: of every run.
        rates: (G,) ascending.
        losses: (G, S) final losses, smoothed; infinite where a run diverged, and where it was
            stopped what it had come to.
        validations: (G, S) final validation losses; NaN where nothing is held out.
        diverged, stopped: (G, S) how runs ended that did not go to the end.
        best_runs: trajectories at the best rate, one a seed.
    """

    optimizer: str
    momentum: float | None
    num_steps: int
    seeds: tuple[int, ...]
    rates: Floats = field(repr=False)
    losses: Floats = field(repr=False)
    validations: Floats = field(repr=False)
    diverged: NDArray[np.bool_] = field(repr=False)
    stopped: NDArray[np.bool_] = field(repr=False)
    best_runs: tuple[Trajectory, ...] = field(repr=False)

    def records(self) -> list[Record]:
        """A row a rate and seed."""
        return [
            {
                "optimizer": self.optimizer,
                "momentum": self.momentum,
                "steps": self.num_steps,
                "rate": float(rate),
                "seed": seed,
                "loss": float(self.losses[row, column]),
                "validation": float(self.validations[row, column]),
                "diverged": bool(self.diverged[row, column]),
                "stopped": bool(self.stopped[row, column]),
            }
            for row, rate in enumerate(self.rates)
            for column, seed in enumerate(self.seeds)
        ]

    @property
    def mean_losses(self) -> Floats:
        """(G,) over seeds; infinite where any diverged."""
        means: Floats = self.losses.mean(axis=1)
        return means

    @property
    def best(self) -> int:
        """The place of the best rate."""
        return int(np.argmin(self.mean_losses))

    @property
    def best_rate(self) -> float:
        return float(self.rates[self.best])

    @property
    def loss(self) -> float:
        """At the best rate, the mean over seeds."""
        return float(self.mean_losses[self.best])

    @property
    def spread(self) -> float:
        """At the best rate, the standard deviation over seeds; NaN with one seed."""
        return spread(self.losses[self.best])

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond those tried."""
        return self.best in (0, len(self.rates) - 1)

    @property
    def width(self) -> float:
        """Decades of rates around the best whose loss is within 5 % of it, without a gap.

        Between a rate inside and one outside, the loss is taken as linear in the logarithm of the
        rate; towards a rate that diverged, the range ends at the last inside.
        """
        return width(self.rates, self.mean_losses)


def sweep(
    make_model: MakeModel,
    stream: Stream,
    optimizers: Sequence[str],
    *,
    budget: Budget | int | str,
    rates: Mapping[str, Sequence[float]] | None = None,
    momenta: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    refine: bool = False,
    stop_hopeless: bool = True,
    schedule: Schedule = cosine,
    clip: float | None = CLIP,
    z_loss: float = 0.0,
    journal: Journal | None = None,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> tuple[RateSweep, ...]:
    """A :class:`RateSweep` for every optimizer and momentum.

    A run is given up as hopeless by the rule of :func:`hessian_tools.training.runs.hopeless`, its
    rival being the best finished run of the same optimizer, momentum and seed.

    Args:
        make_model: ``make_model(seed)`` -> a fresh model.
        stream: the batches and the loss; the order of the batches follows the seed.
        optimizers: names of ``hessian_tools.optimizers.named.OPTIMIZERS``.
        budget: of one run, in steps.
        rates: by optimizer; default: the published grids.
        momenta: passed to every optimizer as ``momentum``; None: its own.
        seeds: of weights and batches.
        refine: quarter decades beside the best as well.
        stop_hopeless: give up hopeless runs.
        schedule, clip, z_loss: as for ``train``.
        journal: where every run becomes a line; runs that it holds are not run again. A line's name
            tells the optimizer, rate, momentum, seed and steps; all else is the journal's own.
        checkpoint: file for the state of the run under way.

    Raises:
        ValueError: no optimizer, seed or momentum, an unknown optimizer, or a budget in seconds,
            in which not every rate would get the same steps.
    """
    num_steps = _num_steps(budget)
    for what, given in (("optimizers", optimizers), ("seeds", seeds), ("momenta", momenta)):
        if not given:
            raise ValueError(f"{what} is empty; name one or more")
    grids = {name: grid_of(name, rates) for name in optimizers}
    runs = Runs(make_model, stream, schedule, clip, z_loss, journal, checkpoint, progress)
    runs.check(optimizers, seeds[0])
    swept = []
    for name, grid in grids.items():
        for momentum in momenta:
            attempt = _Attempt(runs, name, momentum, num_steps, tuple(seeds), stop_hopeless, {})
            attempt.extended(grid)
            if refine:
                attempt.refined()
            swept.append(attempt.result())
    return tuple(swept)


class _Attempt(NamedTuple):
    """The sweep of one optimizer at one momentum, under way."""

    runs: Runs
    optimizer: str
    momentum: float | None
    num_steps: int
    seeds: tuple[int, ...]
    stop_hopeless: bool
    tried: dict[float, list[Trajectory]]  # by rate, one a seed

    def extended(self, grid: Sequence[float]) -> None:
        """Tries the grid, and more while the best lies at an end of what was tried."""
        published = OPTIMIZERS[self.optimizer].lr
        for rate in sorted(grid, key=lambda rate: abs(math.log(rate / published))):
            self._try(rate)
        for _ in range(MOST_EXTENSIONS):
            rates = sorted(self.tried)
            further = beyond(rates, rates.index(self._best_rate()))
            if further is None:
                return
            self._try(further)

    def refined(self) -> None:
        """Tries the rates a quarter of a decade beside the best."""
        best = self._best_rate()
        self._try(best / _QUARTER_DECADE)
        self._try(best * _QUARTER_DECADE)

    def result(self) -> RateSweep:
        rates = sorted(self.tried)
        runs = [self.tried[rate] for rate in rates]
        return RateSweep(
            self.optimizer,
            self.momentum,
            self.num_steps,
            self.seeds,
            rates=np.array(rates),
            losses=np.array([[run.final for run in row] for row in runs]),
            validations=np.array([[run.final_validation for run in row] for row in runs]),
            diverged=np.array([[run.diverged for run in row] for row in runs]),
            stopped=np.array([[run.stopped for run in row] for row in runs]),
            best_runs=tuple(self.tried[self._best_rate()]),
        )

    def _try(self, rate: float) -> None:
        self.tried[rate] = [self._run(rate, place) for place in range(len(self.seeds))]

    def _run(self, rate: float, place: int) -> Trajectory:
        seed = self.seeds[place]
        setting = Setting(self.optimizer, rate, seed, self.num_steps, momentum=self.momentum)
        rival = self._rival(place) if self.stop_hopeless else None
        return self.runs.run(setting, hopeless(rival) if rival else None)

    def _rival(self, place: int) -> Trajectory | None:
        """The best run to the end with the seed at ``place``."""
        runs = [row[place] for row in self.tried.values() if len(row) > place]
        finished = [run for run in runs if run.steps == run.num_steps and not run.diverged]
        return min(finished, key=lambda run: run.final, default=None)

    def _best_rate(self) -> float:
        return min(sorted(self.tried), key=lambda rate: _mean(self.tried[rate]))


def width(rates: Floats, losses: Floats) -> float:
    """See :attr:`RateSweep.width`; NaN where every rate diverged."""
    best = int(np.argmin(losses))
    if not math.isfinite(losses[best]):
        return math.nan
    limit = losses[best] + WITHIN * abs(losses[best])
    logs = np.log10(rates)
    return _reach(logs, losses, best, 1, limit) + _reach(logs, losses, best, -1, limit)


def spread(losses: Floats) -> float:
    """The standard deviation over seeds; NaN with one seed, or where a run diverged."""
    if len(losses) < 2 or not np.isfinite(losses).all():
        return math.nan
    return float(losses.std(ddof=1))


def _reach(logs: Floats, losses: Floats, best: int, way: int, limit: float) -> float:
    """Decades from the best to where the loss passes ``limit``, upwards (1) or downwards (-1)."""
    place = best
    while 0 <= place + way < len(logs) and losses[place + way] <= limit:
        place += way
    reach = abs(logs[place] - logs[best])
    outside = place + way
    if 0 <= outside < len(logs) and math.isfinite(losses[outside]):
        share = (limit - losses[place]) / (losses[outside] - losses[place])
        reach += share * abs(logs[outside] - logs[place])
    return float(reach)


def _mean(runs: Sequence[Trajectory]) -> float:
    return sum(run.final for run in runs) / len(runs)


def _num_steps(budget: Budget | int | str) -> int:
    given = budget_of(budget)
    if given.steps is None:
        raise ValueError(
            f"a sweep's budget is the steps of one run, such as 500steps, got {given}; races take "
            "seconds"
        )
    return given.steps
