"""Trials: the bytes that a way to compute takes, counted on a Problem's samples before a plan is made.

What is tried is double backward with each kind of segments. Long trials are made without arithmetic
(:mod:`hessian_tools.curvature.engine.fake_problem`). Letters: n examples.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.flop_counter import FlopCounterMode

from hessian_tools.curvature.engine.double_backward import (
    DoubleBackward,
    refuse_once_differentiable,
)
from hessian_tools.curvature.engine.fake_problem import Imagined, Unimaginable
from hessian_tools.curvature.engine.memory import (
    OverBudget,
    budget_bytes,
    is_out_of_memory,
    measuring,
)
from hessian_tools.curvature.engine.plan import MEASURED_ROWS, Footprint, Trial
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.engine.recompute import Segments, recomputing, repeated_layers
from hessian_tools.problem.problem import Problem

TRIAL_PASSES = 33  # forward passes: a graph (3) and products (6 a probe) of 2 and 3 probes
WORTH_IMAGINING = (
    1e12  # operations of a trial; without arithmetic it takes 2 to 10 s, whatever the model's size
)
_MEASURED: WeakKeyDictionary[Problem, dict[Segments, Footprint]] = WeakKeyDictionary()


class Trials:
    """Footprints of a Problem's ways to compute, each measured once and kept for every operator of the Problem.

    ``refused`` says why a kind of segments cannot be used; "" where it only needs more than ``budget`` bytes.
    """

    def __init__(self, problem: Problem, arithmetic: Arithmetic, budget: int) -> None:
        self.problem, self.arithmetic, self.budget = problem, arithmetic, budget
        self.refused: dict[Segments, str] = {}

    @cached_property
    def example_operations(self) -> float:
        """Floating-point operations of a forward pass, an example."""
        examples, batch = self.problem.samples[0]
        with self.problem.evaluating(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.problem.batch_loss(batch)
        return counter.get_total_flops() / examples

    def footprint(self, segments: Segments, beyond: bool = False) -> Footprint | None:
        """Bytes of a kind of segments, measured on the samples; None where it does not fit or cannot be used.

        ``beyond``: whatever the budget, as far as the device has memory.
        """
        known, device = _MEASURED.setdefault(self.problem, {}), self.problem.device
        if segments in known or (segments in self.refused and not beyond):
            return known.get(segments)
        try:
            limit = budget_bytes("auto", device) if beyond else self.budget
            with measuring(device, limit):
                self.refused[segments] = self._unusable(segments)
            if self.refused[segments]:
                return None
            found = self._trial(segments, limit)
        except Exception as error:
            if not isinstance(error, OverBudget) and not is_out_of_memory(error):
                raise
            self.refused[segments] = ""
            return None
        del self.refused[segments]
        known[segments] = Footprint.measured(
            found, 2 * self.problem.num_parameters * self.arithmetic.vectors.itemsize
        )
        return known[segments]

    def _unusable(self, segments: Segments) -> str:
        """Why layers cannot be segments; a loss that has no second derivative is refused."""
        problem, (_, batch) = self.problem, self.problem.samples[0]
        if segments.layers and not repeated_layers(problem.model):
            return "no repeated layers"
        found, parameters = [], list(problem.parameters.values())
        for kind in (replace(segments, layers=False), segments)[: 1 + segments.layers]:
            try:
                with recomputing(problem, kind), torch.enable_grad():
                    loss = problem.batch_loss(batch)
                    if not kind.layers:
                        refuse_once_differentiable(loss)
                    if segments.layers:
                        found.append(
                            torch.autograd.grad(
                                loss, parameters, materialize_grads=True, allow_unused=True
                            )
                        )
            except RuntimeError as error:  # an operation in place on what comes in, say
                if not kind.layers or is_out_of_memory(error):
                    raise
                return str(error).split("\n")[0]
        allowed = torch.finfo(problem.dtype).eps ** 0.5
        if found and any((a - b).norm() > allowed * a.norm() for a, b in zip(*found, strict=True)):
            return "they read more than their arguments and parameters"
        return ""

    def _trial(self, segments: Segments, limit: int) -> dict[int, Trial]:
        """On the samples, by their number of examples: by passes without arithmetic where real ones would be long."""
        problem, samples = self.problem, self.problem.samples
        long = sum(n for n, _ in samples) * self.example_operations * TRIAL_PASSES > WORTH_IMAGINING
        if long and problem.device.type == "cpu":  # CUDA's allocator only counts what there is
            try:
                imagined = Imagined(problem)
                with imagined.entered(), measuring(problem.device, limit) as live:
                    return self._trials(
                        imagined, [(n, imagined.batch(b)) for n, b in samples], segments, live
                    )
            except OverBudget:
                raise
            except Exception:  # a model may look at values, which are not there; real passes take longer, that is all
                pass
        with measuring(problem.device, limit) as live:
            return self._trials(problem, samples, segments, live)

    def _trials(
        self,
        problem: Problem | Imagined,
        samples: Sequence[tuple[int, Any]],
        segments: Segments,
        live: Any,
    ) -> dict[int, Trial]:
        found: dict[int, Trial] = {}
        rows: Sequence[int] = MEASURED_ROWS
        for n, batch in reversed(
            samples
        ):  # the same numbers of probes for all: those that fit the most examples
            found[n] = self._bytes(problem, batch, segments, live, rows)
            rows = tuple(found[n].passes)
        return dict(sorted(found.items()))

    def _bytes(
        self,
        problem: Problem | Imagined,
        batch: Any,
        segments: Segments,
        live: Any,
        tried: Sequence[int],
    ) -> Trial:
        """Records the graph of ``batch`` and makes passes of the numbers of probes ``tried``, as many as fit."""
        live.restart()
        start, parameters = live.now, problem.parameters
        route = DoubleBackward(problem, recorded=True, segments=segments)
        with self.arithmetic.active():
            for _ in route.products(batch, list(parameters), ()):  # records
                pass
            graph, recording = live.now - start, live.peak - live.now
            passes: dict[int, int] = {}
            for rows in tried:
                if rows == 1 and passes:
                    break
                live.restart()
                vectors = [p.new_zeros(()).expand(rows, *p.shape) for p in parameters.values()]
                try:
                    for _ in route.products(batch, list(parameters), [vectors]):
                        passes[rows] = live.peak - start - graph
                except OverBudget:  # what fewer rows have shown has to do
                    if rows == 1:
                        raise
        if not route.batched and problem is not self.problem:
            raise Unimaginable(route.fallback)  # the attempt that failed held something, too
        return Trial(graph, recording, passes)
