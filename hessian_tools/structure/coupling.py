"""Coupling of parameter blocks: squared Frobenius norms of all H_ij by probing, and where the Hessian's mass lies.

For a random z on block j with independent entries of mean 0 and variance 1, E |H_ij z|^2 = |H_ij|_F^2 (Hutchinson
1990), so one product estimates block column j for all i at once. Small blocks of one tensor go through together.

Where a tensor has more blocks than are wanted, some are drawn with replacement, block j with probability p_j:
three quarters in proportion to |(H z)_j|^2 of a few products of the whole Hessian, which estimate sum_i |H_ij|_F^2 for
every j at once, one quarter evenly, so that no block that these products underrate weighs much. Totals weighted by
1 / (draws p_j) are unbiased (Hansen & Hurwitz 1943), shares, ratios of such totals, consistent.

Letters: B blocks, n entries of all of them, k probes, D columns (draws of blocks), S different blocks among them,
G groups (the tensors, or sets of tensors, that blocks lie in).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.blocks.attention import find_attention, is_inside
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.hessian import as_operator, problem_of
from hessian_tools.curvature.operators import Columns, CurvatureOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import Estimate
from hessian_tools.spectra.settings import Settings
from hessian_tools.structure.dense import MOST_ENTRIES, cuts_of, dense_block
from hessian_tools.structure.draws import BlockGrid, Draw

PLACES = ("block", "tensor", "layer", "across")
PILOT = "(pilot)"  # the column of |(H z)_j|^2 by which blocks are drawn
_MOST_ROWS = 64  # vectors in one product
_MOST_BYTES = 1 << 30  # of the table of squares


@registered
@dataclass(frozen=True, eq=False)
class Coupling:
    """Squared norms |H_ij|_F^2 between the blocks of a partition, and the Hessian's mass by place.

    The Hessian is that over the partition's entries: what the partition leaves out counts nowhere. Errors are standard
    errors. Over a tensor whose blocks are all taken they are across the k probes of a column (nan for k = 1); over one
    whose blocks are drawn, across its draws (nan for a single draw), which includes what its probes do. Both take the
    numbers for normal: two errors cover what Student's t with k - 1 (or draws - 1) degrees of freedom says, 82 % for 3
    and 91 % for 8, less where a few draws carry the total. Exact results have errors of 0.
    """

    names: tuple[str, ...]  # (S,) blocks whose columns are known
    groups: tuple[str, ...]  # (G,) tensors ("a + b" for blocks over several)
    layers: tuple[str, ...]  # (G,) the layer of each
    group_of: np.ndarray  # (S,) int, the group of each block
    num_blocks: np.ndarray  # (G,) int, blocks of each group in the partition
    columns: np.ndarray  # (D,) int, the block of each column
    weights: np.ndarray  # (D,) 1 / (draws p_j); 1 where all blocks of a group are taken
    drawn: np.ndarray  # (G,) bool, whether a group's blocks were drawn
    squares: np.ndarray = field(
        repr=False
    )  # (k, D, S) |H_ij z_j|^2, i the last axis; |H_ij|_F^2 when exact
    by_group: np.ndarray = field(
        repr=False
    )  # (k, D, G) the same summed over all blocks i of a group
    exact: bool  # from the dense matrix, in float64
    num_matvecs: int  # products spent
    seed: int
    probes: str  # "rademacher" | "gaussian" | "none" (exact)
    route: str  # how products were computed

    @property
    def num_probes(self) -> int:
        """k; 1 when exact."""
        return len(self.squares)

    @cached_property
    def mass(self) -> np.ndarray:
        """(S, S) estimates of |H_ij|_F^2, unbiased; the mean of those from column i and from column j."""
        return (self._means + self._means.T) / 2

    @cached_property
    def mass_error(self) -> np.ndarray:
        """(S, S) standard errors of ``mass`` across probes."""
        spread = self._probe_variance(lambda square, block: square)
        return self._symmetric_error(spread)

    @cached_property
    def normalised(self) -> np.ndarray:
        """(S, S) |H_ij|_F / sqrt(|H_ii|_F |H_jj|_F): 1 on the diagonal; nan where a diagonal block vanishes."""
        return _normalised(self.mass)

    @cached_property
    def normalised_error(self) -> np.ndarray:
        """(S, S) standard errors of ``normalised`` by the delta method; 0 on the diagonal."""
        mass, own = self.mass, np.diag(self.mass)

        def relative(
            square: np.ndarray, block: int
        ) -> np.ndarray:  # the part of d log that column ``block`` gives
            return (
                _ratio(square, mass[:, block]) / 4 - _ratio(square[:, block, None], own[block]) / 4
            )

        error = 2 * self.normalised * self._symmetric_error(self._probe_variance(relative))
        np.fill_diagonal(
            error, 0.0 if self.exact else np.where(np.isnan(np.diag(error)), np.nan, 0.0)
        )
        return error

    @cached_property
    def shares(self) -> dict[str, Estimate]:
        """Shares of |H|_F^2, sum 1: inside a "block", else in a "tensor", else in a "layer", or "across"; nan if 0."""
        places = self._places
        total = float((self.weights * places.mean(1).sum(0)).sum())
        found = {}
        for place, values in zip(PLACES, places, strict=True):
            share = float((self.weights * values.mean(0)).sum()) / total if total else float("nan")
            error = (
                np.sqrt(self._total_variance(values - share * places.sum(0))) / total
                if total
                else float("nan")
            )
            found[place] = Estimate(share, float(error))
        return found

    @cached_property
    def tensor_shares(self) -> dict[str, Estimate]:
        """By group: the share of the mass between its own entries that lies inside blocks; nan when that vanishes."""
        inside, rest = self._places[:2]
        groups = self.group_of[self.columns]
        found = {}
        for number, name in enumerate(self.groups):
            own = groups == number
            weights, within = self.weights * own, inside + rest
            total = float((weights * within.mean(0)).sum())
            share = float((weights * inside.mean(0)).sum()) / total if total else float("nan")
            variance = self._total_variance(np.where(own, inside - share * within, 0.0), [number])
            found[name] = Estimate(
                share, float(np.sqrt(variance)) / total if total else float("nan")
            )
        return found

    @cached_property
    def tensor_mass(self) -> np.ndarray:
        """(G, G) estimates of the squared Frobenius norm of H between groups, unbiased, symmetrised."""
        groups = self.group_of[self.columns]
        found = np.stack(
            [self.weights * (groups == g) @ self.by_group.mean(0) for g in range(len(self.groups))]
        )
        return (found + found.T) / 2

    @cached_property
    def tensor_mass_error(self) -> np.ndarray:
        """(G, G) standard errors of ``tensor_mass``."""
        groups, every = self.group_of[self.columns], range(len(self.groups))
        variance = np.array([
            [self._total_variance(np.where(groups == g, self.by_group[:, :, h], 0.0), [g]) for h in every]
            for g in every
        ])  # fmt: skip
        return self._symmetric_error(variance)

    @property
    def tensor_coupling(self) -> np.ndarray:
        """(G, G) the normalised coupling of groups."""
        return _normalised(self.tensor_mass)

    @cached_property
    def _means(self) -> np.ndarray:
        """(S, S), column j the mean over all probes of block j."""
        found = np.zeros((len(self.names), len(self.names)))
        np.add.at(found, self.columns, self.squares.mean(0))
        return found.T / np.bincount(self.columns, minlength=len(self.names))

    def _probe_variance(self, function: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        """(S, S), column j the variance of the mean over block j's probes of ``function`` of squares (k, S) and j."""
        found = np.zeros((len(self.names), len(self.names)))
        if not self.exact:
            for block in range(len(self.names)):
                squares = self.squares[:, self.columns == block].reshape(-1, len(self.names))
                values = function(squares, block)
                found[:, block] = values.var(0, ddof=1) / len(values) if len(values) > 1 else np.nan
        return found

    def _symmetric_error(self, variance: np.ndarray) -> np.ndarray:
        """Errors of (A + A') / 2 from variances of A whose columns are independent."""
        error = np.sqrt(variance + variance.T) / 2
        np.fill_diagonal(error, np.sqrt(np.diag(variance)))
        return error

    @cached_property
    def _places(self) -> np.ndarray:
        """(4, k, D) mass of each column by PLACES."""
        every, group = np.arange(len(self.columns)), self.group_of[self.columns]
        layers = np.array(self.layers)
        same_layer = layers[group][:, None] == layers  # (D, G)
        inside, tensor = self.squares[:, every, self.columns], self.by_group[:, every, group]
        elsewhere = self.by_group * (np.arange(len(self.groups)) != group[:, None])
        layer, across = (elsewhere * same_layer).sum(-1), (elsewhere * ~same_layer).sum(-1)
        return np.stack([inside, tensor - inside, layer, across])

    def _total_variance(self, values: np.ndarray, groups: Sequence[int] | None = None) -> float:
        """Variance of the weighted total of ``values`` (k, D); groups are independent."""
        if self.exact:
            return 0.0
        group_of_column, total = self.group_of[self.columns], 0.0
        for group in range(len(self.groups)) if groups is None else groups:
            own = values[:, group_of_column == group]
            if self.drawn[group]:
                draws = own.mean(0) * self.weights[group_of_column == group]
                total += draws.var(ddof=1) * len(draws) if len(draws) > 1 else np.nan
            else:
                total += (own.var(0, ddof=1) / len(own)).sum() if len(own) > 1 else np.nan
        return float(total)


