"""Trials: the bytes that a way to compute takes, counted on a Problem's samples before planning.

What is tried is the recorded route with each kind of segments. Long trials are made on fake tensors
(:mod:`hessian_tools.curvature.segments.fake_problem`). Letters: n examples.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hessian_tools.curvature.engine.custom_functions import refuse_once_differentiable
from hessian_tools.curvature.engine.derivative import HESSIAN, Derivative
from hessian_tools.curvature.engine.footprint import Footprint, Trial
from hessian_tools.curvature.engine.memory import (
    ByteCounter,
    OverBudget,
    budget_bytes,
    is_out_of_memory,
    measuring,
)
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.segments.fake_problem import CannotFake, FakeProblem
from hessian_tools.curvature.segments.recompute import (
    NONE,
    Segments,
    recomputing,
    repeated_layers,
)
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem

# Numbers of probes that are tried. A batch of one probe is laid out unlike any other, its strides
# being free, so it is tried only where more do not fit.
MEASURED_ROWS = (2, 3, 1)
TRIAL_PASSES = 33  # forward passes: a graph (3) and products (6 a probe) of 2 and 3 probes
# Operations of a trial from which fake tensors pay: with them it takes 2 to 10 s for any model.
WORTH_FAKING = 1e12

# Of the bytes held while a graph is recorded, what each probe of a pass holds at most: 1.8 was the
# most on the tests' networks and the zoo's small ones, and this is twice that.
PROBE_BOUND = 4
SMALL_BYTES = 2**20  # and what kernels hold besides, which counts in the smallest models alone

# by Problem, and there by the derivative's name
_MEASURED: WeakKeyDictionary[Problem, dict[tuple[str, Segments], Footprint]] = WeakKeyDictionary()
_BOUNDS: WeakKeyDictionary[Problem, dict[str, Footprint]] = WeakKeyDictionary()


class Trials:
    """Footprints of a Problem's ways to compute, each measured once.

    They are kept for every operator of the Problem. ``refused`` says why a kind of segments cannot
    be used; "" where it only needs more than ``budget`` bytes.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        budget: int,
        derivative: Derivative = HESSIAN,
    ) -> None:
        self.problem = problem
        self.derivative = derivative
        self.arithmetic = arithmetic
        self.budget = budget
        self.refused: dict[Segments, str] = {}

    @cached_property
    def example_operations(self) -> float:
        """Floating-point operations of a forward pass over one example."""
        examples, batch = self.problem.samples[0]
        try:
            with self.problem.evaluating(), FlopCounterMode(display=False) as counter:
                self.problem.batch_value(batch)
        except Exception:
            # the counter follows modules with hooks that a loss with derivatives inside may break;
            # an estimate of work must not decide whether a model runs
            return 2.0 * self.problem.num_parameters
        return counter.get_total_flops() / examples

    def bound(self) -> Footprint | None:
        """No less than products without segments take; None where that is not known.

        It comes from one graph, recorded for the smallest sample, which costs 3 forward passes
        where trials cost 33 and more. Constants count once for each sample's worth of examples.
        Nothing is said (None) where that graph does not fit, where passes over it may hold what it
        does not show, and where trials have measured already.
        """
        name = self.derivative.name
        if (name, NONE) in _MEASURED.get(self.problem, {}):
            return None
        known = _BOUNDS.setdefault(self.problem, {})
        if name not in known:
            found = self._bound()
            if found is None:
                return None
            known[name] = found
        return known[name]

    def _bound(self) -> Footprint | None:
        problem = self.problem
        examples, batch = problem.samples[0]
        route = self.derivative.recorded(problem, recorded=True)
        try:
            with measuring(problem.device, self.budget) as live, self.arithmetic.active():
                for _ in route.products(batch, list(problem.parameters), ()):  # records
                    pass
                graph = live.now
                peak = live.peak
        except Exception as error:
            if not isinstance(error, OverBudget) and not is_out_of_memory(error):
                raise
            return None
        if route.surprises:
            return None
        trial = Trial(graph, peak - graph, {1: PROBE_BOUND * peak})
        return Footprint.measured({examples: trial}, self._vector_bytes + SMALL_BYTES)

    @property
    def _vector_bytes(self) -> int:
        """Of a probe's vector and product."""
        return 2 * self.problem.num_parameters * self.arithmetic.vectors.itemsize

    def usable(self, segments: Segments) -> bool:
        """Whether products in these segments are right, though perhaps beyond the budget."""
        return self.footprint(segments) is not None or not self.refused[segments]

    def footprint(self, segments: Segments, beyond: bool = False) -> Footprint | None:
        """Bytes of a kind of segments; None where it does not fit or cannot be used.

        ``beyond``: whatever the budget, as far as the device has memory.
        """
        known = _MEASURED.setdefault(self.problem, {})
        key = self.derivative.name, segments
        if key in known:
            return known[key]
        if segments in self.refused and not beyond:
            return None
        device = self.problem.device
        limit = budget_bytes("auto", device) if beyond else self.budget
        try:
            with measuring(device, limit):
                self.refused[segments] = self._unusable(segments)
            if self.refused[segments]:
                return None
            trials = self._trial(segments, limit)
        except Exception as error:
            if not isinstance(error, OverBudget) and not is_out_of_memory(error):
                raise
            self.refused[segments] = ""
            return None
        del self.refused[segments]
        known[key] = Footprint.measured(trials, self._vector_bytes)
        return known[key]

    def _unusable(self, segments: Segments) -> str:
        """Why layers cannot be segments, else "".

        Raises:
            NotTwiceDifferentiable: the loss has no second derivative.
        """
        if segments.layers and not repeated_layers(self.problem.model):
            return "no repeated layers"
        _, batch = self.problem.samples[0]
        with recomputing(self.problem, replace(segments, layers=False)), torch.enable_grad():
            loss = self.problem.batch_loss(batch)
            refuse_once_differentiable(loss)
            if not segments.layers:
                return ""
            expected = self._gradients(loss)
        try:
            with recomputing(self.problem, segments), torch.enable_grad():
                gradients = self._gradients(self.problem.batch_loss(batch))
        except RuntimeError as error:  # an operation in place on what comes in, say
            if is_out_of_memory(error):
                raise
            return str(error).split("\n")[0]
        allowed = torch.finfo(self.problem.dtype).eps ** 0.5
        pairs = zip(expected, gradients, strict=True)
        if any((a - b).norm() > allowed * a.norm() for a, b in pairs):
            return "they read more than their arguments and parameters"
        return ""

    def _gradients(self, loss: Tensor) -> Sequence[Tensor]:
        parameters = list(self.problem.parameters.values())
        return torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)

    def _trial(self, segments: Segments, limit: int) -> dict[int, Trial]:
        """Trials on the samples, by their examples; on fake tensors where real ones take long."""
        device = self.problem.device
        if self._is_long() and device.type == "cpu":  # CUDA's allocator counts only what is real
            try:
                fake = FakeProblem(self.problem)
                with fake.installed(), measuring(device, limit) as live:
                    samples = [(n, fake.batch(batch)) for n, batch in self.problem.samples]
                    return self._trials(fake, samples, segments, live)
            except OverBudget:
                raise
            except Exception:
                # A model may look at values, which are not there; real passes take longer, that
                # is all.
                pass
        with measuring(device, limit) as live:
            return self._trials(self.problem, self.problem.samples, segments, live)

    def _is_long(self) -> bool:
        examples = sum(n for n, _ in self.problem.samples)
        return examples * self.example_operations * TRIAL_PASSES > WORTH_FAKING

    def _trials(
        self,
        problem: Problem | FakeProblem,
        samples: Sequence[tuple[int, Batch]],
        segments: Segments,
        live: ByteCounter,
    ) -> dict[int, Trial]:
        trials: dict[int, Trial] = {}
        rows: Sequence[int] = MEASURED_ROWS
        # The same numbers of probes for all samples: those that fit the most examples.
        for n, batch in reversed(samples):
            trials[n] = self._counted(problem, batch, segments, live, rows)
            rows = tuple(trials[n].passes)
        return dict(sorted(trials.items()))

    def _counted(
        self,
        problem: Problem | FakeProblem,
        batch: Batch,
        segments: Segments,
        live: ByteCounter,
        numbers_of_rows: Sequence[int],
    ) -> Trial:
        """Records the graph of ``batch``, then passes of several probes, as many as fit."""
        live.restart()
        start = live.now
        names = list(problem.parameters)
        route = self.derivative.recorded(problem, recorded=True, segments=segments)
        with self.arithmetic.active():
            for _ in route.products(batch, names, ()):  # records
                pass
            graph = live.now - start
            recording = live.peak - live.now
            passes: dict[int, int] = {}
            for rows in numbers_of_rows:
                if rows == 1 and passes:
                    break
                live.restart()
                vectors = [
                    p.new_zeros(()).expand(rows, *p.shape) for p in problem.parameters.values()
                ]
                try:
                    # The product of fewer rows is alive meanwhile, in ``_``, and counted once more:
                    # a probe is taken to need 10 to 30 % more than it does.
                    for _ in route.products(batch, names, [vectors]):
                        passes[rows] = live.peak - start - graph
                except OverBudget:
                    # What fewer rows have shown has to do.
                    if rows == 1:
                        raise
        if not route.batched and isinstance(problem, FakeProblem):
            # The attempt at a batched pass, which failed, held something as well.
            raise CannotFake(route.fallback)
        return Trial(graph, recording, passes)
