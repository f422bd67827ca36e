"""Tracker: measures curvature along training, on batches of its own, and changes nothing.

A step of training is bit by bit the same with a tracker and without: the modes of modules, buffers,
gradients, the optimizer, random numbers and the order of the data stay as they are.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.optimizer_state import preconditioner_of
from hessian_tools.problem.problem import Problem
from hessian_tools.results import Journal, JsonObject
from hessian_tools.tracking.measures import TrackedMeasure, of
from hessian_tools.tracking.moment import Moment
from hessian_tools.tracking.track import SECONDS, STEP, Track

READINGS = ("loss", "largest", "scale")


class Tracker:
    """Follows curvature during training.

    ``tracker.attach(optimizer)`` measures at once, as step 0, and from then on after every
    ``every``-th step of the optimizer. Without an optimizer call ``measure(step)``. A measurement
    that fails during training, as of weights that have become NaN, stops nothing: ``notes`` say
    why.

    Args:
        curvature: a Problem (its Hessian), or a curvature operator. Make it of the model that is
            trained, in the mode in which it is to be measured (``model.eval()`` where it has
            dropout); training goes on in the model's own. Its batches stay fixed: a few examples
            make it cheap.
        every: steps from one measurement to the next.
        readings: names of :data:`hessian_tools.tracking.MEASURES`.
        blocks: what ``scale`` compares; default: the weight tensors.
        budget: the largest share of the time since ``attach`` that measurements may take, such as
            0.05. What would exceed it, if it took as long as the last one, is left out and counted
            in ``skipped``. None: all are made.
        journal: a file that gets a line a measurement. One that an interrupted run has left goes
            on; steps that it holds are not measured again.
        num_probes: random vectors of ``trace`` and of each block of ``scale``; at least 2.
        seed: of these.

    Raises:
        TypeError: for a ``curvature`` that is neither.
        ValueError: for a number out of range or an unknown reading.
    """

    def __init__(
        self,
        curvature: Problem | CurvatureOperator,
        *,
        every: int = 50,
        readings: Sequence[str] = READINGS,
        blocks: Partition | None = None,
        budget: float | None = None,
        journal: Path | str | None = None,
        num_probes: int = 2,
        seed: int = 0,
    ) -> None:
        if every < 1 or int(every) != every:
            raise ValueError(f"every is {every}; a whole number of steps from 1 is needed")
        if num_probes < 2:
            raise ValueError(f"num_probes is {num_probes}; at least 2 show how sure a reading is")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; a share of the time, above 0 and at most 1")
        self.every = every
        self.budget = budget
        self.skipped = 0
        self.notes: list[str] = []
        self.operator = _operator(curvature)
        self._measures = of(list(readings))
        self._blocks = blocks or partition(self.operator.problem.model, "weights")
        if len(self._blocks) < 2 and any("scale" in name for name in self._measures):
            raise ValueError(
                f"the spread of scales compares blocks, and there are {len(self._blocks)}; pass "
                "blocks=ht.partition(model, ...) with two or more, or leave it out of readings"
            )
        self._probes, self._seed = num_probes, seed
        self._journal = Journal(Path(journal)) if journal else None
        self._lines: JsonObject = dict(self._journal.finished) if self._journal else {}
        self._vectors: dict[str, Tensor] = {}
        self._optimizer: Optimizer | None = None
        self._hooks: list[Any] = []  # torch's handles
        self._steps = 0
        self._before: dict[str, Tensor] | None = None
        self._started = time.perf_counter()
        self._spent = self._last = 0.0

    @property
    def steps(self) -> int:
        """Of the optimizer, as far as they were seen."""
        return self._steps

    @property
    def track(self) -> Track:
        """All that was measured."""
        return Track.of(self._lines)

    def attach(self, optimizer: Optimizer) -> "Tracker":
        """Measures now, and from now on after the optimizer's steps.

        Raises:
            ValueError: it is attached already, or the optimizer trains none of the parameters.
            TypeError: a reading needs a preconditioner that is not known of this optimizer.
        """
        if self._hooks:
            raise ValueError("this tracker is attached; detach() it first, or make another")
        ours = set(map(id, self.operator.problem.parameters.values()))
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not ours & trained:
            raise ValueError(
                "the optimizer trains none of the Problem's parameters; make the Problem of the "
                "model that is trained"
            )
        if "preconditioned_scale" in self._measures:
            _check_preconditioner(optimizer, self.operator.problem)
        self._optimizer = optimizer
        self._started = time.perf_counter() - self._spent
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        if self._steps == 0:
            self.measure(0)
        return self

    def detach(self) -> None:
        """Measures no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._before = None

    def measure(self, step: int) -> dict[str, float]:
        """The readings now, under ``step``; those of a step that is known are not taken again.

        Readings that need the last update are left out where there is none.
        """
        if str(step) in self._lines:
            return _numbers(self._lines[str(step)])
        start = time.perf_counter()
        values = self._values()
        self._last = time.perf_counter() - start
        self._spent += self._last
        line: JsonObject = {STEP: step, **values, SECONDS: self._last}
        line = {name: _json(value) for name, value in line.items()}
        if self._journal:
            self._journal.append(str(step), line)
        self._lines[str(step)] = line
        return values

    def state_dict(self) -> JsonObject:
        """What a checkpoint keeps, so that a resumed run goes on counting."""
        return {"steps": self._steps, "skipped": self.skipped, "vectors": dict(self._vectors)}

    def load_state_dict(self, state: JsonObject) -> None:
        """Takes what :meth:`state_dict` gave; before :meth:`attach`."""
        self._steps = int(state["steps"])
        self.skipped = int(state["skipped"])
        device = self.operator.device
        self._vectors = {name: v.to(device) for name, v in state["vectors"].items()}

    def _values(self) -> dict[str, float]:
        moment = Moment(
            self.operator,
            self._blocks,
            self._probes,
            self._seed,
            self._optimizer,
            self._before,
            self._vectors,
        )
        wanted = [measure for measure in self._measures.values() if self._is_possible(measure)]
        values: dict[str, float] = {}
        with _untouched(self.operator.problem):
            with self.operator.steady():  # one look at the weights for all products
                for measure in wanted:
                    if not measure.moves_weights:
                        values |= measure.take(moment)
            for measure in wanted:
                if measure.moves_weights:
                    values |= measure.take(moment)
        return values

    def _is_possible(self, measure: TrackedMeasure) -> bool:
        if measure.needs_update and self._before is None:
            return False
        return self._has_stepped() or not measure.needs_optimizer

    def _has_stepped(self) -> bool:
        return self._optimizer is not None and bool(self._optimizer.state or self._steps)

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 and str(step) not in self._lines

    def _is_affordable(self) -> bool:
        if self.budget is None:
            return True
        elapsed = time.perf_counter() - self._started
        return self._spent + self._last <= self.budget * elapsed

    def _before_step(self) -> None:
        needed = any(measure.needs_update for measure in self._measures.values())
        if needed and self._is_due(self._steps + 1):
            parameters = self.operator.problem.parameters.items()
            self._before = {name: p.detach().clone() for name, p in parameters}

    def _after_step(self) -> None:
        self._steps += 1
        if self._is_due(self._steps):
            if self._is_affordable():
                self._measure_or_note()
            else:
                self.skipped += 1
        self._before = None

    def _measure_or_note(self) -> None:
        """Measures; what goes wrong then, such as NaN in a run that diverges, stops no training."""
        try:
            self.measure(self._steps)
        except Exception as error:
            note = f"step {self._steps} was not measured: {type(error).__name__}: {error}"
            if not self.notes:
                warnings.warn(f"{note}; further ones are in tracker.notes", stacklevel=2)
            self.notes.append(note)


