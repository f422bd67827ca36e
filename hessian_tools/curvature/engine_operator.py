"""Curvature operators whose products the engine computes: what they have in common.

How products are computed is the engine's business (:mod:`hessian_tools.curvature.engine.engine`).
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.engine.derivative import Derivative
from hessian_tools.curvature.engine.engine import ROUTES, Collect, Engine, Spread
from hessian_tools.curvature.engine.plan import Plan, PlanRequest
from hessian_tools.curvature.engine.precision import PRECISIONS, arithmetic, dtype_inside
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.quick import verify_quickly
from hessian_tools.curvature.segments.recompute import Segments
from hessian_tools.curvature.verification import Verification, verify
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem

LEVELS = ("full", "quick")  # of verification


class EngineOperator(CurvatureOperator):
    """A (P, P) matrix of second derivatives of a Problem, computed within a memory budget.

    A subclass says which ``derivative``, and how a referee computes the same (:meth:`reference`).
    The other arguments, and what is raised, are those of :class:`hessian_tools.HessianOperator`.
    ``computed`` is the Problem that the engine evaluates, where it is not ``problem`` itself.
    """

    def __init__(
        self,
        problem: Problem,
        derivative: Derivative,
        *,
        memory: str | int,
        record: bool | None,
        microbatch: int | None,
        segments: Segments | None,
        precision: str,
        route: str,
        computed: Problem | None = None,
    ) -> None:
        check_problem(problem)
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
        self._engine = Engine(
            computed or problem, self.arithmetic, memory, request, route, derivative
        )
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
    ) -> "EngineOperator":
        # TF32 is about products in float32; a copy in another dtype has nothing to do with it
        alike = problem.dtype == self.problem.dtype
        return self._like(
            problem,
            memory=memory,
            microbatch=microbatch,
            record=record,
            precision=self.arithmetic.precision if alike else PRECISIONS[0],
        )

    def _like(self, problem: Problem, **options: Any) -> "EngineOperator":  # its own arguments
        """The same kind of operator of another Problem."""
        return type(self)(problem, **options)

    def expect(self, num_matvecs: int, blocks: int = 1) -> None:
        """Announces how many products will follow, of one block (the whole matrix) or of several.

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
        """Holds this operator against its referee and a symmetric matrix's properties.

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
        self.announced = products * self._engine.passes(blocks == 1)
        self._engine.measure_if_worth(self.announced)
        plan = self._engine.plan
        pieces = [batch for _, batch in plan.pieces]
        problem = self._engine.problem
        with problem.evaluating():
            problem.batch_value(pieces[0])  # the first pass pays for warming up
            started = time.perf_counter()
            problem.batch_value(pieces[0])
            seconds = time.perf_counter() - started
        examples = [batch_length(piece) or 1 for piece in pieces]
        share = examples[0] / sum(examples)
        passes = self._engine.passes(blocks == 1)
        return plan.announcement(products, blocks, passes, seconds / share, f"{self.title}-vector")


def check_problem(problem: object) -> None:
    """Raises TypeError for what is no Problem."""
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem is a {type(problem).__name__}; pass ht.Problem(model, loss_fn, batches)"
        )
