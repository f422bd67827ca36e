"""A short tuned race: every optimizer at its best rate, found by successive halving.

For one batch size all runs of the last round take T steps. The first round tries an optimizer's
whole grid at T/8 steps (and half decades beyond it while the best lies at an end), the second the
better half at T/4, the third the better quarter at T/2, and the last the best two at T, with every
seed. Each round runs the whole schedule from the start, so that losses of one round are comparable.

Letters: G rates, S seeds.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hessian_tools.results import Journal, registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.training.budget import Budget, budget_of
from hessian_tools.training.loop import CLIP
from hessian_tools.training.runs import MakeModel, Runs, Setting, beyond, grid_of
from hessian_tools.training.schedule import Schedule, cosine
from hessian_tools.training.stream import Stream
from hessian_tools.training.sweeps import spread
from hessian_tools.training.trajectory import Floats, Trajectory

ROUNDS = 3  # before the last: each halves the rates and doubles the steps
FINALISTS = 2  # rates
LEAST_STEPS = 8  # of a run of the first round
MOST_EXTENSIONS = 4  # half decades beyond the grid
_FOR_RUNS = 0.8  # of the seconds; the rest is for validation and for rates beyond the grid


@registered
@dataclass(frozen=True, eq=False)
class RaceRound:
    """The rates of one optimizer that one round tried: with the first seed, in the last with all.

    Attributes: ``num_steps`` of a run; ``rates`` (G,) ascending; ``losses`` (G,) final, smoothed,
    mean over seeds, infinite where a run ``diverged`` (G,).
    """

    num_steps: int
    rates: Floats
    losses: Floats
    diverged: NDArray[np.bool_]


@registered
@dataclass(frozen=True, eq=False)
class RaceEntry:
    """One optimizer at one batch size.

    Attributes:
        batch_size: None: batches as they are.
        num_steps: T.
        rate: the best.
        losses: (S,) final losses at the best rate, smoothed; infinite where a run diverged.
        validations: (S,) final validation losses; NaN where nothing is held out.
        level: the largest mean loss at the end among the optimizers that did not diverge.
        steps_to_level: until the smoothed loss, mean over seeds, is at the level; None if never.
        state_bytes: of the optimizer.
        seconds_a_step: of the runs at the best rate.
        at_edge: whether a better rate may lie beyond those tried.
        rounds: what each round tried.
        runs: trajectories at the best rate, one a seed.
    """

    optimizer: str
    batch_size: int | None
    num_steps: int
    rate: float
    losses: Floats
    validations: Floats
    level: float
    steps_to_level: int | None
    state_bytes: int
    seconds_a_step: float
    at_edge: bool
    rounds: tuple[RaceRound, ...] = field(repr=False)
    runs: tuple[Trajectory, ...] = field(repr=False)

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return float(self.losses.mean())

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; NaN with one."""
        return spread(self.losses)


@registered
@dataclass(frozen=True, eq=False)
class Race(Tabular, Drawable):
    """All optimizers at all batch sizes.

    Attributes: ``described`` the data in words; ``budget`` as given, in words; ``seconds`` of all
    runs together.
    """

    described: str
    budget: str
    seeds: tuple[int, ...]
    entries: tuple[RaceEntry, ...]
    seconds: float

    def records(self) -> list[Record]:
        """A row an optimizer and batch size."""
        return [
            {
                "optimizer": entry.optimizer,
                "batch_size": entry.batch_size,
                "steps": entry.num_steps,
                "rate": entry.rate,
                "loss": entry.loss,
                "spread": entry.spread,
                "validation": float(entry.validations.mean()),
                "steps_to_level": entry.steps_to_level,
                "seconds_a_step": entry.seconds_a_step,
                "state_bytes": entry.state_bytes,
            }
            for size in self.batch_sizes
            for entry in self.ranking(size)
        ]

    @property
    def batch_sizes(self) -> tuple[int | None, ...]:
        return tuple(dict.fromkeys(entry.batch_size for entry in self.entries))

    def ranking(self, batch_size: int | None) -> tuple[RaceEntry, ...]:
        """The entries of a batch size, the lowest loss first."""
        entries = [entry for entry in self.entries if entry.batch_size == batch_size]
        return tuple(sorted(entries, key=lambda entry: entry.loss))

    @property
    def leaders(self) -> dict[int | None, str]:
        """The optimizer with the lowest loss, by batch size."""
        return {size: self.ranking(size)[0].optimizer for size in self.batch_sizes}


