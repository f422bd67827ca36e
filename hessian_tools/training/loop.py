"""One training run, from a stream, an optimizer and a schedule to a trajectory."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hessian_tools.optimizers.state import held_bytes
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.evaluation import batch_norm_mode
from hessian_tools.training.budget import Budget, budget_of
from hessian_tools.training.checkpoint import Checkpoint, Record
from hessian_tools.training.schedule import Schedule, cosine
from hessian_tools.training.stream import Stream
from hessian_tools.training.trajectory import Trajectory
from hessian_tools.training.z_loss import ZLoss

CLIP = 1.0
FAR_ABOVE = 3.0  # times the loss at the start
FAR_ABOVE_STEPS = 20  # in a row, after which a run counts as diverged
SAVE_EVERY = 30.0  # seconds
VALIDATIONS = 5
_TIMED_STEPS = 4  # besides a first one, by which a budget in seconds becomes one in steps


class End(Enum):
    """How a run ended."""

    DONE = auto()
    DIVERGED = auto()
    STOPPED = auto()


# whether to give up, from the steps done and the losses so far
GiveUp = Callable[[int, list[float]], bool]


def train(
    model: nn.Module,
    stream: Stream,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule = cosine,
    budget: Budget | int | str = "500steps",
    *,
    clip: float | None = CLIP,
    z_loss: float = 0.0,
    validate_every: int | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    save_every: float = SAVE_EVERY,
    give_up: GiveUp | None = None,
    progress: bool = False,
) -> Trajectory:
    """Trains ``model`` in place, in the mode (training or not) that it has.

    The optimizer's own rates are the largest; the schedule's factor multiplies them. A run is given
    up as diverged where the loss or the gradient's norm is NaN or infinite, or where the loss has
    been above 3 times the start for 20 steps in a row.

    Args:
        model: what the optimizer was made of.
        stream: the batches and the loss.
        optimizer: any of torch's kind that needs no closure.
        schedule: ``schedule(step, num_steps)`` -> factor.
        budget: steps or time, such as 500, "500steps" or "5min". Time becomes steps before the run,
            by timing five steps on a copy, so that the run is the same however busy the machine is.
        clip: the gradient's largest norm; None: as it is.
        z_loss: weight of :class:`ZLoss`; the losses recorded are without it.
        validate_every: steps between validations; default: a fifth of all. There is one at the end,
            too; 0: none at all.
        checkpoint: file for the state, saved every ``save_every`` seconds and removed at the end;
            where it holds the state of the run ``key``, the run goes on from there, with the same
            losses bit by bit on a CPU.
        key: what tells this run from others that use the same file.
        give_up: called after every step with the steps done and all losses; True ends the run as
            stopped.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        ValueError: a budget, clip, z-loss or interval out of range, or a checkpoint that does not
            fit.
    """
    _check(clip, validate_every, save_every)
    objective = _Objective(stream, z_loss)
    kept = Checkpoint(checkpoint, key) if checkpoint else None
    record = kept.restore(model, optimizer) if kept else None
    if record is None:
        num_steps = _num_steps(budget_of(budget), model, stream, optimizer, objective, clip)
        record = Record(num_steps)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    run = _Run(model, stream, optimizer, schedule, objective, clip, record, stream.held_out())
    every = validate_every
    if every is None:
        every = math.ceil(record.num_steps / VALIDATIONS)
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    bar = tqdm(total=record.num_steps, initial=record.steps, disable=hidden, leave=False)
    saving = _Saving(kept, save_every)
    with bar, batch_norm_mode(model, stream.batch_stats):
        end = _end_of(run, every, give_up or (lambda steps, losses: False), saving, bar)
    if kept:
        kept.remove()
    return _trajectory(record, end, held_bytes(optimizer))


@dataclass(frozen=True)
class _Objective:
    """The loss of a stream, and the penalty beside it."""

    stream: Stream
    z_loss: float

    def parts(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is recorded, and what is minimised."""
        if not self.z_loss:
            loss = self.stream.loss_fn(model, batch)
            return loss, loss
        loss, penalty = ZLoss(self.stream.loss_fn, self.z_loss).parts(model, batch)
        return loss, loss + penalty


