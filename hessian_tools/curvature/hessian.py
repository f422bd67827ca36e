"""HessianOperator: products with the Hessian of a Problem's loss and with its diagonal blocks.

How they are computed is the engine's business (:mod:`hessian_tools.curvature.engine.engine`); here vectors become tensors of the
parameters' shapes, and products vectors.

Letters: P parameters, k probes, n size of a block, B blocks of a cut, r = B k rows.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block, Cut
from hessian_tools.curvature.engine.engine import ROUTES, Engine
from hessian_tools.curvature.engine.plan import Plan, Wishes
from hessian_tools.curvature.engine.precision import PRECISIONS, arithmetic
from hessian_tools.curvature.engine.recompute import Segments
from hessian_tools.curvature.operators import SymmetricOperator
from hessian_tools.curvature.verification import Verification, verify
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem


class _Sum:
    """The products of micro-batches, added up in the dtype of the vectors: ``rows`` (k, n), pieces of given sizes."""

    def __init__(self, vectors: Tensor, sizes: Sequence[int]) -> None:
        self.rows, self._sizes = torch.empty_like(vectors), sizes
        self._begun = 0  # rows below this hold a sum; the others' first product is written, which saves two passes

    def add(self, part: slice, products: Sequence[Tensor | None], weight: float) -> None:
        first = part.start >= self._begun
        for place, product in zip(self.rows[part].split(self._sizes, dim=1), products, strict=True):
            if product is None:
                if first:
                    place.zero_()
            elif first:
                place.copy_(product.reshape(place.shape))
                if weight != 1:
                    place.mul_(weight)
            else:
                place.add_(product.reshape(place.shape), alpha=weight)
        self._begun = max(self._begun, part.stop)


class HessianOperator(SymmetricOperator):
    """The (P, P) Hessian of L, the pooled mean loss of a Problem; vectors follow ``problem.parameters``' order.

    Args:
        problem: the Problem.
        memory: budget beyond model and data: "auto" (70 % of what is free), bytes, or "8GiB". It decides whether
            gradient graphs are recorded, how batches are cut, how many probes go together, and how Lanczos must save.
        record: force recording (True) or rebuilding (False) of the graphs; None lets the budget decide.
        microbatch: cut batches to at most so many examples; None lets the budget decide.
        segments: what is computed again instead of kept, a :class:`hessian_tools.curvature.engine.recompute.Segments`; None lets the
            budget decide.
        precision: of float32 matrix products and convolutions on CUDA: "ieee" (true float32), "tf32" (faster), or "as
            given", as the process is set (PyTorch's own: TF32 for convolutions). See :mod:`hessian_tools.curvature.engine.precision`.
        route: "double backward"; "tangent program", which is faster, but must be traced (seconds) and checked against
            the former; "auto" changes from the first to the second, if it can, once products have cost enough, or at
            once where :meth:`expect` says that they will.

    Products are computed in the dtype of the parameters; ``dtype``, that of vectors, products and sums over batches, is
    float32 where that is bfloat16. ``arithmetic`` says what came of it.
    ``plan`` says what is recorded, cut and recomputed and the peak it expects, ``route`` in words how products are
    computed, ``krylov_bytes`` what the budget leaves for Lanczos vectors. When memory runs out all the same, fewer
    probes go together, then graphs are rebuilt, batches cut, segments recomputed, with one warning.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut; a model in float16; a
            ``precision`` that is unknown, or TF32 for a model that is not in float32.
        NotTwiceDifferentiable: naming the operation or custom Function.
        NumericalError: for a gradient that is not finite.
    """

    def __init__(
        self, problem: Problem, *, memory: str | int = "auto", record: bool | None = None,
        microbatch: int | None = None, segments: Segments | None = None, precision: str = PRECISIONS[0],
        route: str = "auto",
    ) -> None:  # fmt: skip
        if not isinstance(problem, Problem):
            raise TypeError(
                f"problem is a {type(problem).__name__}; pass ht.Problem(model, loss_fn, batches)"
            )
        self.arithmetic = arithmetic(problem.model, precision)
        super().__init__(problem.num_parameters, self.arithmetic.vectors, problem.device)
        self.problem = problem
        if route not in ROUTES:
            raise ValueError(f"route is {route!r}; allowed are {', '.join(map(repr, ROUTES))}")
        self._engine = Engine(
            problem, self.arithmetic, memory, Wishes(record, microbatch, segments), route
        )

    def _matmat(self, vectors: Tensor) -> Tensor:
        shapes = [p.shape for p in self.problem.parameters.values()]
        sizes = [shape.numel() for shape in shapes]
        total = _Sum(vectors, sizes)

        def spread(part: slice) -> list[Tensor]:
            pieces = zip(vectors[part].split(sizes, dim=1), shapes, strict=True)
            return [piece.reshape(-1, *shape) for piece, shape in pieces]

        self._engine.products(list(self.problem.parameters), len(vectors), spread, total.add)
        return total.rows

    def block(self, block: Block) -> "StackedBlocks":
        """The diagonal block H_bb of one Block, an (n, n) operator."""
        return StackedBlocks(self, block.as_cut())

    def stacked(self, cut: Cut) -> "StackedBlocks":
        """All diagonal blocks of a Cut, whose products go through the engine together."""
        return StackedBlocks(self, cut)

    def expect(self, num_matvecs: int, blocks: int = 1) -> None:
        """So many products will be asked for, of one block (the whole Hessian) or of several: "auto" then does at once
        what a long run is worth. Those who run Lanczos on this operator (:func:`hessian_tools.slq`) say it themselves.
        """
        self._engine.expect(num_matvecs, blocks == 1)

    def verify(self, blocks: Sequence[Block] = (), *, seed: int = 0) -> Verification:
        """Holds this operator against finite differences of the gradient and against what a Hessian must fulfil.

        Costs about 100 forward passes and a float64 copy of the model. See :func:`hessian_tools.curvature.verification.verify`.
        """
        return verify(self, blocks, seed=seed)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._engine.release()

    @property
    def route(self) -> str:
        return self._engine.described

    @property
    def plan(self) -> Plan:
        """How products are computed within the memory budget; another one after memory has run out."""
        return self._engine.plan

    def announcement(self, products: int, blocks: int) -> str:
        """The plan in lines to print before ``products`` products of ``blocks`` blocks; times a forward pass."""
        problem, (_, batch) = self.problem, self.plan.pieces[0]
        with problem.evaluating(), torch.no_grad():
            float(problem.batch_loss(batch))  # the first pass pays for warming up
            started = time.perf_counter()
            float(problem.batch_loss(batch))
            seconds = time.perf_counter() - started
        share = (batch_length(batch) or 1) / sum(
            batch_length(piece) or 1 for _, piece in self.plan.pieces
        )
        return self.plan.announcement(products, blocks, seconds / share)

    @property
    def krylov_bytes(self) -> int:
        return self.plan.krylov_bytes


class StackedBlocks(SymmetricOperator):
    """The B diagonal blocks of a Cut side by side: row i of a batch of r = B k belongs to block i // k.

    One block (B = 1) is an (n, n) operator H_bb like any other; to Lanczos, which works row by row, several are one as
    well. ``names`` are the blocks'. ``matmat`` raises ValueError for a number of rows that is no multiple of B.
    """

    def __init__(self, hessian: HessianOperator, cut: Cut) -> None:
        super().__init__(cut.block_size, hessian.dtype, hessian.device)
        self._engine = hessian._engine
        self.cut, self.num_blocks, self.names = cut, cut.num_blocks, cut.names

    def _matmat(self, vectors: Tensor) -> Tensor:
        if vectors.shape[0] % self.num_blocks:
            raise ValueError(
                f"vectors has {vectors.shape[0]} rows; {self.num_blocks} blocks need a multiple of that"
            )
        names = list(self.cut.parameters)
        sizes = [part.block_size for part in self.cut.parts]
        total = _Sum(vectors, sizes)
        # a row is its block's vector in that block's place of the tensor, and zero elsewhere
        owner = torch.arange(len(vectors), device=self.device) // max(
            1, len(vectors) // self.num_blocks
        )

        def spread(rows: slice) -> list[Tensor]:
            wide: dict[str, Tensor] = {}
            for part, piece in zip(self.cut.parts, vectors[rows].split(sizes, dim=1), strict=True):
                if (
                    self.num_blocks == 1
                    and not part.axes
                    and piece.shape[1] == math.prod(part.shape)
                ):
                    wide[part.parameter] = piece.reshape(-1, *part.shape)
                    continue
                placed = piece.new_zeros(len(piece), self.num_blocks, piece.shape[1])
                placed[torch.arange(len(piece), device=self.device), owner[rows]] = piece
                if part.parameter not in wide:
                    wide[part.parameter] = piece.new_zeros(len(piece), *part.shape)
                part.place(placed, wide[part.parameter])
            return [wide[name] for name in names]

        def collect(rows: slice, products: Sequence[Tensor | None], weight: float) -> None:
            local = torch.arange(rows.stop - rows.start, device=self.device)
            chosen = (products[names.index(part.parameter)] for part in self.cut.parts)
            pairs = zip(self.cut.parts, chosen, strict=True)
            total.add(
                rows,
                [None if p is None else part.rows(p)[local, owner[rows]] for part, p in pairs],
                weight,
            )

        self._engine.products(names, len(vectors), spread, collect)
        return total.rows
