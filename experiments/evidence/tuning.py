"""One pair trained as an arm says: both optimizers, rates tuned at every budget, three seeds.

Every finished run is a line of a journal, FAMILY/WHAT.ARM.jsonl, so that what is killed goes on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evidence.arms import MOMENTUM, OPTIMIZERS, RATES, Arm
from evidence.pair import Pair
from hessian_tools.results import Journal
from hessian_tools.training import RateSweep, Trajectory, sweep
from hessian_tools.training.runs import HALF_DECADE, Runs, Setting


@dataclass(frozen=True)
class Tuned:
    """An optimizer at its best rate, at one budget: a trajectory a seed."""

    optimizer: str
    num_steps: int
    rate: float
    runs: tuple[Trajectory, ...]


def journal_path(folder: Path, pair: Pair, arm: Arm) -> Path:
    return folder / f"{pair.name.replace('/', '.')}.{arm.name}.jsonl"


def tuned(
    pair: Pair,
    arm: Arm,
    folder: Path,
    up_to: int | None = None,
) -> tuple[list[Tuned], dict[str, Trajectory]]:
    """Both optimizers at the arm's budgets, at most ``up_to`` steps; and all runs by name.

    A later budget's sweep begins around the best rate of the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = journal_path(folder, pair, arm)
    training = _Training(pair, arm, path)
    asked = [steps for steps in arm.budgets if steps <= (up_to or steps)]
    found = [found for optimizer in OPTIMIZERS for found in _at_budgets(training, optimizer, asked)]
    runs = Journal(path).finished
    return found, {name: run for name, run in runs.items() if run.num_steps in asked}


@dataclass(frozen=True)
class _Training:
    pair: Pair
    arm: Arm
    path: Path

    @property
    def journal(self) -> Journal:
        """Read anew, so that what one sweep has trained the next one knows."""
        return Journal(self.path, run=f"{self.pair.name} {self.arm.name}")

    @property
    def checkpoint(self) -> Path:
        return self.path.with_suffix(".checkpoint")

    def swept(self, optimizer: str, rates: Sequence[float], num_steps: int) -> RateSweep:
        (found,) = sweep(
            self.pair.make_model,
            self.pair.stream(self.arm.batch_size),
            [optimizer],
            budget=num_steps,
            rates={optimizer: rates},
            momenta=[MOMENTUM],
            seeds=self.arm.seeds[:1],
            refine=self.arm.refine,
            clip=self.arm.clip,
            journal=self.journal,
            checkpoint=self.checkpoint,
        )
        return found

    def repeated(self, optimizer: str, rate: float, num_steps: int) -> tuple[Trajectory, ...]:
        """The run at ``rate`` from every seed."""
        runs = Runs(
            self.pair.make_model,
            self.pair.stream(self.arm.batch_size),
            clip=self.arm.clip,
            journal=self.journal,
            checkpoint=self.checkpoint,
        )
        setting = Setting(optimizer, rate, 0, num_steps, momentum=MOMENTUM)
        return tuple(runs.run(replace(setting, seed=seed)) for seed in self.arm.seeds)


def _at_budgets(training: _Training, optimizer: str, budgets: Sequence[int]) -> list[Tuned]:
    rates: Sequence[float] = RATES[optimizer]
    found = []
    for num_steps in budgets:
        best = training.swept(optimizer, rates, num_steps).best_rate
        runs = training.repeated(optimizer, best, num_steps)
        found.append(Tuned(optimizer, num_steps, best, runs))
        rates = around(best)
    return found


def around(rate: float) -> list[float]:
    """The half-decade next to ``rate``, and those below and above it."""
    nearest = 10 ** (round(2 * math.log10(rate)) / 2)
    return [nearest / HALF_DECADE, nearest, nearest * HALF_DECADE]


def use_one_thread() -> None:
    """For a process that shares the machine with others of its kind."""
    torch.set_num_threads(1)
