"""HessianOperator: products with the Hessian of a Problem's loss and with its diagonal blocks.

Letters: P parameters.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hessian_tools.curvature.engine.derivative import HESSIAN
from hessian_tools.curvature.engine.precision import PRECISIONS
from hessian_tools.curvature.engine_operator import EngineOperator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.referees import Reference, finite_difference, float64_copy
from hessian_tools.curvature.segments.recompute import Segments
from hessian_tools.problem.problem import Problem


class HessianOperator(EngineOperator):
    """The (P, P) Hessian of L, the pooled mean loss of a Problem.

    Vectors follow the order of ``problem.parameters``. Products are computed in the dtype of the
    parameters; ``dtype``, that of vectors, products and sums over batches, is float32 where that is
    bfloat16. When memory runs out all the same, fewer probes go together, then graphs are rebuilt,
    batches cut, segments recomputed, with one warning.

    Args:
        problem: the Problem.
        memory: budget beyond model and data: "auto" (70 % of what is free), bytes, or "8GiB". It
            decides whether gradient graphs are recorded, how batches are cut, how many probes go
            together, and how Lanczos must save.
        record: force recording (True) or rebuilding (False) of the graphs; None lets the budget
            decide.
        microbatch: cut batches to at most this many examples; None lets the budget decide.
        segments: what is computed again instead of kept, a
            :class:`hessian_tools.curvature.segments.recompute.Segments`; None lets the budget
            decide.
        precision: of float32 matrix products and convolutions on CUDA: "ieee" (true float32),
            "tf32" (faster), or "as given", as the process is set (PyTorch's own: TF32 for
            convolutions). See :mod:`hessian_tools.curvature.engine.precision`.
        route: "double backward"; "tangent program", which is faster, but must be traced (seconds)
            and checked against the former; "auto" changes from the first to the second, if it can,
            once products have cost enough, or at once where :meth:`expect` announces that they
            will.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut; a model
            in float16; a ``precision`` that is unknown, or TF32 for a model that is not in float32.
        NotTwiceDifferentiable: naming the operation or custom Function.
        NumericalError: for a gradient that is not finite.
    """

    matrix = "hessian"
    title = "Hessian"

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
    ) -> None:
        super().__init__(
            problem,
            HESSIAN,
            memory=memory,
            record=record,
            microbatch=microbatch,
            segments=segments,
            precision=precision,
            route=route,
        )

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        return finite_difference(problem, direction)


def as_operator(curvature: Problem | CurvatureOperator) -> CurvatureOperator:
    """The operator itself; of a Problem its Hessian.

    Raises:
        TypeError: for anything else.
    """
    return curvature if isinstance(curvature, CurvatureOperator) else HessianOperator(curvature)


def problem_of(curvature: Problem | CurvatureOperator) -> Problem:
    """The Problem itself, or that of an operator.

    Raises:
        TypeError: for anything else.
    """
    problem = curvature.problem if isinstance(curvature, CurvatureOperator) else curvature
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem is a {type(problem).__name__}; pass an ht.Problem or an ht.HessianOperator"
        )
    return problem


def in_float64(
    curvature: Problem | CurvatureOperator,
    memory: str | int = "auto",
) -> tuple[CurvatureOperator, str]:
    """The operator in float64 where that can be had, else as it is; and in words how it computes.

    A Problem or operator in another dtype is copied; where no copy can be made, products are in its
    own arithmetic, with a warning. ``memory`` is the budget of an operator that is made here.
    """
    problem = problem_of(curvature)
    if all(p.dtype == torch.float64 for p in problem.parameters.values()):
        if isinstance(curvature, CurvatureOperator):
            return curvature, "float64"
        return HessianOperator(problem, memory=memory), "float64"
    copied = float64_copy(problem)
    words = "float64 copy"
    if copied is None:
        dtype = f"{problem.dtype}".removeprefix("torch.")
        words = f"{dtype}: no float64 copy could be made"
        warnings.warn(f"products are in {words}", RuntimeWarning, stacklevel=3)
    if isinstance(curvature, CurvatureOperator):
        return curvature.rebuilt(copied or problem, memory=memory), words
    return HessianOperator(copied or problem, memory=memory), words