def coupling(
    curvature: Problem | CurvatureOperator, partition: Any, *, num_probes: int = 4, seed: int = 0,
    num_blocks: int | None = None, probes: str = "rademacher", exact: bool | str = "auto", num_pilot: int = 4,
    layers: Callable[[str], str] | None = None, finished: Mapping[str, np.ndarray] | None = None,
    on_column: Callable[[str, np.ndarray], None] | None = None, progress: bool = True,
) -> Coupling:  # fmt: skip
    """Estimates |H_ij|_F^2 between the blocks of ``partition``, and the shares of the Hessian's mass by place.

    Args:
        partition: a Partition, or anything that :func:`hessian_tools.structure.dense.dense_block` takes as blocks.
        num_probes: k probes for each column; at least 2 for errors where all blocks of a tensor are taken.
        seed: with the blocks' names the only source of randomness.
        num_blocks: the most columns of one tensor; where it has more blocks, so many are drawn with replacement (a
            block drawn twice has other probes each time), at least 2 for errors. None: all.
        probes: "rademacher" | "gaussian".
        exact: "auto" takes the dense float64 matrix where that costs no more products; True always, False never.
        num_pilot: products of the whole Hessian that guide the draws, made only where blocks are drawn; 0 draws evenly.
        layers: the layer of a parameter by its name; default :func:`layer_namer`.
        finished: columns of an earlier run with the same arguments, by label: they are not computed again.
        on_column: called with the label and the column (an array) as each one is done, to keep for ``finished``.
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: for an argument out of range; for so many columns that their table exceeds 1 GiB, with the remedy.
        TypeError, ValueError: for a ``partition`` as for the blocks of ``dense_block``.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    Settings(num_probes, 1, seed, probes, "full", exact)
    if num_pilot < 0 or (num_blocks is not None and num_blocks < 1):
        raise ValueError(
            f"num_blocks is {num_blocks} and num_pilot {num_pilot}; at least 1 and 0 are needed"
        )
    problem = problem_of(curvature)
    grid = BlockGrid(cuts_of(partition, problem), layers or layer_namer(problem.model), num_blocks)
    spent = num_probes * grid.num_columns + (num_pilot if grid.drawn.any() else 0)
    if exact is True or (exact == "auto" and grid.num_entries <= min(spent, MOST_ENTRIES)):
        return _exact(curvature, grid, seed, progress)
    _refuse_too_large(grid, num_probes)
    hessian = as_operator(curvature)
    done = dict(finished or {})

    def keep(label: str, column: np.ndarray) -> None:
        done[label] = column
        if on_column is not None:
            on_column(label, column)

    with tqdm(
        total=spent, unit="HVP", disable=None if progress else True, dynamic_ncols=True
    ) as bar:
        columns = hessian.columns(grid.cuts)
        if grid.drawn.any() and num_pilot and PILOT not in done:
            keep(PILOT, _pilot(columns, seed, num_pilot, bar))
        draws = grid.draws(seed, done.get(PILOT))
        blocks = np.unique([draw.block for draw in draws])
        for label, column in _probed(
            columns, grid, draws, blocks, done, (probes, seed, num_probes), bar
        ):
            keep(label, column)
    table = np.stack([done[draw.label] for draw in draws], axis=1)  # (k, D, S + G)
    squares, by_group = np.split(table, [len(blocks)], axis=2)
    return Coupling(
        tuple(grid.names[block] for block in blocks), grid.groups, grid.layers, grid.group_of[blocks],
        grid.num_blocks, np.searchsorted(blocks, [draw.block for draw in draws]),
        np.array([draw.weight for draw in draws]), grid.drawn, squares, by_group, False, spent, seed, probes,
        hessian.route,
    )  # fmt: skip


def layer_namer(model: torch.nn.Module) -> Callable[[str], str]:
    """Parameter name -> its layer: the transformer layer around it, else the module that owns it ("(root)")."""
    paths = sorted(find_attention(model).layers, key=len)

    def layer(parameter: str) -> str:
        around = [path for path in paths if is_inside(parameter, path)]
        return around[-1] if around else parameter.rpartition(".")[0] or "(root)"

    return layer


def _pilot(columns: Columns, seed: int, num_pilot: int, bar: Any) -> np.ndarray:
    """(B,) mean over probes of |(H z)_j|^2, which estimates the mass of block column j."""
    total = np.zeros(sum(cut.num_blocks for cut in columns.cuts))
    for probe in range(num_pilot):
        product = columns.whole(
            draw_probes("rademacher", seed, f"{PILOT} {probe}", 1, columns.size)
        )
        total += _squared_norms(product, columns)[0] / num_pilot
        bar.update(1)
    if not np.isfinite(total).all():
        raise NumericalError(
            "a product with the whole Hessian is NaN or inf; check the loss and the dtype's range"
        )
    return total


def _probed(
    columns: Columns, grid: BlockGrid, draws: Sequence[Draw], blocks: np.ndarray, done: Mapping[str, np.ndarray],
    probing: tuple[str, int, int], bar: Any,
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """(label, (k, S + G) squares) of the draws not yet done; those of one cut go through together."""
    kind, seed, k = probing
    cut_of = np.searchsorted(grid.starts, [draw.block for draw in draws], side="right") - 1
    for number, cut in enumerate(grid.cuts):
        missing = [
            draw
            for draw, of in zip(draws, cut_of, strict=True)
            if of == number and draw.label not in done
        ]
        bar.update(k * (int((cut_of == number).sum()) - len(missing)))
        pending: dict[str, list[np.ndarray]] = {draw.label: [] for draw in missing}
        rows = [(draw, probe) for draw in missing for probe in range(k)]
        size = min(_MOST_ROWS, columns.rows)
        for chunk in (rows[first : first + size] for first in range(0, len(rows), size)):
            bar.set_postfix_str(chunk[0][0].label)
            drawn = {
                draw.label: draw_probes(kind, seed, draw.label, k, cut.block_size)
                for draw, _ in chunk
            }
            vectors = torch.stack([drawn[draw.label][probe] for draw, probe in chunk])
            positions = torch.tensor([draw.block for draw, _ in chunk]) - int(grid.starts[number])
            squares = _squared_norms(columns.products(cut, positions, vectors), columns)
            found = np.concatenate([squares[:, blocks], grid.by_group(squares)], axis=1)
            for (draw, _), row in zip(chunk, found, strict=True):
                if not np.isfinite(row).all():
                    raise NumericalError(
                        f"a product with block {draw.label} is NaN or inf; check the loss"
                    )
                pending[draw.label].append(row)
                if len(pending[draw.label]) == k:
                    yield draw.label, np.stack(pending.pop(draw.label))
            bar.update(len(chunk))


def _refuse_too_large(grid: BlockGrid, num_probes: int) -> None:
    columns = grid.num_columns
    if (needed := 8 * num_probes * columns * (columns + len(grid.groups))) > _MOST_BYTES:
        raise ValueError(
            f"num_blocks={grid.most} asks for a table of {columns:,} columns, {format_bytes(needed)}; draw fewer "
            "blocks of each tensor, e.g. num_blocks=8"
        )


def _squared_norms(products: Tensor, columns: Columns) -> np.ndarray:
    """(r, n) -> (r, B) squared norms by block, summed in float64, a row at a time to spare memory."""
    rows = [
        torch.cat(
            [
                torch.linalg.vector_norm(p[0], dim=1, dtype=torch.float64)
                for p in columns.by_cut(row[None])
            ]
        )
        for row in products
    ]
    return torch.stack(rows).square().cpu().numpy()


def _exact(
    curvature: Problem | CurvatureOperator, grid: BlockGrid, seed: int, progress: bool
) -> Coupling:
    """All blocks, from the dense matrix."""
    dense = dense_block(curvature, list(grid.cuts), progress=progress)
    mass, every = dense.mass, np.arange(len(grid.names))
    return Coupling(
        dense.names, grid.groups, grid.layers, grid.group_of, grid.num_blocks, every, np.ones(len(every)),
        np.zeros_like(grid.drawn), mass[None], grid.by_group(mass)[None], True, dense.num_matvecs, seed, "none",
        f"dense matrix, {dense.arithmetic}",
    )  # fmt: skip


def _normalised(mass: np.ndarray) -> np.ndarray:
    scale = np.diag(mass) ** 0.25
    return _ratio(np.sqrt(mass), np.outer(scale, scale), undefined=np.nan)


def _ratio(a: np.ndarray, b: Any, undefined: float = 0.0) -> np.ndarray:
    """a / b, ``undefined`` where b is 0."""
    return np.divide(
        a,
        b,
        out=np.full(np.broadcast_shapes(np.shape(a), np.shape(b)), undefined),
        where=np.asarray(b) != 0,
    )
