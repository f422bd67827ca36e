"""CurvatureOperator: a curvature matrix of a Problem's loss, whole, block by block and by columns.

Every algorithm of this package that asks about a model takes one: :func:`hessian_tools.slq`,
``blockwise_slq``, ``dense_block``, ``coupling``, ``check_partition``, ``block_conditioning`` and
``verify``. A new curvature matrix is one subclass with three methods: :meth:`products`,
:meth:`rebuilt` and :meth:`reference`. :class:`hessian_tools.HessianOperator` is the first of them.

Letters: P parameters, k probes, n entries of a block, B blocks of a cut, r rows (vectors) of a
batch.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.ownership import check_trained
from hessian_tools.curvature.engine.engine import Collect, Spread
from hessian_tools.curvature.engine.memory import budget_bytes
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.referees import Reference
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.problem.problem import Problem


class CurvatureOperator(SymmetricOperator):
    """A real symmetric (P, P) matrix that belongs to the loss of a Problem.

    Vectors follow the order of ``problem.parameters``. Attributes: ``problem``; ``arithmetic``, in
    what products are computed; ``matrix`` and ``title``, which matrix it is; ``shape``, ``dtype``
    and ``device`` as of any symmetric operator.
    """

    matrix = "curvature"  # in one word, by which results tell whose they are
    title = "curvature matrix"  # in words
    referee = "finite difference of the gradient"  # what :meth:`reference` is

    def __init__(self, problem: Problem, arithmetic: Arithmetic) -> None:
        super().__init__(problem.num_parameters, arithmetic.vectors, problem.device)
        self.problem = problem
        self.arithmetic = arithmetic

    @abstractmethod
    def products(
        self,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> None:
        """sum_b A_ab v_b for all a and b among the parameters ``names``, for ``count`` rows v.

        The rows are taken in parts, as memory allows. ``spread(part)`` gives the tensors v_b of the
        rows in the slice ``part``, (r, \\*shape) for each of ``names``; a None stands for zeros and
        should cost nothing. ``collect(part, products, weight)`` adds ``weight`` times the products,
        (r, \\*shape) or None for each of ``names``; it may be called several times for a part, and
        what it is given adds up.
        """

    @abstractmethod
    def rebuilt(
        self,
        problem: Problem,
        *,
        memory: str | int = "auto",
        microbatch: int | None = None,
        record: bool | None = None,
    ) -> "CurvatureOperator":
        """The same kind of matrix for another ``problem``, such as a copy of this one in float64.

        ``memory``, ``microbatch`` and ``record`` are those of
        :class:`hessian_tools.HessianOperator`.
        """

    @abstractmethod
    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        """The product with ``direction`` by a referee that shares none of this operator's code.

        Args:
            problem: this operator's, or a copy in float64.
            direction: a tensor for each of ``problem.parameters``, of its shape.
        """

    @property
    def route(self) -> str:
        """How products are computed, in words."""
        return f"{type(self).__name__}; {self.arithmetic}"

    @property
    def signature(self) -> str:
        """Tells this matrix from others of the same Problem, for what is kept on disk.

        A matrix that depends on more than the Problem has to say so here.
        """
        return self.title

    @property
    def krylov_bytes(self) -> int:
        """Bytes of memory that Lanczos vectors may take."""
        return budget_bytes("auto", self.device)

    def release(self) -> None:
        """Frees what is kept between products; the next product builds it again."""

    def block(self, block: Block) -> "StackedBlocks":
        """The diagonal block A_bb of one Block, an (n, n) operator."""
        return StackedBlocks(self, block.as_cut())

    def stacked(self, cut: Cut) -> "StackedBlocks":
        """All diagonal blocks of a Cut; their products are computed together."""
        return StackedBlocks(self, cut)

    def columns(self, cuts: Sequence[Cut]) -> "Columns":
        """The blocks A_ij between all blocks of ``cuts``, one block column j at a time."""
        return Columns(self, cuts)

    def _matmat(self, vectors: Tensor) -> Tensor:
        shapes = [p.shape for p in self.problem.parameters.values()]
        sizes = [shape.numel() for shape in shapes]
        total = _Sum(vectors, sizes)

        def spread(part: slice) -> list[Tensor]:
            pieces = vectors[part].split(sizes, dim=1)
            return [
                piece.reshape(len(piece), *shape)
                for piece, shape in zip(pieces, shapes, strict=True)
            ]

        self.products(list(self.problem.parameters), len(vectors), spread, total.add)
        return total.rows


class _Sum:
    """Products of micro-batches, added up in the dtype of the vectors: ``rows``, (k, n)."""

    def __init__(self, vectors: Tensor, sizes: Sequence[int]) -> None:
        self.rows = torch.empty_like(vectors)
        self._sizes = sizes
        # Rows below this hold a sum. The first product of the others is written, not added, which
        # saves filling them with zeros and reading them.
        self._begun = 0

    def add(self, part: slice, products: Sequence[Tensor | None], weight: float) -> None:
        """Adds ``weight`` times the products of the rows in ``part``; None is zero."""
        is_first = part.start >= self._begun
        places = self.rows[part].split(self._sizes, dim=1)
        for place, product in zip(places, products, strict=True):
            if is_first:
                _write(place, product, weight)
            elif product is not None:
                place.add_(product.reshape(place.shape), alpha=weight)
        self._begun = max(self._begun, part.stop)


def _write(place: Tensor, product: Tensor | None, weight: float) -> None:
    if product is None:
        place.zero_()
        return
    place.copy_(product.reshape(place.shape))
    if weight != 1:
        place.mul_(weight)


class StackedBlocks(SymmetricOperator):
    """The B diagonal blocks of a Cut side by side: row i of r = B k rows belongs to block i // k.

    One block (B = 1) is an (n, n) operator A_bb like any other. Lanczos works row by row, so to it
    several blocks are one operator as well. ``names`` are the blocks'. ``matmat`` raises ValueError
    for a number of rows that is no multiple of B.
    """

    def __init__(self, curvature: CurvatureOperator, cut: Cut) -> None:
        super().__init__(cut.block_size, curvature.dtype, curvature.device)
        check_trained([cut], curvature.problem.parameters, "the partition")
        self.curvature = curvature
        self.cut = cut
        self.num_blocks = cut.num_blocks
        self.names = cut.names

    def steady(self) -> AbstractContextManager[None]:
        return self.curvature.steady()

    def _matmat(self, vectors: Tensor) -> Tensor:
        if vectors.shape[0] % self.num_blocks:
            raise ValueError(
                f"vectors has {vectors.shape[0]} rows; {self.num_blocks} blocks need a multiple "
                "of that"
            )
        names = list(self.cut.parameters)
        sizes = [part.block_size for part in self.cut.parts]
        total = _Sum(vectors, sizes)
        probes = max(1, len(vectors) // self.num_blocks)
        block_of_row = torch.arange(len(vectors), device=self.device) // probes

        def spread(rows: slice) -> list[Tensor]:
            wide: dict[str, Tensor] = {}
            pieces = vectors[rows].split(sizes, dim=1)
            for part, piece in zip(self.cut.parts, pieces, strict=True):
                self._spread_part(part, piece, block_of_row[rows], wide)
            return [wide[name] for name in names]

        def collect(rows: slice, products: Sequence[Tensor | None], weight: float) -> None:
            by_name = dict(zip(names, products, strict=True))
            local = torch.arange(rows.stop - rows.start, device=self.device)
            picked: list[Tensor | None] = []
            for part in self.cut.parts:
                product = by_name[part.parameter]
                # Of each row's product with the whole tensor only its block's piece is wanted.
                piece = None if product is None else part.rows(product)[local, block_of_row[rows]]
                picked.append(piece)
            total.add(rows, picked, weight)

        self.curvature.products(names, len(vectors), spread, collect)
        return total.rows

    def _spread_part(
        self,
        part: Part,
        piece: Tensor,
        block_of_row: Tensor,
        wide: dict[str, Tensor],
    ) -> None:
        """Puts ``piece`` (r, n of the part) to its block's place in the tensor; zero elsewhere."""
        name = part.parameter
        is_whole_tensor = not part.axes and piece.shape[1] == math.prod(part.shape)
        if self.num_blocks == 1 and is_whole_tensor:
            wide[name] = piece.reshape(len(piece), *part.shape)
            return
        placed = piece.new_zeros(len(piece), self.num_blocks, piece.shape[1])
        placed[torch.arange(len(piece), device=self.device), block_of_row] = piece
        if name not in wide:
            wide[name] = piece.new_zeros(len(piece), *part.shape)
        part.place(placed, wide[name])


