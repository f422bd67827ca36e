"""One moment of training: what a measure has to hand.

Letters: P parameters, w weights, u the last update of all weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.problem.problem import Problem

Update = Mapping[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """The weights as they are, and the step that led to them.

    Attributes:
        operator: of the Problem that is followed, on batches of its own.
        blocks: what ``scale`` compares.
        num_probes: random vectors a reading may use.
        seed: of these.
        optimizer: whose steps are followed; None where there is none.
        before: weights before the last step, by name; None where they were not kept.
        vectors: what a measure leaves for its next time, such as an eigenvector to start from.
    """

    operator: CurvatureOperator
    blocks: Partition
    num_probes: int
    seed: int
    optimizer: torch.optim.Optimizer | None
    before: Update | None
    vectors: dict[str, Tensor]

    @property
    def problem(self) -> Problem:
        return self.operator.problem

    def generator(self) -> torch.Generator:
        """Of the operator's device, the same at every moment."""
        return torch.Generator(self.operator.device).manual_seed(self.seed)

    def update(self) -> Tensor:
        """u, (P,), in the operator's dtype."""
        assert self.before is not None
        moved = [
            (p.detach() - self.before[name]).reshape(-1)
            for name, p in self.problem.parameters.items()
        ]
        return torch.cat(moved).to(self.operator.dtype)

    def loss(self) -> float:
        """L at the weights as they are; no graph is built unless the loss needs one."""
        problem = self.problem
        pairs = zip(problem.weights, problem.batches, strict=True)
        with problem.evaluating():
            return sum(weight * problem.batch_value(batch) for weight, batch in pairs)

    @contextmanager
    def moved(self) -> Iterator["Line"]:
        """The line through the weights before and after the last step; they are put back."""
        assert self.before is not None
        after = {name: p.detach().clone() for name, p in self.problem.parameters.items()}
        try:
            yield Line(self, dict(self.before), after)
        finally:
            with torch.no_grad():
                for name, p in self.problem.parameters.items():
                    p.copy_(after[name])


@dataclass(frozen=True)
class Line:
    """w_before + factor (w_after - w_before)."""

    moment: Moment
    before: Update
    after: Update

    def loss(self, factor: float) -> float:
        """L at ``factor``; leaves the weights there."""
        with torch.no_grad():
            for name, p in self.moment.problem.parameters.items():
                p.copy_(torch.lerp(self.before[name], self.after[name], factor))
        return self.moment.loss()
