"""HessianOperator: products with the Hessian of a Problem's loss and with its diagonal blocks.

How they are computed is the engine's business (:mod:`hessian_tools.curvature.engine.engine`).

Letters: P parameters.
"""

import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.engine.engine import ROUTES, Collect, Engine, Spread
from hessian_tools.curvature.engine.plan import Plan, PlanRequest, passes_of_a_product
from hessian_tools.curvature.engine.precision import PRECISIONS, arithmetic, dtype_inside
from hessian_tools.curvature.engine.recompute import Segments
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.quick import verify_quickly
from hessian_tools.curvature.referees import Reference, finite_difference, float64_copy
from hessian_tools.curvature.verification import Verification, verify
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem

LEVELS = ("full", "quick")  # of verification


class HessianOperator(CurvatureOperator):
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
            :class:`hessian_tools.curvature.engine.recompute.Segments`; None lets the budget decide.
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
        if not isinstance(problem, Problem):
            raise TypeError(
                f"problem is a {type(problem).__name__}; pass ht.Problem(model, loss_fn, batches)"
            )
        chosen = arithmetic(problem.model, precision)
        super().__init__(problem, replace(chosen, inside=dtype_inside(problem)))
        if route not in ROUTES:
            allowed = ", ".join(map(repr, ROUTES))
            raise ValueError(f"route is {route!r}; allowed are {allowed}")
        if microbatch is not None and (int(microbatch) != microbatch or microbatch < 1):
            raise ValueError(
                f"microbatch is {microbatch!r}; give a whole number of examples, at least 1, or "
                "None to let the memory budget decide"
            )
        request = PlanRequest(record, microbatch, segments)
        self._engine = Engine(problem, self.arithmetic, memory, request, route)
        self.announced = 0.0  # forward passes of the products that were last announced

    def products(
        self,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> None:
        self._engine.products(names, count, spread, collect)

    def rebuilt(
        self,
        problem: Problem,
        *,
        memory: str | int = "auto",
        microbatch: int | None = None,
        record: bool | None = None,
    ) -> "HessianOperator":
        # TF32 is about products in float32; a copy in another dtype has nothing to do with it
        alike = problem.dtype == self.problem.dtype
        return HessianOperator(
            problem,
            memory=memory,
            microbatch=microbatch,
            record=record,
            precision=self.arithmetic.precision if alike else PRECISIONS[0],
        )

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        return finite_difference(problem, direction)

    def expect(self, num_matvecs: int, blocks: int = 1) -> None:
        """Announces how many products will follow, of one block (the whole Hessian) or of several.

        With ``route="auto"`` it is decided now whether compiling pays.
        """
        self._engine.expect(num_matvecs, blocks == 1)

    def steady(self) -> AbstractContextManager[None]:
        return self._engine.steady()

    def verify(
        self,
        blocks: Sequence[Block] = (),
        *,
        seed: int = 0,
        level: str = "full",
    ) -> Verification:
        """Holds this operator against finite differences and a Hessian's properties.

        Needs a float64 copy of the model, and about 100 forward passes for the ``level`` "full"
        (:func:`hessian_tools.curvature.verification.verify`), some 15 for "quick", the essential
        ones of these checks (:mod:`hessian_tools.curvature.quick`), without ``blocks``.

        Raises:
            ValueError: another ``level``.
        """
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; allowed are {', '.join(map(repr, LEVELS))}")
        if level == "quick":
            return verify_quickly(self, seed)
        return verify(self, blocks, seed=seed)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._engine.release()

    @property
    def route(self) -> str:
        """How products are computed, in words."""
        return self._engine.described

    @property
    def plan(self) -> Plan:
        """How products keep within the memory budget; another one after memory has run out.

        Its bytes are measured: where a bound of them has done so far, trials (33 to 100 forward
        passes of an example) are made now.
        """
        self._engine.measure()
        return self._engine.plan

    @property
    def krylov_bytes(self) -> int:
        """What the budget leaves for Lanczos vectors."""
        return self._engine.plan.krylov_bytes

    def announcement(self, products: int, blocks: int) -> str:
        """The plan in lines to print before ``products`` products of ``blocks`` blocks.

        Times a forward pass to forecast how long they take.
        """
        self.announced = products * passes_of_a_product(blocks == 1)
        self._engine.measure_if_worth(self.announced)
        plan = self._engine.plan
        pieces = [batch for _, batch in plan.pieces]
        with self.problem.evaluating():
            self.problem.batch_value(pieces[0])  # the first pass pays for warming up
            started = time.perf_counter()
            self.problem.batch_value(pieces[0])
            seconds = time.perf_counter() - started
        examples = [batch_length(piece) or 1 for piece in pieces]
        share = examples[0] / sum(examples)
        return plan.announcement(products, blocks, seconds / share)


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
