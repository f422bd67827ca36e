"""Coupling of parameter blocks: squared Frobenius norms of all H_ij by probing.

For a random z on block j with independent entries of mean 0 and variance 1,
E |H_ij z|^2 = |H_ij|_F^2 (Hutchinson 1990), so one product estimates block column j for all i at
once. Small blocks of one tensor go through together.

Where a tensor has more blocks than are wanted, some are drawn with replacement, block j with
probability p_j: three quarters in proportion to |(H z)_j|^2 of a few products of the whole Hessian,
which estimate sum_i |H_ij|_F^2 for every j at once, one quarter evenly, so that no block that these
products underrate weighs much. Totals weighted by 1 / (draws p_j) are unbiased (Hansen & Hurwitz
1943), shares, ratios of such totals, consistent.

Letters: B blocks, n entries of all of them, k probes, D columns (draws of blocks), S different
blocks among them, G groups (the tensors, or sets of tensors, that blocks lie in), r vectors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hessian_tools.blocks.attention import find_attention, is_inside
from hessian_tools.blocks.block import Cut
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.hessian import as_operator, problem_of
from hessian_tools.curvature.operators import Columns, CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.settings import Settings
from hessian_tools.structure.coupling_result import Coupling, Floats, Integers
from hessian_tools.structure.dense import MOST_ENTRIES, Blocks, cuts_of, dense_block
from hessian_tools.structure.draws import BlockGrid, Draw

PILOT = "(pilot)"  # the column of |(H z)_j|^2 by which blocks are drawn
_MOST_VECTORS = 64  # in one product
_MOST_BYTES = 1 << 30  # of the table of squares
_MOST_SQUARED = 1e75  # the error of a mass needs the fourth power of a product's entries


def coupling(
    curvature: Problem | CurvatureOperator,
    partition: Blocks,
    *,
    num_probes: int = 4,
    seed: int = 0,
    num_blocks: int | None = None,
    probes: str = "rademacher",
    exact: bool | str = "auto",
    num_pilot: int = 4,
    layers: Callable[[str], str] | None = None,
    finished: Mapping[str, Floats] | None = None,
    on_column: Callable[[str, Floats], None] | None = None,
    progress: bool = True,
) -> Coupling:
    """Estimates |H_ij|_F^2 between the blocks of ``partition``, and where the Hessian's mass lies.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator.
        partition: a Partition, or anything that :func:`hessian_tools.structure.dense.dense_block`
            takes as blocks.
        num_probes: k probes for each column; at least 2 for errors where all blocks of a tensor
            are taken.
        seed: with the blocks' names the only source of randomness.
        num_blocks: the most columns of one tensor; where it has more blocks, this many are drawn
            with replacement (a block drawn twice has other probes each time), at least 2 for
            errors. None: all.
        probes: "rademacher" | "gaussian".
        exact: "auto" takes the dense float64 matrix where that costs no more products; True always,
            False never.
        num_pilot: products of the whole Hessian that guide the draws, made only where blocks are
            drawn; 0 draws evenly.
        layers: the layer of a parameter by its name; default :func:`layer_namer`.
        finished: columns of an earlier run with the same arguments, by label: they are not computed
            again.
        on_column: called with the label and the column (an array) as each one is done, to keep for
            ``finished``.
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: for an argument out of range; for a table of columns above 1 GiB, with the
            remedy.
        TypeError, ValueError: for a ``partition`` as for the blocks of ``dense_block``.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    Settings(num_probes, 1, seed, probes, "full", exact)  # validates them
    if num_pilot < 0 or (num_blocks is not None and num_blocks < 1):
        raise ValueError(
            f"num_blocks is {num_blocks} and num_pilot {num_pilot}; at least 1 and 0 are needed"
        )
    problem = problem_of(curvature)
    layer = layers or layer_namer(problem.model)
    grid = BlockGrid(cuts_of(partition, problem), layer, num_blocks)
    num_pilot = num_pilot if grid.drawn.any() else 0
    spent = num_probes * grid.num_columns + num_pilot
    if exact == "auto":
        exact = grid.num_entries <= min(spent, MOST_ENTRIES)
    if exact:
        return _exact(curvature, grid, seed, progress)
    _refuse_too_large(grid, num_probes)
    operator = as_operator(curvature)
    done = dict(finished or {})
    with product_bar(spent, shown=progress) as bar:
        probing = _Probing(operator.columns(grid.cuts), grid, seed, num_probes, probes, bar)
        for label, column in _new_columns(probing, num_pilot, done):
            done[label] = column
            if on_column is not None:
                on_column(label, column)
    return _estimated(probing, done, spent, operator)


