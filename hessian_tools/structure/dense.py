"""Dense float64 Hessians over any set of blocks, by unit vectors through the engine, in memory or on disk.

Column t of H over the blocks is H e_t. Only the tensors that the blocks lie in are live, so autograd prunes the rest.
Whatever the model's dtype, the matrix is that of a float64 copy of model and data where one can be made.

Letters: B blocks, n entries of all blocks together, r rows (vectors) that go through at a time.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from hessian_tools.blocks.block import Block, Cut
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition
from hessian_tools.curvature.engine.memory import AUTO_SHARE, format_bytes, free_bytes
from hessian_tools.curvature.hessian import in_float64, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.structure.matrix_file import MatrixFile

MOST_ENTRIES = 20_000  # default limit on n: 3.2 GB, and 20,000 products
_UNITS = 64  # unit vectors in one product
_ROWS = 1024  # of a matrix that are squared at a time


@registered
@dataclass(frozen=True, eq=False)
class DenseBlock:
    """The dense Hessian over B blocks, in their order; symmetrised to (A + A') / 2.

    Names the blocks; block i occupies rows and columns ``offsets[i]`` to ``offsets[i + 1]``.
    """

    names: tuple[str, ...]  # (B,)
    offsets: np.ndarray  # (B + 1,) int
    matrix: np.ndarray  # (n, n) float64; a read-only memory map when on disk
    symmetry_error: float  # |A - A'|_F / |A|_F before symmetrising; 0 for A = 0
    num_matvecs: int  # products spent, n
    arithmetic: str  # in what the products were computed
    path: str = ""  # of the matrix on disk

    def block(self, row: int | str, column: int | str | None = None) -> np.ndarray:
        """The sub-block of two blocks by number or name, (n_i, n_j), a view; of one: the diagonal sub-block."""
        i = self._number(row)
        j = i if column is None else self._number(column)
        return self.matrix[
            self.offsets[i] : self.offsets[i + 1], self.offsets[j] : self.offsets[j + 1]
        ]

    @property
    def mass(self) -> np.ndarray:
        """(B, B) squared Frobenius norms of all sub-blocks."""
        found = np.zeros((len(self.names), len(self.names)))
        owner = np.repeat(np.arange(len(self.names)), np.diff(self.offsets))
        for first in range(0, len(owner), _ROWS):
            squares = np.square(self.matrix[first : first + _ROWS])
            np.add.at(
                found,
                owner[first : first + _ROWS],
                np.add.reduceat(squares, self.offsets[:-1], axis=1),
            )
        return found

    def _number(self, block: int | str) -> int:
        if isinstance(block, str):
            if block not in self.names:
                raise KeyError(
                    f"no block is named {block!r}; the blocks are {', '.join(self.names[:8])}, ..."
                )
            return self.names.index(block)
        return range(len(self.names))[block]


def dense_block(
    curvature: Problem | CurvatureOperator, blocks: Any, *, partition: Partition | str | None = None,
    max_size: int = MOST_ENTRIES, path: str | os.PathLike | None = None, memory: str | int = "auto",
    progress: bool = True,
) -> DenseBlock:  # fmt: skip
    """The dense Hessian of the mean loss over any set of blocks, every sub-block between them included.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator. One that is not in float64 is copied in float64; where no
            copy can be made, products are in its own arithmetic, with a warning and told in ``arithmetic``.
        blocks: a Partition, a Cut, a Block, a list of Blocks and Cuts in any order, names of blocks of ``partition``
            (or of a preset); without it, what ``ht.partition`` takes: a preset or a list of parameter names and globs.
        max_size: the most entries n that are not refused; n^2 numbers of 8 bytes and n products.
        path: a file ``NAME.npy`` to hold the matrix, for one beyond memory. An interrupted run goes on from there
            (``NAME.json`` says how far it came), a finished one is read; both only for the same loss, parameters and
            blocks.
        memory: the engine's budget for products, where a copy or a Problem is given (see HessianOperator).
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: too many entries, in bytes and with what to do; no block, one that occurs twice or overlaps, or that
            is none of this model's; a ``path`` that holds another matrix.
        TypeError: anything else as ``blocks``.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    cuts = cuts_of(blocks, problem_of(curvature), partition)
    size = sum(cut.num_blocks * cut.block_size for cut in cuts)
    _refuse_too_large(size, max_size, path)
    hessian, arithmetic = in_float64(curvature, memory)
    names = tuple(name for cut in cuts for name in cut.names)
    sizes = [cut.block_size for cut in cuts for _ in range(cut.num_blocks)]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    store = MatrixFile(
        *(
            (None, size, "")
            if path is None
            else (Path(path), size, _fingerprint(hessian.problem, cuts))
        )
    )
    with tqdm(
        total=size,
        initial=store.done,
        unit="HVP",
        disable=None if progress else True,
        dynamic_ncols=True,
    ) as bar:
        for first, rows in _rows(hessian, cuts, store.done):
            bar.set_postfix_str(names[np.searchsorted(offsets, first, side="right") - 1])
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                name = names[
                    np.searchsorted(offsets, first + int(finite.argmin()), side="right") - 1
                ]
                raise NumericalError(
                    f"a product with a unit vector of block {name} is NaN or inf; check the loss"
                )
            store.write(rows)
            bar.update(len(rows))
    error = store.symmetrise()
    return DenseBlock(
        names, offsets, store.matrix, error, size, arithmetic, "" if path is None else str(path)
    )


def cuts_of(blocks: Any, problem: Problem, known: Partition | str | None = None) -> list[Cut]:
    """Disjoint cuts that hold ``blocks`` (see :func:`dense_block`) in order; neighbours of one cut stay together."""
    if isinstance(known, str):
        known = partition(problem.model, known)
    if isinstance(blocks, str) or (
        isinstance(blocks, list | tuple) and {*map(type, blocks)} == {str}
    ):
        if known is not None:
            blocks = [known[name] for name in ([blocks] if isinstance(blocks, str) else blocks)]
        else:
            blocks = partition(problem.model, blocks)
    items = (
        blocks.cuts
        if isinstance(blocks, Partition)
        else [blocks]
        if isinstance(blocks, Block | Cut)
        else blocks
    )
    if not isinstance(items, Iterable):
        raise TypeError(
            f"blocks is {blocks!r:.80}; pass a Partition, Cuts, Blocks, or names of blocks"
        )
    cuts = list(_joined(items))
    if not cuts:
        raise ValueError("blocks is empty; choose at least one block")
    taken: dict[str, Tensor] = {}
    for cut in cuts:
        for part in cut.parts:
            parameter = problem.parameters.get(part.parameter)
            if parameter is None or tuple(parameter.shape) != part.shape:
                raise ValueError(
                    f"blocks holds {cut.name!r}, which lies in no trainable parameter of this model"
                )
            mask = taken.setdefault(part.parameter, torch.zeros(part.shape, dtype=torch.bool))
            if part.rows(mask).any():
                raise ValueError(
                    f"blocks holds {cut.name!r}, which overlaps another or occurs twice; pass it once"
                )
            part.place(torch.ones(()).expand(part.num_blocks, part.block_size), mask)
    name, count = Counter(name for cut in cuts for name in cut.names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"blocks has two blocks named {name!r}; give them different names")
    return cuts


def units_of(cut: Cut, first: int, last: int, like: CurvatureOperator) -> tuple[Tensor, Tensor]:
    """Positions (r,) and unit vectors (r, block size) of entries ``first`` to ``last - 1`` of a cut, block by block."""
    entries = torch.arange(first, last, device=like.device)
    return entries // cut.block_size, one_hot(entries % cut.block_size, cut.block_size).to(
        like.dtype
    )