@dataclass(frozen=True)
class _Run:
    """A run under way."""

    model: nn.Module
    stream: Stream
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    objective: _Objective
    clip: float | None
    record: Record
    held_out: Sequence[Batch] = ()

    def step(self) -> bool:
        """One step; False where the run has diverged, and then the weights are left alone."""
        record = self.record
        started = time.perf_counter()
        step = record.steps
        loss, norm = self._gradient(self.stream.batch(step))
        rate = self._set_rates(self.schedule(step, record.num_steps))
        record.losses.append(loss)
        record.gradient_norms.append(norm)
        record.learning_rates.append(rate)
        is_high = loss > record.losses[0] + (FAR_ABOVE - 1) * abs(record.losses[0])
        record.high = record.high + 1 if is_high else 0
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            self.optimizer.step()
        record.seconds += time.perf_counter() - started
        return is_finite and record.high < FAR_ABOVE_STEPS

    def validate(self) -> None:
        if self.held_out:
            loss = self.stream.validation_loss(self.model, self.held_out)
            self.record.validation_steps.append(self.record.steps)
            self.record.validation_losses.append(loss)

    def is_done(self) -> bool:
        return self.record.steps >= self.record.num_steps

    def _gradient(self, batch: Batch) -> tuple[float, float]:
        """The loss, and the norm of the gradient before clipping."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss, minimised = self.objective.parts(self.model, batch)
            minimised.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = math.inf if self.clip is None else self.clip
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(loss.detach()), float(norm)

    def _set_rates(self, factor: float) -> float:
        """Sets the rate of every group; returns that of the first."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])


class _Saving:
    """Saves the state of a run every so many seconds; never where there is no file for it."""

    def __init__(self, checkpoint: Checkpoint | None, every: float) -> None:
        self._checkpoint = checkpoint
        self._every = every
        self._last = time.monotonic()

    def save_if_due(self, run: _Run) -> None:
        is_due = time.monotonic() - self._last >= self._every
        if self._checkpoint and is_due:
            self._checkpoint.save(run.record, run.model, run.optimizer)
            self._last = time.monotonic()


def _end_of(
    run: _Run,
    validate_every: int,
    give_up: GiveUp,
    saving: _Saving,
    bar: tqdm,
) -> End:
    """Steps until the run ends in one way or another."""
    record = run.record
    while not run.is_done():
        has_diverged = not run.step()
        bar.update()
        if has_diverged:
            return End.DIVERGED
        if _is_due(record, validate_every):
            run.validate()
        if give_up(record.steps, record.losses):
            return End.STOPPED
        saving.save_if_due(run)
    return End.DONE


def timed_step(
    model: nn.Module,
    stream: Stream,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None = CLIP,
    z_loss: float = 0.0,
) -> float:
    """Seconds of a training step, the median of four after a first one; they train ``model``."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    record = Record(_TIMED_STEPS + 1)
    objective = _Objective(stream, z_loss)
    run = _Run(model, stream, optimizer, cosine, objective, clip, record)
    times = []
    with batch_norm_mode(model, stream.batch_stats):
        while not run.is_done():
            before = record.seconds
            run.step()
            times.append(record.seconds - before)
    return float(np.median(times[1:]))


def _num_steps(
    budget: Budget,
    model: nn.Module,
    stream: Stream,
    optimizer: torch.optim.Optimizer,
    objective: _Objective,
    clip: float | None,
) -> int:
    if budget.steps is not None:
        return budget.steps
    copied = copy.deepcopy((model, optimizer))  # together, as the optimizer refers to the model
    with _same_random_numbers():
        seconds = timed_step(copied[0], stream, copied[1], clip=clip, z_loss=objective.z_loss)
    return max(1, int(budget.amount / seconds))


def _is_due(record: Record, every: int) -> bool:
    if every == 0:
        return False
    return record.steps % every == 0 or record.steps == record.num_steps


def _trajectory(record: Record, end: End, bytes_of_state: int) -> Trajectory:
    return Trajectory(
        losses=np.array(record.losses),
        learning_rates=np.array(record.learning_rates),
        gradient_norms=np.array(record.gradient_norms),
        validation_steps=np.array(record.validation_steps, dtype=np.int64),
        validation_losses=np.array(record.validation_losses, dtype=np.float64),
        num_steps=record.num_steps,
        diverged=end is End.DIVERGED,
        stopped=end is End.STOPPED,
        seconds=record.seconds,
        state_bytes=bytes_of_state,
    )


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn inside was not drawn."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _check(clip: float | None, validate_every: int | None, save_every: float) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be a positive norm, or None for no clipping, got {clip!r}")
    if validate_every is not None and validate_every < 0:
        raise ValueError(f"validate_every must be 0 (never) or more steps, got {validate_every!r}")
    if save_every < 0:
        raise ValueError(f"save_every must be 0 seconds or more, got {save_every!r}")