def layer_namer(model: nn.Module) -> Callable[[str], str]:
    """Parameter name -> its layer.

    That is the transformer layer around it, else the module that owns it ("(root)").
    """
    paths = sorted(find_attention(model).layers, key=len)

    def layer(parameter: str) -> str:
        around = [path for path in paths if is_inside(parameter, path)]
        return around[-1] if around else parameter.rpartition(".")[0] or "(root)"

    return layer


@dataclass(frozen=True)
class _Probing:
    """How columns are probed."""

    columns: Columns
    grid: BlockGrid
    seed: int
    num_probes: int
    kind: str  # of probes
    bar: tqdm


def _pilot(probing: _Probing, num_pilot: int) -> Floats:
    """(B,) mean over probes of |(H z)_j|^2, which estimates the mass of block column j."""
    columns = probing.columns
    total = np.zeros(len(probing.grid.names))
    for probe in range(num_pilot):
        z = draw_probes("rademacher", probing.seed, f"{PILOT} {probe}", 1, columns.size)
        total += _squared_norms(columns.whole(z), columns)[0] / num_pilot
        probing.bar.update(1)
    if not np.isfinite(total).all():
        raise NumericalError(
            "a product with the whole Hessian is NaN or inf; check the loss and the dtype's range"
        )
    return total


def _blocks_of(draws: Sequence[Draw]) -> Integers:
    """(S,) the different blocks among ``draws``, ascending."""
    return np.unique([draw.block for draw in draws])


def _new_columns(
    probing: _Probing,
    num_pilot: int,
    done: Mapping[str, Floats],
) -> Iterator[tuple[str, Floats]]:
    """(label, column) of all that are not ``done`` when it is their turn; the pilot comes first.

    A column is (k, S + G) squares. Those of one cut go through together.
    """
    grid = probing.grid
    pilot = done.get(PILOT)
    if num_pilot and pilot is None:
        pilot = _pilot(probing, num_pilot)
        yield PILOT, pilot
    draws = grid.draws(probing.seed, pilot)
    blocks = _blocks_of(draws)
    for first, cut in zip(grid.starts[:-1], grid.cuts, strict=True):
        of_cut = [draw for draw in draws if first <= draw.block < first + cut.num_blocks]
        missing = [draw for draw in of_cut if draw.label not in done]
        probing.bar.update(probing.num_probes * (len(of_cut) - len(missing)))
        yield from _probed_cut(probing, cut, int(first), missing, blocks)


def _probed_cut(
    probing: _Probing,
    cut: Cut,
    start: int,
    draws: Sequence[Draw],
    blocks: Integers,
) -> Iterator[tuple[str, Floats]]:
    """The columns of ``draws`` of blocks of one cut, whose first block has number ``start``."""
    columns = probing.columns
    at_once = min(_MOST_VECTORS, columns.rows)
    vectors = [(draw, probe) for draw in draws for probe in range(probing.num_probes)]
    pending: dict[str, list[Floats]] = {draw.label: [] for draw in draws}  # rows so far
    for first in range(0, len(vectors), at_once):
        chunk = vectors[first : first + at_once]
        probing.bar.set_postfix_str(chunk[0][0].label)
        positions = torch.tensor([draw.block - start for draw, _ in chunk])
        products = columns.products(cut, positions, _probes_of(probing, cut, chunk))
        squares = _squared_norms(products, columns)
        by_group = probing.grid.by_group(squares)
        rows = np.concatenate([squares[:, blocks], by_group], axis=1)
        for (draw, _), row in zip(chunk, rows, strict=True):
            if not np.isfinite(row).all():
                raise NumericalError(
                    f"a product with block {draw.label} is NaN or inf; check the loss"
                )
            pending[draw.label].append(row)
            if len(pending[draw.label]) == probing.num_probes:
                yield draw.label, np.stack(pending.pop(draw.label))
        probing.bar.update(len(chunk))


