"""Dense float64 Hessians over any set of blocks, by unit vectors, in memory or on disk.

Column t of H over the blocks is H e_t. Only the tensors that the blocks lie in take part, so
autograd prunes the rest. Whatever the model's dtype, the matrix is that of a float64 copy of model
and data where one can be made.

Letters: B blocks, n entries of all blocks together, r rows (vectors) that go through at a time.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hessian_tools.blocks.block import Block, Cut
from hessian_tools.blocks.ownership import check_blocks
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition as partition_of
from hessian_tools.curvature.engine.memory import AUTO_SHARE, format_bytes, free_bytes
from hessian_tools.curvature.hessian import in_float64, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import unit_vectors
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.shown import Drawable
from hessian_tools.structure.matrix_file import MatrixFile

MOST_ENTRIES = 20_000  # default limit on n: 3.2 GB, and 20,000 products
_UNITS = 64  # unit vectors in one product
_ROWS = 1024  # of a matrix that are squared at a time

Blocks = Partition | Cut | Block | str | Iterable[str] | Iterable[Block | Cut]


@registered
@dataclass(frozen=True, eq=False)
class DenseBlock(Drawable):
    """The dense matrix over B blocks, in their order; symmetrised to (A + A') / 2.

    Block i occupies rows and columns ``offsets[i]`` to ``offsets[i + 1]``.
    """

    names: tuple[str, ...]  # (B,)
    offsets: NDArray[np.int64]  # (B + 1,)
    matrix: NDArray[np.float64]  # (n, n); a read-only memory map when on disk
    symmetry_error: float  # |A - A'|_F / |A|_F before symmetrising; 0 for A = 0
    num_matvecs: int  # products spent, n
    arithmetic: str  # in what the products were computed
    path: str = ""  # of the matrix on disk
    curvature: str = "Hessian"  # which matrix, in words

    def block(self, row: int | str, column: int | str | None = None) -> NDArray[np.float64]:
        """The sub-block of two blocks by number or name, (n_i, n_j), a view.

        Of one block: its diagonal sub-block.
        """
        rows = self._span(row)
        return self.matrix[rows, rows if column is None else self._span(column)]

    @property
    def mass(self) -> NDArray[np.float64]:
        """(B, B) squared Frobenius norms of all sub-blocks."""
        mass = np.zeros((len(self.names), len(self.names)))
        block_of = np.repeat(np.arange(len(self.names)), np.diff(self.offsets))
        for first in range(0, len(block_of), _ROWS):
            rows = slice(first, first + _ROWS)
            squares = np.square(self.matrix[rows])
            by_block = np.add.reduceat(squares, self.offsets[:-1], axis=1)
            np.add.at(mass, block_of[rows], by_block)
        return mass

    def _span(self, block: int | str) -> slice:
        if not isinstance(block, str):
            number = range(len(self.names))[block]  # negative ones count from the end
        elif block in self.names:
            number = self.names.index(block)
        else:
            names = ", ".join(self.names[:8])
            raise KeyError(f"no block is named {block!r}; the blocks are {names}, ...")
        return slice(self.offsets[number], self.offsets[number + 1])


def dense_block(
    curvature: Problem | CurvatureOperator,
    blocks: Blocks,
    *,
    partition: Partition | str | None = None,
    max_size: int = MOST_ENTRIES,
    path: str | os.PathLike[str] | None = None,
    memory: str | int = "auto",
    progress: bool = True,
) -> DenseBlock:
    """The dense Hessian of the mean loss over any set of blocks, with every sub-block between them.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator. One that is not in float64 is
            copied in float64; where no copy can be made, products are in its own arithmetic, with
            a warning, which ``arithmetic`` repeats.
        blocks: a Partition, a Cut, a Block, a list of Blocks and Cuts in any order, names of blocks
            of ``partition`` (or of a preset); without it, what ``ht.partition`` takes: a preset or
            a list of parameter names and globs.
        max_size: the most entries n that are not refused; n^2 numbers of 8 bytes and n products.
        path: a file ``NAME.npy`` to hold the matrix, for one beyond memory. An interrupted run is
            continued (``NAME.json`` says how far it came), a finished one is read; both only for
            the same loss, parameters and blocks.
        memory: the engine's budget for products, where a copy or a Problem is given (see
            :class:`hessian_tools.HessianOperator`).
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: too many entries, in bytes and with what to do; no block, one that occurs twice
            or overlaps, or that is none of this model's; a ``path`` that holds another matrix.
        TypeError: anything else as ``blocks``.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    cuts = cuts_of(blocks, problem_of(curvature), partition)
    size = sum(cut.numel for cut in cuts)
    file = None if path is None else Path(path)
    _refuse_too_large(size, max_size, file)
    operator, arithmetic = in_float64(curvature, memory)
    names = tuple(name for cut in cuts for name in cut.names)
    sizes = [cut.block_size for cut in cuts for _ in range(cut.num_blocks)]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    fingerprint = "" if file is None else _fingerprint(operator, cuts)
    store = MatrixFile(file, size, fingerprint)

    def name_of(row: int) -> str:
        return names[np.searchsorted(offsets, row, side="right") - 1]

    with store, product_bar(size, shown=progress, done=store.done) as bar:
        for first, rows in _rows(operator, cuts, store.done):
            bar.set_postfix_str(name_of(first))
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                name = name_of(first + int(finite.argmin()))
                raise NumericalError(
                    f"a product with a unit vector of block {name} is NaN or inf; check the loss"
                )
            store.write(rows)
            bar.update(len(rows))
        error = store.symmetrise()
    written_to = "" if path is None else str(path)
    title = operator.title
    return DenseBlock(names, offsets, store.matrix, error, size, arithmetic, written_to, title)


