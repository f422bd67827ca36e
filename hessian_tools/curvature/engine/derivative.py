"""Which matrix a route's products are with, and how each route is made for it."""

from typing import Protocol

from hessian_tools.curvature.engine.double_backward import DoubleBackward
from hessian_tools.curvature.engine.recorded import RecordedRoute
from hessian_tools.curvature.engine.through_outputs import OutputMatrix, ThroughOutputs
from hessian_tools.curvature.segments.fake_problem import FakeProblem
from hessian_tools.curvature.segments.recompute import NONE, Segments
from hessian_tools.curvature.tangent.graph import Trace, traced_gradient, traced_through_outputs
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem


class Derivative(Protocol):
    """A matrix of second-order derivatives of a Problem, known by its routes.

    Attributes: ``name``, unlike that of any other matrix of a Problem; ``passes``, the counted cost
    of a probe in forward passes, of the whole matrix and of one block of many.
    """

    @property
    def name(self) -> str: ...

    @property
    def passes(self) -> tuple[float, float]: ...

    def recorded(
        self,
        problem: Problem | FakeProblem,
        recorded: bool = False,
        segments: Segments = NONE,
    ) -> RecordedRoute:  # type: ignore[type-arg]  # whatever it records
        """The route that differentiates recorded graphs."""
        ...

    def traced(self, problem: Problem, batch: Batch) -> Trace:
        """The graph whose tangents the products are."""
        ...


class OfTheLoss:
    """The Hessian."""

    name = "hessian"
    passes = (6.0, 1.3)

    def recorded(
        self,
        problem: Problem | FakeProblem,
        recorded: bool = False,
        segments: Segments = NONE,
    ) -> DoubleBackward:
        return DoubleBackward(problem, recorded, segments)

    def traced(self, problem: Problem, batch: Batch) -> Trace:
        return traced_gradient(problem, batch)


class OfTheOutputs:
    """J' M J for a matrix M between the model's outputs."""

    passes = (4.0, 1.2)

    def __init__(self, matrix: OutputMatrix) -> None:
        self.matrix = matrix

    @property
    def name(self) -> str:
        return self.matrix.name

    def recorded(
        self,
        problem: Problem | FakeProblem,
        recorded: bool = False,
        segments: Segments = NONE,
    ) -> ThroughOutputs:
        return ThroughOutputs(problem, self.matrix, recorded, segments)

    def traced(self, problem: Problem, batch: Batch) -> Trace:
        return traced_through_outputs(problem, batch, self.matrix.moving)


HESSIAN = OfTheLoss()