def _probes_of(
    probing: _Probing,
    cut: Cut,
    chunk: Sequence[tuple[Draw, int]],
) -> Tensor:
    """(r, block size) the probe of each (draw, number of the probe)."""
    by_label = {
        label: draw_probes(probing.kind, probing.seed, label, probing.num_probes, cut.block_size)
        for label in {draw.label for draw, _ in chunk}
    }
    return torch.stack([by_label[draw.label][probe] for draw, probe in chunk])


def _estimated(
    probing: _Probing,
    columns: Mapping[str, Floats],
    spent: int,
    operator: CurvatureOperator,
) -> Coupling:
    """The result of ``columns``, all that are wanted and the pilot, by label."""
    grid = probing.grid
    draws = grid.draws(probing.seed, columns.get(PILOT))
    blocks = _blocks_of(draws)
    table = np.stack([columns[draw.label] for draw in draws], axis=1)  # (k, D, S + G)
    squares, by_group = np.split(table, [len(blocks)], axis=2)
    return Coupling(
        names=tuple(grid.names[block] for block in blocks),
        groups=grid.groups,
        layers=grid.layers,
        group_of=grid.group_of[blocks],
        num_blocks=grid.num_blocks,
        columns=np.searchsorted(blocks, [draw.block for draw in draws]),
        weights=np.array([draw.weight for draw in draws]),
        drawn=grid.drawn,
        squares=squares,
        by_group=by_group,
        exact=False,
        num_matvecs=spent,
        seed=probing.seed,
        probes=probing.kind,
        route=operator.route,
        curvature=operator.title,
    )


def _refuse_too_large(grid: BlockGrid, num_probes: int) -> None:
    columns = grid.num_columns
    needed = 8 * num_probes * columns * (columns + len(grid.groups))
    if needed > _MOST_BYTES:
        raise ValueError(
            f"num_blocks={grid.most} asks for a table of {columns:,} columns, "
            f"{format_bytes(needed)}; draw fewer blocks of each tensor, e.g. num_blocks=8"
        )


def _squared_norms(products: Tensor, columns: Columns) -> Floats:
    """(r, n) -> (r, B) squared norms by block, summed in float64."""
    rows = []
    for row in products:  # one at a time, to spare memory
        ends = torch.aminmax(row)
        largest = max(-float(ends.min), float(ends.max))
        if _MOST_SQUARED < largest < np.inf:
            raise NumericalError(
                f"a product with the Hessian reaches {largest:.3g}, whose square is beyond "
                "float64's range; multiply the loss by a constant"
            )
        pieces = columns.by_cut(row[None])
        norms = [torch.linalg.vector_norm(p[0], dim=1, dtype=torch.float64) for p in pieces]
        rows.append(torch.cat(norms))
    return torch.stack(rows).square().cpu().numpy()


def _exact(
    curvature: Problem | CurvatureOperator,
    grid: BlockGrid,
    seed: int,
    progress: bool,
) -> Coupling:
    """All blocks, from the dense matrix."""
    dense = dense_block(curvature, list(grid.cuts), progress=progress)
    mass = dense.mass
    count = len(grid.names)
    return Coupling(
        names=dense.names,
        groups=grid.groups,
        layers=grid.layers,
        group_of=grid.group_of,
        num_blocks=grid.num_blocks,
        columns=np.arange(count),
        weights=np.ones(count),
        drawn=np.zeros_like(grid.drawn),
        squares=mass[None],
        by_group=grid.by_group(mass)[None],
        exact=True,
        num_matvecs=dense.num_matvecs,
        seed=seed,
        probes="none",
        route=f"dense matrix, {dense.arithmetic}",
        curvature=dense.curvature,
    )