class Columns:
    """Products A_ij z_j of vectors on one block j with every block i of some cuts.

    Only the tensors that ``cuts`` lie in take part. ``size`` is n, the entries of all their blocks.
    """

    def __init__(self, curvature: CurvatureOperator, cuts: Sequence[Cut]) -> None:
        check_trained(cuts, curvature.problem.parameters, "the partition")
        self.curvature = curvature
        self.cuts = tuple(cuts)
        self.names = list(dict.fromkeys(name for cut in cuts for name in cut.parameters))
        self.size = sum(cut.numel for cut in cuts)

    @property
    def rows(self) -> int:
        """How many vectors fit the budget together: each leaves n entries and a few in passing."""
        row = 2 * self.size * self.curvature.dtype.itemsize
        return max(1, self.curvature.krylov_bytes // row)

    def products(self, cut: Cut, positions: Tensor, vectors: Tensor) -> Tensor:
        """(r, n) products of ``vectors`` (r, block size), row i on block ``positions[i]`` of
        ``cut``."""
        vectors = self._converted(vectors)
        positions = positions.to(self.curvature.device)

        def spread(rows: slice) -> list[Tensor | None]:
            count = len(positions[rows])
            numbers = torch.arange(count, device=vectors.device)
            wide = self._zeros(count, cut.parameters)
            pieces = vectors[rows].split(_part_sizes(cut), dim=1)
            for part, piece in zip(cut.parts, pieces, strict=True):
                placed = vectors.new_zeros(count, part.num_blocks, part.block_size)
                placed[numbers, positions[rows]] = piece
                part.place(placed, wide[part.parameter])
            return [wide.get(name) for name in self.names]

        return self._collected(len(vectors), spread)

    def whole(self, vectors: Tensor) -> Tensor:
        """(r, n) products of ``vectors`` (r, n) on all blocks."""
        vectors = self._converted(vectors)

        def spread(rows: slice) -> list[Tensor | None]:
            wide = self._zeros(len(vectors[rows]), self.names)
            for cut, values in zip(self.cuts, self.by_cut(vectors[rows]), strict=True):
                pieces = values.split(_part_sizes(cut), dim=2)
                for part, piece in zip(cut.parts, pieces, strict=True):
                    part.place(piece, wide[part.parameter])
            return [wide.get(name) for name in self.names]

        return self._collected(len(vectors), spread)

    def by_cut(self, products: Tensor) -> list[Tensor]:
        """(r, n) -> for each cut (r, B, block size), views."""
        shapes = [(cut.num_blocks, cut.block_size) for cut in self.cuts]
        pieces = products.split([math.prod(shape) for shape in shapes], dim=1)
        return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _converted(self, vectors: Tensor) -> Tensor:
        return vectors.to(self.curvature.device, self.curvature.dtype)

    def _zeros(self, count: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Zeros (r, \\*shape) for the tensors that are to be written; the others cost nothing."""
        parameters = self.curvature.problem.parameters
        zero = self._converted(torch.zeros(()))
        return {name: zero.new_zeros(count, *parameters[name].shape) for name in names}

    def _collected(self, count: int, spread: Spread) -> Tensor:
        out = self._converted(torch.zeros(count, self.size))

        def collect(rows: slice, products: Sequence[Tensor | None], weight: float) -> None:
            by_name = dict(zip(self.names, products, strict=True))
            for cut, place in zip(self.cuts, self.by_cut(out[rows]), strict=True):
                pieces = place.split(_part_sizes(cut), dim=2)
                for part, piece in zip(cut.parts, pieces, strict=True):
                    product = by_name[part.parameter]
                    if product is not None:
                        piece.add_(part.rows(product), alpha=weight)  # in the vectors' dtype

        self.curvature.products(self.names, count, spread, collect)
        return out


def _part_sizes(cut: Cut) -> list[int]:
    return [part.block_size for part in cut.parts]
