"""Route: products with J' M J of a micro-batch, J the Jacobian of the model's outputs z.

M is a symmetric matrix between outputs, such as the Hessian of the loss in them (Gauss-Newton). One
product is three linear maps, v -> J v -> M J v -> J' M J v. J' u is an ordinary backward pass. J v
is a backward pass through one: g(u) = J' u is linear in a cotangent u that stands for any, so

    J v = d/du <g(u), v>

(Townsend 2017, "A new trick for calculating Jacobian vector products"). Both graphs are recorded
once per micro-batch, for 3 F; a probe of the whole matrix then costs 4 F, where the Hessian's costs
6 F. A diagonal block costs what lies downstream of it, twice: autograd prunes both passes to that.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hessian_tools.curvature.engine.recorded import RecordedRoute
from hessian_tools.curvature.segments.fake_problem import FakeProblem
from hessian_tools.curvature.segments.recompute import NONE, Segments
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem

RowMap = Callable[[Tensor], Tensor]  # (r, *shape of z) -> the same, linear in every row


class OutputMatrix(Protocol):
    """A symmetric positive semi-definite matrix M between the outputs of one micro-batch."""

    @property
    def name(self) -> str:
        """Of J' M J, in words; no two matrices of a Problem share one."""
        ...

    def at(self, problem: Problem | FakeProblem, outputs: Tensor, batch: Batch) -> RowMap:
        """The products with M at ``outputs``, which are without a graph."""
        ...

    def moving(
        self,
        problem: Problem,
        outputs: Tensor,
        fixed: Tensor,
        batch: Batch,
    ) -> Tensor:
        """A function of ``outputs`` whose derivative is M at ``fixed``, which has their values."""
        ...


@dataclass(frozen=True)
class Passes:
    """What one micro-batch's products are made of."""

    outputs: Tensor  # z with its graph
    cotangent: Tensor  # u
    gradients: dict[str, Tensor]  # g(u) by parameter, with its graph
    middle: RowMap  # M


class ThroughOutputs(RecordedRoute[Passes | None]):
    """Products with J' M J; None is recorded where no parameter asked for moves the outputs."""

    kind = "forward and back through the outputs"

    def __init__(
        self,
        problem: Problem | FakeProblem,
        matrix: OutputMatrix,
        recorded: bool = False,
        segments: Segments = NONE,
    ) -> None:
        super().__init__(problem, recorded, segments)
        self.matrix = matrix

    def _record(self, batch: Batch, names: Sequence[str]) -> Passes | None:
        parameters = [self.problem.parameters[name] for name in names]
        with torch.enable_grad():
            with self._noticing_recomputation():
                outputs = self.problem.batch_outputs(batch)
            if not outputs.requires_grad:
                return None
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            found = torch.autograd.grad(
                outputs, parameters, cotangent, create_graph=True, allow_unused=True
            )
        gradients = {name: g for name, g in zip(names, found, strict=True) if g is not None}
        self._check_finite(gradients, lambda: "the outputs are finite")
        middle = self.matrix.at(self.problem, outputs.detach(), batch)
        return Passes(outputs, cotangent, gradients, middle)

    def _tensors(self, graph: Passes | None) -> Iterable[Tensor]:
        return [] if graph is None else [graph.outputs, *graph.gradients.values()]

    def _differentiated(
        self,
        graph: Passes | None,
        names: Sequence[str],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        moved = None if graph is None else self._moved(graph, names, cotangents)
        if graph is None or moved is None:
            return [None] * len(names)
        inputs = [self.problem.parameters[name] for name in names]
        return self._derivatives([graph.outputs], inputs, [graph.middle(moved)])

    def _moved(
        self,
        graph: Passes,
        names: Sequence[str],
        vectors: Sequence[Tensor | None],
    ) -> Tensor | None:
        """J v for each row, (r, *shape of z); None for zero."""
        pairs = [
            (graph.gradients[name], vector)
            for name, vector in zip(names, vectors, strict=True)
            if name in graph.gradients and vector is not None
        ]
        if not pairs:
            return None
        outputs = [gradient for gradient, _ in pairs]
        rows = [vector.to(gradient.dtype) for gradient, vector in pairs]
        (moved,) = self._derivatives(outputs, [graph.cotangent], rows)
        return moved
