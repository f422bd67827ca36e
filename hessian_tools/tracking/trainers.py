"""A Tracker inside other people's training loops: transformers' Trainer, and Lightning.

Both log its readings under ``hessian/...`` to whatever the loop logs to, keep its state in their
checkpoints, and leave the loop's own data loader alone. Rank zero alone measures and writes. The
libraries are imported only when asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from hessian_tools.problem.batches import to_device
from hessian_tools.problem.evaluation import in_modes
from hessian_tools.problem.losses import huggingface
from hessian_tools.problem.problem import Problem
from hessian_tools.results import JsonObject
from hessian_tools.tracking.tracker import Tracker

if TYPE_CHECKING:
    import lightning
    import transformers
    from lightning import Trainer as Lit
    from transformers import TrainerControl as Control
    from transformers import TrainerState as State
    from transformers import TrainingArguments as Arguments

PREFIX = "hessian/"
STATE = "hessian_tracker.pt"  # in a checkpoint's folder
NUM_EXAMPLES = 8


def follow_trainer(
    trainer: transformers.Trainer,
    problem: Problem | None = None,
    *,
    num_examples: int = NUM_EXAMPLES,
    **settings: Any,
) -> Tracker:
    """Adds a callback to a Trainer that measures as it trains, and returns its Tracker.

    Readings appear in ``trainer.state.log_history``, and wherever ``report_to`` sends logs.

    Args:
        trainer: before ``train()``.
        problem: what is measured; default: the first examples of the training set, collated as in
            training, with the model's own loss, in eval mode.
        num_examples: of the default.
        settings: of :class:`Tracker`, such as ``every``, ``readings``, ``budget``, ``journal``.

    Raises:
        ValueError: no ``problem``, and the trainer's data or loss are such that one must be given.
    """
    tracker = Tracker(problem or problem_of(trainer, num_examples), **settings)
    trainer.add_callback(_trainer_callback(trainer, tracker))
    return tracker


def problem_of(trainer: transformers.Trainer, num_examples: int = NUM_EXAMPLES) -> Problem:
    """The Problem of a Trainer's model and the first examples of its training set.

    Raises:
        ValueError: a data set without length, or a loss that is not the model's own.
    """
    data = trainer.train_dataset
    model = trainer.model
    assert isinstance(model, nn.Module)
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ValueError(
            "the trainer's train_dataset has no examples by number, and its loader is not to be "
            "consumed; pass problem=ht.Problem(model, ht.huggingface, batches)"
        )
    overridden = type(trainer).compute_loss.__module__.partition(".")[0] != "transformers"
    if trainer.compute_loss_func or trainer.label_smoother or overridden:
        raise ValueError(
            "the trainer has a loss of its own (compute_loss_func, compute_loss or "
            "label_smoothing_factor); pass problem=ht.Problem(model, your_loss, batches)"
        )
    examples = [_accepted(model, data[place]) for place in range(min(num_examples, len(data)))]
    with torch.random.fork_rng(devices=[]):  # some collators draw masks
        batch = to_device(trainer.data_collator(examples), next(model.parameters()).device)
    with in_modes(dict.fromkeys(model.modules(), False)):
        return Problem(model, huggingface, [batch])


def _accepted(model: nn.Module, example: object) -> Any:
    """Of an example as a dict, what the model's ``forward`` takes, as the Trainer does."""
    if not isinstance(example, Mapping):
        return example
    known = {*inspect.signature(model.forward).parameters, "labels", "label", "label_ids"}
    return {name: value for name, value in example.items() if name in known}


def innermost(optimizer: object) -> Optimizer:
    """The torch optimizer inside wrappers of accelerate and Lightning."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer


class _Log:
    """The readings that were not logged yet, by step."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._logged: set[int] = set()

    def news(self) -> dict[int, dict[str, float]]:
        track = self._tracker.track
        found: dict[int, dict[str, float]] = {}
        for place, step in enumerate(track.steps.tolist()):
            if step not in self._logged:
                self._logged.add(step)
                values = {name: float(row[place]) for name, row in track.readings.items()}
                found[step] = {PREFIX + k: v for k, v in values.items() if math.isfinite(v)}
        return found


def _trainer_callback(
    trainer: transformers.Trainer, tracker: Tracker
) -> transformers.TrainerCallback:
    import transformers

    class HessianCallback(transformers.TrainerCallback):
        """Attaches a Tracker, logs what it measures, and saves its state."""

        def __init__(self) -> None:
            self._unlogged = _Log(tracker)

        def on_train_begin(
            self, args: Arguments, state: State, control: Control, **kept: object
        ) -> None:
            if not state.is_world_process_zero:
                return
            saved = _checkpoint(args, state) / STATE
            if state.global_step and saved.exists():
                tracker.load_state_dict(torch.load(saved, weights_only=True))
            self._unlogged.news()  # what an earlier run has logged
            tracker.attach(innermost(kept["optimizer"]))
            self._tell(control)

        def on_step_end(
            self, args: Arguments, state: State, control: Control, **kept: object
        ) -> None:
            self._tell(control)

        def on_save(self, args: Arguments, state: State, control: Control, **kept: object) -> None:
            folder = _checkpoint(args, state)
            if state.is_world_process_zero and folder.is_dir():
                torch.save(tracker.state_dict(), folder / STATE)

        def on_train_end(
            self, args: Arguments, state: State, control: Control, **kept: object
        ) -> None:
            tracker.detach()

        def _tell(self, control: Control) -> None:
            # the handler's own order has the loggers before this callback, so that editing what
            # they are given would come too late; and to log takes the losses' own turn away
            is_losses_turn = control.should_log
            for values in self._unlogged.news().values():
                trainer.log(values)
            control.should_log = is_losses_turn

    return HessianCallback()


def _checkpoint(args: Arguments, state: State) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def lightning_callback(tracker: Tracker, optimizer: int = 0) -> lightning.Callback:
    """A callback for ``lightning.Trainer`` that measures as it trains.

    Args:
        tracker: of a Problem of the module that is trained, or of a network inside it.
        optimizer: whose steps are followed, by its place in ``trainer.optimizers``.
    """
    import lightning

    class HessianCallback(lightning.Callback):
        """Attaches a Tracker, logs what it measures, and keeps its state."""

        def __init__(self) -> None:
            self._unlogged = _Log(tracker)

        def on_train_start(self, trainer: Lit, module: object) -> None:
            if trainer.is_global_zero:
                self._unlogged.news()
                tracker.attach(innermost(trainer.optimizers[optimizer]))
                self._tell(trainer)

        def on_train_batch_end(self, trainer: Lit, *batch: object, **kept: object) -> None:
            self._tell(trainer)

        def on_train_end(self, trainer: Lit, module: object) -> None:
            tracker.detach()

        def state_dict(self) -> JsonObject:
            return tracker.state_dict()

        def load_state_dict(self, state_dict: JsonObject) -> None:
            tracker.load_state_dict(state_dict)

        def _tell(self, trainer: Lit) -> None:
            for step, values in self._unlogged.news().items():
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

    return HessianCallback()