def race(
    make_model: MakeModel,
    stream: Stream,
    optimizers: Sequence[str],
    *,
    budget: Budget | int | str,
    batch_sizes: Sequence[int] | None = None,
    seeds: Sequence[int] = (0,),
    rates: Mapping[str, Sequence[float]] | None = None,
    schedule: Schedule = cosine,
    clip: float | None = CLIP,
    z_loss: float = 0.0,
    journal: Journal | None = None,
    checkpoint: Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Race:
    """The race of ``optimizers`` on the same batches.

    Args:
        make_model: ``make_model(seed)`` -> a fresh model.
        stream: the batches and the loss; the order of the batches follows the seed.
        optimizers: names of ``hessian_tools.optimizers.named.OPTIMIZERS``.
        budget: in seconds, of the whole race, shared evenly by the batch sizes: T follows from
            timing a step of every optimizer. In steps, it is T.
        batch_sizes: default: the stream's own.
        seeds: of weights and batches; the first is that of the rounds before the last.
        rates: by optimizer; default: the published grids.
        schedule, clip, z_loss: as for ``train``.
        journal: where every run becomes a line; runs that it holds are not run again.
        checkpoint: file for the state of the run under way.
        progress: bars on stderr, where that is a terminal.
        say: is told of every optimizer as it begins.

    Raises:
        ValueError: no optimizer or seed, an unknown or repeated one, one that needs more than a
            model, a batch size that cannot be had, or a budget too short for a first round of 8
            steps.
    """
    given = budget_of(budget)
    _check_named(optimizers=optimizers, seeds=seeds)
    sizes: Sequence[int | None] = [None] if batch_sizes is None else batch_sizes
    _check_named(batch_sizes=sizes)
    for wanted in batch_sizes or ():
        stream.with_batch_size(wanted)
    grids = {name: grid_of(name, rates) for name in optimizers}
    runs = Runs(make_model, stream, schedule, clip, z_loss, journal, checkpoint, progress)
    runs.check(optimizers, seeds[0])
    steps = _planned(runs, given, grids, sizes, len(seeds))
    entries: list[RaceEntry] = []
    total = sum(sum(_plan(len(grid), len(seeds)).values()) for grid in grids.values())
    with runs.bar(total * len(sizes)) as bar:
        for size, num_steps in zip(sizes, steps, strict=True):
            course = _Course(runs, num_steps, size, tuple(seeds), bar)
            finals = {}
            for name, grid in grids.items():
                batches = "" if size is None else f" in batches of {size}"
                say(f"{name}: {len(grid)} rates, up to {num_steps:,} steps{batches}")
                finals[name] = course.run(name, grid)
            entries += _entries(finals, num_steps, size or stream.batch_size)
    seconds = sum(runs.seconds.values())
    return Race(stream.described, str(given), tuple(seeds), tuple(entries), seconds)


class _Final(NamedTuple):
    """What an optimizer comes to."""

    rate: float
    runs: tuple[Trajectory, ...]  # at this rate, one a seed
    rounds: tuple[RaceRound, ...]
    at_edge: bool


@dataclass(frozen=True)
class _Course:
    """The race at one batch size."""

    runs: Runs
    num_steps: int
    batch_size: int | None
    seeds: tuple[int, ...]
    bar: tqdm

    def run(self, optimizer: str, grid: Sequence[float]) -> _Final:
        first = self._extended(optimizer, grid)
        rounds = [first]
        count = len(grid)
        for number in range(1, ROUNDS):
            count = max(FINALISTS, math.ceil(count / 2))
            rates = _leading(rounds[-1], count)
            rounds.append(self._round(optimizer, rates, self._steps(number)))
        finalists = _leading(rounds[-1], FINALISTS)
        finals = {rate: self._with_all_seeds(optimizer, rate) for rate in finalists}
        best = min(finalists, key=lambda rate: _mean(finals[rate]))
        rounds.append(_as_round(self.num_steps, finalists, [finals[rate] for rate in finalists]))
        at_edge = best in (first.rates[0], first.rates[-1])
        return _Final(best, finals[best], tuple(rounds), at_edge)

    def _steps(self, number: int) -> int:
        """Of a round, counted from 0."""
        return max(1, self.num_steps // 2 ** (ROUNDS - number))

    def _extended(self, optimizer: str, grid: Sequence[float]) -> RaceRound:
        """The first round, on the grid and beyond it while the best lies at an end."""
        num_steps = self._steps(0)
        tried = self._round(optimizer, list(grid), num_steps)
        for _ in range(MOST_EXTENSIONS):
            rates = tried.rates.tolist()
            further = beyond(rates, int(np.argmin(tried.losses)))
            if further is None:
                break
            tried = self._round(optimizer, sorted([*rates, further]), num_steps)
        return tried

    def _round(self, optimizer: str, rates: list[float], num_steps: int) -> RaceRound:
        runs = [[self._run(optimizer, rate, self.seeds[0], num_steps)] for rate in rates]
        return _as_round(num_steps, rates, runs)

    def _with_all_seeds(self, optimizer: str, rate: float) -> tuple[Trajectory, ...]:
        return tuple(self._run(optimizer, rate, seed, self.num_steps) for seed in self.seeds)

    def _run(self, optimizer: str, rate: float, seed: int, num_steps: int) -> Trajectory:
        setting = Setting(optimizer, rate, seed, num_steps, self.batch_size)
        self.bar.set_description(f"{optimizer} {rate:.2g}", refresh=False)
        if not self.runs.is_finished(setting):
            self.bar.update()
        return self.runs.run(setting, validate=num_steps == self.num_steps)


def _as_round(
    num_steps: int,
    rates: Sequence[float],
    runs: Sequence[Sequence[Trajectory]],
) -> RaceRound:
    """Of one or several runs a rate."""
    losses = np.array([_mean(some) for some in runs])
    diverged = np.array([any(run.diverged for run in some) for some in runs])
    return RaceRound(num_steps, np.array(rates), losses, diverged)


def _leading(tried: RaceRound, count: int) -> list[float]:
    """The ``count`` best rates, ascending."""
    order = np.argsort(tried.losses, kind="stable")[:count]
    return sorted(tried.rates[order].tolist())


def _plan(num_rates: int, num_seeds: int) -> dict[float, int]:
    """Runs by their length, a share of T."""
    plan = {}
    count = num_rates
    for number in range(ROUNDS):
        plan[1 / 2 ** (ROUNDS - number)] = count
        count = max(FINALISTS, math.ceil(count / 2))
    return {**plan, 1.0: FINALISTS * num_seeds}


def _planned(
    runs: Runs,
    budget: Budget,
    grids: Mapping[str, Sequence[float]],
    sizes: Sequence[int | None],
    num_seeds: int,
) -> list[int]:
    """T by batch size; kept in the journal, as a second timing would differ."""
    least = LEAST_STEPS * 2**ROUNDS
    if budget.steps is not None:
        steps = [budget.steps] * len(sizes)
    elif runs.journal and "steps" in runs.journal.finished:
        steps = list(runs.journal.finished["steps"])
    else:
        started = time.monotonic()
        timed = [_seconds_of_t_one(runs, grids, size, num_seeds) for size in sizes]
        left = budget.amount - (time.monotonic() - started)
        share = max(0.0, _FOR_RUNS * left / len(sizes))
        steps = [int(share / seconds) for seconds in timed]
    if min(steps) < least:
        raise ValueError(
            f"a budget of {budget} makes runs of {min(steps)} steps, and {least} are needed; give "
            "a larger budget, fewer optimizers, batch sizes or seeds, or a smaller model"
        )
    if runs.journal and "steps" not in runs.journal.finished:
        runs.journal.append("steps", tuple(steps))
        runs.journal.finished["steps"] = tuple(steps)
    return steps


def _seconds_of_t_one(
    runs: Runs,
    grids: Mapping[str, Sequence[float]],
    size: int | None,
    num_seeds: int,
) -> float:
    """Seconds of the race at one batch size if T were 1 step."""
    total = 0.0
    for name, grid in grids.items():
        shares = sum(share * count for share, count in _plan(len(grid), num_seeds).items())
        total += shares * runs.seconds_a_step(name, size)
    return total


def _entries(
    finals: Mapping[str, _Final],
    num_steps: int,
    batch_size: int | None,
) -> list[RaceEntry]:
    means = [_mean(final.runs) for final in finals.values()]
    level = max((mean for mean in means if math.isfinite(mean)), default=math.nan)
    return [
        RaceEntry(
            name,
            batch_size,
            num_steps,
            final.rate,
            losses=np.array([run.final for run in final.runs]),
            validations=np.array([run.final_validation for run in final.runs]),
            level=level,
            steps_to_level=_steps_to(final.runs, level),
            state_bytes=final.runs[0].state_bytes,
            seconds_a_step=float(np.mean([run.seconds_a_step for run in final.runs])),
            at_edge=final.at_edge,
            rounds=final.rounds,
            runs=final.runs,
        )
        for name, final in finals.items()
    ]


def _steps_to(runs: Sequence[Trajectory], level: float) -> int | None:
    """Until the mean over seeds of the smoothed loss is at ``level``."""
    length = min(run.steps for run in runs)
    mean = np.mean([run.smoothed()[:length] for run in runs], axis=0)
    reached = np.flatnonzero(mean <= level)
    return int(reached[0]) + 1 if len(reached) else None


def _mean(runs: Sequence[Trajectory]) -> float:
    return sum(run.final for run in runs) / len(runs)


def _check_named(**given: Sequence[object]) -> None:
    for what, names in given.items():
        if not names:
            raise ValueError(f"{what} is empty; name one or more")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{what} has {name} twice; name each once")
