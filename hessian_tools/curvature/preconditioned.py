"""PreconditionedOperator: P^-1/2 A P^-1/2 for any curvature operator A and preconditioner P.

It has the eigenvalues of P^-1 A, and is symmetric. They decide how fast w <- w - eta P^-1 g
converges on the local quadratic. With P from a live optimizer
(:func:`hessian_tools.preconditioner_of`) it is the curvature that this optimizer meets.

Products take whole tensors to the coordinates of A and back. A diagonal block, that of a piece of
a tensor as well, is thus the block of P^-1/2 A P^-1/2. It is P_bb^-1/2 A_bb P_bb^-1/2 only where P
does not mix the block with entries outside of it, as is so for a diagonal P.

Rounding of A's products is scaled as well. An entry without gradient (a bias before BatchNorm) has
Adam's d = eps, so that 1 / d = 1e8 blows up what rounding leaves of a zero. ``verify`` then fails
in float32, and rightly; take a float64 copy, or a larger eps.

Letters: r rows (vectors) of a batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.engine.engine import Collect, Spread
from hessian_tools.curvature.engine.plan import Plan
from hessian_tools.curvature.engine_operator import EngineOperator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.preconditioners import DiagonalPreconditioner, Preconditioner
from hessian_tools.curvature.referees import Reference
from hessian_tools.curvature.verification import Verification, verify
from hessian_tools.problem.problem import Problem


class PreconditionedOperator(CurvatureOperator):
    """P^-1/2 A P^-1/2 for a curvature operator A, in A's arithmetic.

    Memory, plan and route are those of A. What P changes after this operator was made (a further
    step of the optimizer it came from) does not reach it.

    Args:
        operator: A.
        preconditioner: P, or the diagonal of P by parameter name.

    Raises:
        TypeError: for an ``operator`` that is no curvature operator.
        ValueError: for a ``preconditioner`` that does not fit the Problem's parameters.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        preconditioner: Preconditioner | Mapping[str, Tensor],
    ) -> None:
        if not isinstance(operator, CurvatureOperator):
            raise TypeError(
                f"operator is a {type(operator).__name__}; pass a curvature operator, such as "
                "ht.HessianOperator(problem)"
            )
        super().__init__(operator.problem, operator.arithmetic)
        if not isinstance(preconditioner, Preconditioner):
            preconditioner = DiagonalPreconditioner(preconditioner)
        preconditioner.check(operator.problem.parameters)
        self.matrix = f"preconditioned-{operator.matrix}"
        self.title = f"preconditioned {operator.title}"
        self.referee = operator.referee
        self.operator = operator
        self.preconditioner = preconditioner  # as given, to be cast from
        self._scaling = preconditioner.to(self.dtype, self.device)

    def products(
        self,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> None:
        def scaled_in(part: slice) -> list[Tensor | None]:
            return self._scaled(names, spread(part))

        def scaled_out(part: slice, products: Sequence[Tensor | None], weight: float) -> None:
            collect(part, self._scaled(names, products), weight)

        self.operator.products(names, count, scaled_in, scaled_out)

    def rebuilt(
        self,
        problem: Problem,
        *,
        memory: str | int = "auto",
        microbatch: int | None = None,
        record: bool | None = None,
    ) -> "PreconditionedOperator":
        inner = self.operator.rebuilt(
            problem,
            memory=memory,
            microbatch=microbatch,
            record=record,
        )
        return PreconditionedOperator(inner, self.preconditioner)

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        """The product of A's own referee, scaled in the dtype of ``problem``.

        Its uncertainty is taken as A's: where A's referee errs in proportion to each entry, that is
        what scaling leaves.
        """
        scaling = self.preconditioner.to(problem.dtype, problem.device)
        names = list(problem.parameters)
        pairs = zip(names, direction, strict=True)
        inner = self.operator.reference(problem, [_row(scaling, name, v) for name, v in pairs])
        results = zip(names, inner.product, strict=True)
        scaled = [_row(scaling, name, product) for name, product in results]
        return Reference(scaled, inner.uncertainty, inner.remark)

    def verify(
        self,
        blocks: Sequence[Block] = (),
        *,
        seed: int = 0,
        level: str = "full",
    ) -> Verification:
        """Holds this operator against its referee and a curvature's properties.

        The ``level`` "quick" is that of A itself, which has all that can go wrong with the model.
        Raises ValueError for another level.
        """
        if level == "full":
            return verify(self, blocks, seed=seed)
        return _planned(self.operator).verify(seed=seed, level=level)

    @property
    def plan(self) -> Plan:
        """A's plan of memory."""
        return _planned(self.operator).plan

    @property
    def announced(self) -> float:
        """Forward passes of the products that were last announced."""
        return _planned(self.operator).announced

    def announcement(self, products: int, blocks: int) -> str:
        """A's plan in lines to print before ``products`` products of ``blocks`` blocks."""
        return _planned(self.operator).announcement(products, blocks)

    @property
    def route(self) -> str:
        return f"preconditioned; {self.operator.route}"

    @property
    def signature(self) -> str:
        """With what P^-1/2 makes of ones, to six digits: rounding may differ between machines."""
        scaled = {
            name: self._scaling.inverse_root(name, torch.ones_like(p, dtype=self.dtype)[None])
            for name, p in self.problem.parameters.items()
        }
        told = [f"{name} {float(v.norm()):.6g} {float(v.sum()):.6g}" for name, v in scaled.items()]
        return f"{self.title} of {self.operator.signature}: {', '.join(told)}"

    @property
    def krylov_bytes(self) -> int:
        return self.operator.krylov_bytes

    def release(self) -> None:
        self.operator.release()

    def expect(self, num_matvecs: int, blocks: int = 1) -> None:
        self.operator.expect(num_matvecs, blocks)

    def steady(self) -> AbstractContextManager[None]:
        return self.operator.steady()

    def _scaled(
        self,
        names: Sequence[str],
        tensors: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """P^-1/2 times tensors (r, \\*shape); what is zero stays so, and costs nothing."""
        return [
            None if tensor is None else self._scaling.inverse_root(name, tensor)
            for name, tensor in zip(names, tensors, strict=True)
        ]


def _row(scaling: Preconditioner, name: str, tensor: Tensor) -> Tensor:
    """P^-1/2 times one vector, a tensor of the parameter's shape."""
    return scaling.inverse_root(name, tensor[None])[0]


def _planned(operator: CurvatureOperator) -> "EngineOperator | PreconditionedOperator":
    """A, which plans and verifies its products."""
    if isinstance(operator, EngineOperator | PreconditionedOperator):
        return operator
    raise AttributeError(
        f"{type(operator).__name__} makes no plan of its products; use "
        "hessian_tools.curvature.verify to verify it"
    )