def _rows(
    operator: CurvatureOperator,
    cuts: Sequence[Cut],
    done: int,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(number of the first row, rows (r, n)) of the Hessian from row ``done`` on."""
    columns = operator.columns(cuts)
    start = 0  # the number of the first row of the cut
    for cut in cuts:
        size = cut.block_size
        first = max(0, done - start)
        while first < cut.num_blocks * size:
            # Asked again each time: after memory has run out, fewer go through.
            last = min(cut.num_blocks * size, first + min(_UNITS, columns.rows))
            entries = torch.arange(first, last, device=operator.device)
            units = unit_vectors(entries % size, size, operator.dtype)
            products = columns.products(cut, entries // size, units)
            yield start + first, products.double().cpu().numpy()
            first = last
        start += cut.num_blocks * size


def cuts_of(
    blocks: Blocks,
    problem: Problem,
    known: Partition | str | None = None,
) -> list[Cut]:
    """Disjoint cuts that hold ``blocks`` (see :func:`dense_block`) in order.

    Neighbouring blocks of one cut stay together.
    """
    cuts = _joined(_chosen(blocks, problem, known))
    if not cuts:
        raise ValueError("blocks is empty; choose at least one block")
    check_blocks(cuts, problem.parameters, "blocks")
    return cuts


def _chosen(
    blocks: Blocks,
    problem: Problem,
    known: Partition | str | None,
) -> Iterable[object]:
    """What ``blocks`` name or hold, which may be anything as yet."""
    if isinstance(known, str):
        known = partition_of(problem.model, known)
    names = _names(blocks)
    if names and known is not None:
        return [known[name] for name in names]
    if names:  # a preset alone; names and globs in a list
        return partition_of(problem.model, blocks if isinstance(blocks, str) else names).cuts
    if isinstance(blocks, Partition):
        return blocks.cuts
    if isinstance(blocks, Block | Cut):
        return [blocks]
    if not isinstance(blocks, Iterable):
        raise TypeError(
            f"blocks is {blocks!r:.80}; pass a Partition, Cuts, Blocks, or names of blocks"
        )
    return blocks


def _names(blocks: Blocks) -> list[str]:
    """``blocks`` as a list where they are names, else an empty one."""
    if isinstance(blocks, str):
        return [blocks]
    if not isinstance(blocks, list | tuple):
        return []
    names = [item for item in blocks if isinstance(item, str)]
    return names if len(names) == len(blocks) else []


def _joined(items: Iterable[object]) -> list[Cut]:
    """Cuts as they are, runs of neighbouring Blocks of one cut as one."""
    cuts: list[Cut] = []
    run: list[Block] = []
    for item in items:
        if not isinstance(item, Block | Cut):
            raise TypeError(f"blocks holds {item!r:.80}; pass Blocks and Cuts, or names alone")
        if run and not _is_next(item, run[-1]):
            cuts.append(_cut_of_run(run))
            run = []
        if isinstance(item, Block):
            run.append(item)
        else:
            cuts.append(item)
    return [*cuts, _cut_of_run(run)] if run else cuts


def _is_next(item: Block | Cut, block: Block) -> bool:
    if isinstance(item, Cut):
        return False
    return item.cut is block.cut and item.position == block.position + 1


def _cut_of_run(run: Sequence[Block]) -> Cut:
    return run[0].cut.chunk(run[0].position, run[-1].position + 1)


def _refuse_too_large(size: int, max_size: int, path: Path | None) -> None:
    needed = 8 * size * size
    described = (
        f"the dense Hessian over these blocks has {size:,} rows and takes {format_bytes(needed)}"
    )
    if size > max_size:
        raise ValueError(
            f"{described}, more than max_size={max_size:,} allows; choose fewer blocks, raise "
            "max_size (with path= it is kept on disk), or estimate norms by ht.coupling"
        )
    if path is None:
        free = int(AUTO_SHARE * free_bytes(torch.device("cpu")))
        if needed > free:
            raise ValueError(
                f"{described}, but {format_bytes(free)} are free; "
                "pass path='NAME.npy' to keep it on disk"
            )
        return
    if path.suffix != ".npy":
        raise ValueError(f"path is {str(path)!r}; name a file that ends in .npy")
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    left = shutil.disk_usage(folder).free
    if not path.exists() and needed > left:
        raise ValueError(
            f"{described}, but {format_bytes(left)} are free in {folder}; "
            "choose fewer blocks or another path"
        )


def _fingerprint(operator: CurvatureOperator, cuts: Sequence[Cut]) -> str:
    """Of all that the matrix depends on, the data by its loss."""
    problem = operator.problem
    blocks = repr((problem.loss, [(cut.parts, cut.names) for cut in cuts]))
    if operator.signature != "Hessian":  # whose files never said so
        blocks += operator.signature
    digest = hashlib.blake2b(blocks.encode(), digest_size=16)
    for parameter in problem.parameters.values():
        digest.update(parameter.detach().cpu().contiguous().view(-1).double().numpy().tobytes())
    return digest.hexdigest()
