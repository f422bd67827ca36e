"""GaussNewtonOperator: products with the Gauss-Newton matrix of a Problem and its blocks."""

from collections.abc import Sequence

from torch import Tensor

from hessian_tools.curvature.engine.derivative import OfTheOutputs
from hessian_tools.curvature.engine.precision import PRECISIONS
from hessian_tools.curvature.engine_operator import EngineOperator, check_problem
from hessian_tools.curvature.outputs.matrices import LossHessian, Matrix
from hessian_tools.curvature.referees import Reference, outputs_difference
from hessian_tools.curvature.segments.recompute import Segments
from hessian_tools.problem.problem import Problem


class ThroughOutputsOperator(EngineOperator):
    """J' M J for a matrix M between outputs. Raises what GaussNewtonOperator does."""

    referee = "finite difference of the outputs"
    between_outputs: Matrix  # M

    def __init__(
        self,
        problem: Problem,
        *,
        memory: str | int = "auto",
        record: bool | None = None,
        microbatch: int | None = None,
        segments: Segments | None = None,
        precision: str = PRECISIONS[0],
        route: str = "auto",
        computed: Problem | None = None,
    ) -> None:
        check_problem(problem)
        _check_outputs(problem)
        super().__init__(
            problem,
            OfTheOutputs(self.between_outputs),
            memory=memory,
            record=record,
            microbatch=microbatch,
            segments=segments,
            precision=precision,
            route=route,
            computed=computed,
        )

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        return outputs_difference(problem, direction, self.between_outputs.reference)


class GaussNewtonOperator(ThroughOutputsOperator):
    """The (P, P) Gauss-Newton matrix J' H_z J of the pooled mean loss.

    J is the Jacobian of the outputs z in the parameters, H_z the loss's Hessian in z, exact for any
    loss that is twice differentiable in z. It is the Hessian without the outputs' own curvature,
    sum_i (dL/dz_i) d2z_i/dw2, equal to it where the outputs are linear in the parameters or fit
    perfectly, and positive semi-definite where the loss is convex in z (Schraudolph 2002, "Fast
    curvature matrix-vector products for second-order gradient descent"). With kinks (ReLU) the
    diagonal blocks of weight matrices of a plain chain of layers equal the Hessian's.

    A probe of the whole costs 4 F, the Hessian's 6 F. Arguments are those of
    :class:`hessian_tools.HessianOperator`.

    Raises:
        ValueError: besides those of HessianOperator: a loss that is one function of model and
            batch; :class:`hessian_tools.Loss` tells the outputs and the loss of outputs apart.
        NotTwiceDifferentiable: the loss in its outputs, or an operation whose backward pass cannot
            be differentiated.
    """

    matrix = "ggn"
    title = "Gauss-Newton matrix"
    between_outputs = LossHessian()


def _check_outputs(problem: Problem) -> None:
    """What is wrong with the outputs is said before anything is planned or traced."""
    _, batch = problem.samples[0]
    with problem.evaluating():
        problem.batch_outputs(batch)
