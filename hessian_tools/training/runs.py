"""Runs of an experiment by name: each is trained once, kept in a journal, and resumed when killed.

All runs of one seed and batch size see the same batches and start from the same weights.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from hessian_tools.optimizers.named import OPTIMIZERS, make
from hessian_tools.results import Journal
from hessian_tools.training.budget import Budget
from hessian_tools.training.loop import CLIP, GiveUp, timed_step, train
from hessian_tools.training.schedule import Schedule, cosine
from hessian_tools.training.stream import Stream
from hessian_tools.training.trajectory import Trajectory, smoothed

MakeModel = Callable[[int], nn.Module]  # seed -> a fresh model
HALF_DECADE = math.sqrt(10)
CHECKED_AT = (0.5, 0.75)  # shares of the steps
HOPELESS = 0.5  # of a rival's progress


@dataclass(frozen=True)
class Setting:
    """One run of an experiment."""

    optimizer: str
    rate: float
    seed: int
    num_steps: int
    batch_size: int | None = None  # None: the stream's own
    momentum: float | None = None  # None: the optimizer's own

    @property
    def name(self) -> str:
        """What the run is known by in a journal."""
        words = [self.optimizer, f"rate {self.rate:.6g}"]
        if self.momentum is not None:
            words.append(f"momentum {self.momentum:g}")
        if self.batch_size is not None:
            words.append(f"batch {self.batch_size}")
        return ", ".join([*words, f"{self.num_steps} steps", f"seed {self.seed}"])


@dataclass
class Runs:
    """Trains what it is asked for, unless it has done so before.

    Args:
        make_model: ``make_model(seed)`` -> a fresh model on its device, the same for one seed.
        stream: the batches; its seed is replaced by a run's.
        schedule: of all runs.
        clip: as for :func:`train`.
        z_loss: as for :func:`train`.
        journal: where finished runs are kept, a line each; None: in memory.
        checkpoint: file for the state of the run under way; None: a killed run begins again.
        progress: bars on stderr, where that is a terminal.
    """

    make_model: MakeModel
    stream: Stream
    schedule: Schedule = cosine
    clip: float | None = CLIP
    z_loss: float = 0.0
    journal: Journal | None = None
    checkpoint: Path | None = None
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # of every run asked for, by name
    _finished: dict[str, Trajectory] = field(default_factory=dict)

    def run(
        self,
        setting: Setting,
        give_up: GiveUp | None = None,
        *,
        validate: bool = True,
    ) -> Trajectory:
        """The trajectory of a setting; without validation losses unless ``validate``."""
        name = setting.name
        if not self.is_finished(setting):
            self._finished[name] = self._trained(setting, give_up, validate)
            if self.journal:
                self.journal.append(name, self._finished[name])
        elif name not in self._finished and self.journal:
            self._finished[name] = self.journal.finished[name]
        trajectory = self._finished[name]
        self.seconds[name] = trajectory.seconds
        return trajectory

    def is_finished(self, setting: Setting) -> bool:
        """Whether it was run before."""
        in_journal = self.journal is not None and setting.name in self.journal.finished
        return in_journal or setting.name in self._finished

    def check(self, optimizers: Sequence[str], seed: int = 0) -> None:
        """Makes every optimizer once, so that what it refuses is told before any run."""
        for name in optimizers:
            make(name, self.make_model(seed), OPTIMIZERS[name].lr)

    def seconds_a_step(self, optimizer: str, batch_size: int | None) -> float:
        """Measured on a fresh model, at the published rate."""
        setting = Setting(optimizer, OPTIMIZERS[optimizer].lr, 0, 1, batch_size)
        with _seeded(0):
            model, made, stream = self._parts(setting)
            return timed_step(model, stream, made, clip=self.clip, z_loss=self.z_loss)

    def bar(self, total: int) -> tqdm:
        """A bar of runs, on stderr where that is a terminal."""
        return tqdm(total=total, unit="run", disable=None if self.progress else True)

    def _trained(
        self,
        setting: Setting,
        give_up: GiveUp | None,
        validate: bool,
    ) -> Trajectory:
        with _seeded(setting.seed):
            model, optimizer, stream = self._parts(setting)
            return train(
                model,
                stream,
                optimizer,
                self.schedule,
                Budget(setting.num_steps),
                clip=self.clip,
                z_loss=self.z_loss,
                validate_every=None if validate else 0,
                checkpoint=self.checkpoint,
                key=setting.name,
                give_up=give_up,
                progress=self.progress,
            )

    def _parts(self, setting: Setting) -> tuple[nn.Module, torch.optim.Optimizer, Stream]:
        model = self.make_model(setting.seed)
        stream = self.stream.with_seed(setting.seed)
        if setting.batch_size is not None and setting.batch_size != stream.batch_size:
            stream = stream.with_batch_size(setting.batch_size)
        optimizer = make(setting.optimizer, model, setting.rate, momentum=setting.momentum)
        return model, optimizer, stream


def hopeless(rival: Trajectory) -> GiveUp:
    """Whether a run is to be given up for what ``rival``, of the same length, had achieved by then.

    It is looked at after half and three quarters of the steps, and given up where its smoothed loss
    has come down by less than half of what the rival's had.
    """
    checked = {max(1, int(share * rival.num_steps)) for share in CHECKED_AT}
    of_rival = rival.smoothed()

    def give_up(steps: int, losses: Sequence[float]) -> bool:
        if steps not in checked or steps > len(of_rival):
            return False
        now = smoothed(np.array(losses), rival.num_steps)[-1]
        progress = losses[0] - now
        needed = HOPELESS * (of_rival[0] - of_rival[steps - 1])
        return bool(progress < needed)

    return give_up


def grid_of(optimizer: str, rates: Mapping[str, Sequence[float]] | None) -> list[float]:
    """The rates to begin with, ascending: those given for the optimizer, else its published grid.

    Raises:
        ValueError: an unknown optimizer, or rates that are not positive and finite.
    """
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer {optimizer!r} is not known; there are {known}")
    grid = (rates or {}).get(optimizer, OPTIMIZERS[optimizer].grid)
    if not grid or not all(0 < rate < math.inf for rate in grid):
        raise ValueError(
            f"rates of {optimizer} must be one or more positive numbers, got {list(grid)}"
        )
    return sorted(set(grid))


def beyond(rates: Sequence[float], best: int) -> float | None:
    """The rate half a decade beyond the end at which the best of ``rates`` lies; else None."""
    if best == 0:
        return rates[0] / HALF_DECADE
    return rates[-1] * HALF_DECADE if best == len(rates) - 1 else None


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's are put back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