def _rows(
    hessian: CurvatureOperator, cuts: Sequence[Cut], done: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows (r, n)) of the Hessian from row ``done`` on."""
    columns, start = hessian.columns(cuts), 0
    for cut in cuts:
        entries = cut.num_blocks * cut.block_size
        first = max(0, done - start)
        while first < entries:
            last = min(entries, first + min(_UNITS, columns.rows))
            product = columns.products(cut, *units_of(cut, first, last, hessian))
            yield start + first, product.double().cpu().numpy()
            first = last
        start += entries


def _joined(items: Iterable[Any]) -> Iterator[Cut]:
    """Cuts as they are, runs of neighbouring Blocks of one cut as one."""
    run: list[Block] = []
    for item in items:
        if not isinstance(item, Block | Cut):
            raise TypeError(f"blocks holds {item!r:.80}; pass Blocks and Cuts, or names alone")
        if run and not (
            isinstance(item, Block)
            and item.cut is run[0].cut
            and item.position == run[-1].position + 1
        ):
            yield run[0].cut.chunk(run[0].position, run[-1].position + 1)
            run = []
        if isinstance(item, Block):
            run.append(item)
        else:
            yield item
    if run:
        yield run[0].cut.chunk(run[0].position, run[-1].position + 1)


def _refuse_too_large(size: int, max_size: int, path: Any) -> None:
    needed = 8 * size * size
    told = f"the dense Hessian over these blocks has {size:,} rows and takes {format_bytes(needed)}"
    if size > max_size:
        raise ValueError(
            f"{told}, more than max_size={max_size:,} allows; choose fewer blocks, raise max_size (with path= it is "
            "kept on disk), or estimate norms by ht.coupling"
        )
    if path is None:
        free = int(AUTO_SHARE * free_bytes(torch.device("cpu")))
        if needed > free:
            raise ValueError(
                f"{told}, but {format_bytes(free)} are free; pass path='NAME.npy' to keep it on disk"
            )
        return
    if Path(path).suffix != ".npy":
        raise ValueError(f"path is {str(path)!r}; name a file that ends in .npy")
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not Path(path).exists() and needed > (left := shutil.disk_usage(folder).free):
        raise ValueError(
            f"{told}, but {format_bytes(left)} are free in {folder}; choose fewer blocks or another path"
        )


def _fingerprint(problem: Problem, cuts: Sequence[Cut]) -> str:
    """Of all that the matrix depends on, the data by its loss."""
    digest = hashlib.blake2b(
        repr((problem.loss, [(cut.parts, cut.names) for cut in cuts])).encode(), digest_size=16
    )
    for parameter in problem.parameters.values():
        digest.update(parameter.detach().cpu().contiguous().view(-1).double().numpy().tobytes())
    return digest.hexdigest()