def _operator(curvature: Problem | CurvatureOperator) -> CurvatureOperator:
    if isinstance(curvature, CurvatureOperator):
        return curvature
    if isinstance(curvature, Problem):
        return HessianOperator(curvature)
    raise TypeError(
        f"curvature is a {type(curvature).__name__}; pass ht.Problem(model, loss_fn, batches) or a "
        "curvature operator"
    )


def _check_preconditioner(optimizer: Optimizer, problem: Problem) -> None:
    """Raises TypeError now and not in the middle of training."""
    with contextlib.suppress(ValueError):  # an optimizer that has not stepped has none yet
        preconditioner_of(optimizer, problem)


@contextlib.contextmanager
def _untouched(problem: Problem) -> Iterator[None]:
    """Random numbers as they were on leaving, and gradients enabled inside."""
    devices = [problem.device] if problem.device.type == "cuda" else []
    random = torch.random.fork_rng(devices=devices)
    with random, torch.enable_grad(), _without_autocast(problem.model):
        yield


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Without the wrapper that accelerate puts around ``forward`` for mixed precision."""
    wrapped = model.__dict__.get("forward")
    original = model.__dict__.get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(line: JsonObject) -> dict[str, float]:
    return {
        name: math.nan if value is None else float(value)
        for name, value in line.items()
        if name not in (STEP, SECONDS)
    }
