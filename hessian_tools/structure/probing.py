"""Measures :class:`hessian_tools.structure.mass.BlockMass` of one region: by probing, or from its dense matrix.

Letters as there: n entries of the region, B blocks of a cut, S draws, K pilots, C cuts, r rows (vectors).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.probes import draw_probes, keyed_stream
from hessian_tools.structure.mass import ELEMENTS, WHOLE, BlockMass, Cutting, Draws, Pilots

_EVEN = 0.1  # share of the draws that is made evenly
_MOST_ROWS = 64  # vectors in one product
_VECTORS = 4  # of a row, at a time: itself, its product, squares in float64
_TINY = torch.finfo(torch.float64).tiny  # for blocks without mass, which have no share in anything
_ROWS = 512  # of a dense matrix that are squared at a time


def measure(
    hessian: HessianOperator, region: Block, cuttings: Sequence[Cutting], *, num_probes: int, num_blocks: int,
    seed: int, exact: bool, on_products: Callable[[int], None],
) -> BlockMass:  # fmt: skip
    """Masses of ``cuttings`` (with "whole" and "elements", no two alike) of ``region``, and of their groups.

    Raises:
        NumericalError: for a product with NaN or inf.
    """
    others = [c for c in cuttings if c.name not in (WHOLE, ELEMENTS)]
    inside = {
        c.name: tuple(o.name for o in cuttings if o is not c and _refines(c, o)) for c in cuttings
    }
    groups: dict[str, Cutting] = {}
    for one, other in combinations(others, 2):
        more, fewer = (one, other) if one.num_blocks > other.num_blocks else (other, one)
        if more.num_blocks > fewer.num_blocks > 1 and fewer.name not in inside[more.name]:
            group = more.grouped(fewer.num_blocks)
            groups[group.name] = group
    every = [*cuttings, *groups.values()]
    bases = [c for c in others if not any(c.name in inside[finer.name] for finer in others)]
    around = {
        base.name: [
            c for c in every if c.name == WHOLE or (c.name != ELEMENTS and base.is_inside(c))
        ]
        for base in bases
    }
    base_of = {c.name: base for base in reversed(around) for c in around[base] if c.name != WHOLE}
    operator = hessian.block(region)
    probing = _Probing(operator, region.name, seed, hessian.krylov_bytes, on_products)
    pairs = [(c, o) for c in cuttings for o in cuttings if o.name in inside[c.name]]
    if exact:
        pilots, draws, asymmetry, spent = probing.exactly(pairs, every, bases)
    else:
        pilots, asymmetry, masses = probing.pilots(num_probes, pairs, bases)
        draws = {base.name: probing.draws(base, around[base.name], every, masses[base.name], num_blocks)
                 for base in bases} if pilots.mass.mean() else {}  # fmt: skip
        spent = num_probes + sum(len(found.masses) for found in draws.values())
    counts = {c.name: c.num_blocks for c in every}
    return BlockMass(
        region.name, operator.size, counts, inside, base_of, draws, pilots, asymmetry, exact, spent
    )


def cost(cuttings: Sequence[Cutting], num_probes: int, num_blocks: int) -> int:
    """Products that :func:`measure` spends, at most, without ``exact``."""
    others = [c for c in cuttings if c.name not in (WHOLE, ELEMENTS)]
    bases = [
        c
        for c in others
        if not any(o is not c and o.num_blocks > c.num_blocks and o.is_inside(c) for o in others)
    ]
    return num_probes + sum(_rows_of(base.num_blocks, num_blocks) for base in bases)


def _refines(finer: Cutting, coarser: Cutting) -> bool:
    if ELEMENTS in (finer.name, coarser.name) or WHOLE in (finer.name, coarser.name):
        return finer.name == ELEMENTS or coarser.name == WHOLE
    return finer.num_blocks > coarser.num_blocks and finer.is_inside(coarser)


def _rows_of(blocks: int, num_blocks: int) -> int:
    """Products for the blocks of a cut: all of them at least twice where that is not more than ``num_blocks``."""
    return blocks * max(2, num_blocks // blocks) if 2 * blocks <= num_blocks else num_blocks


class _Probing:
    """Products with one region's block, and what is summed up from them."""

    def __init__(
        self, operator: Any, name: str, seed: int, memory: int, told: Callable[[int], None]
    ) -> None:
        self.operator, self.name, self.seed, self.told = operator, name, seed, told
        self.rows = max(1, min(_MOST_ROWS, memory // (_VECTORS * operator.size * 8)))

    def pilots(
        self, count: int, pairs: Sequence[tuple[Cutting, Cutting]], bases: Sequence[Cutting]
    ) -> tuple[Pilots, float, dict[str, np.ndarray]]:
        """The pilots, their asymmetry, and the mean mass of each block of ``bases``."""
        size, like = self.operator.size, self.operator
        z = draw_probes(
            "rademacher", self.seed, f"{self.name}, pilots", count, size, dtype=like.dtype
        )
        y = torch.cat([self._products(rows.to(like.device)).cpu() for rows in z.split(self.rows)])
        crossed = np.array([[float((one.double() * other).sum()) for other in y] for one in z])
        diagonal = _gram(
            z.mul_(y)
        )  # in place, as is the next: of a large tensor there is room for two such arrays
        mass = np.array([float(row.double().square().sum()) for row in y])
        squares, mean = y.square_(), mass.mean()
        sums = {
            c.name: _sums(squares, c)
            for pair in pairs
            for c in pair
            if c.name not in (ELEMENTS, WHOLE)
        }
        sums |= {base.name: _sums(squares, base) for base in bases}
        overlaps = {}
        for finer, coarser in pairs:
            own = squares if finer.name == ELEMENTS else sums[finer.name]
            weights = None
            if coarser.name != WHOLE:
                weights = (
                    sums[coarser.name]
                    .mean(0)
                    .clamp_min(_TINY)
                    .reciprocal()[_parents(finer, coarser)]
                )
            overlaps[finer.name, coarser.name] = _gram(own, weights) / (
                mean if coarser.name == WHOLE and mean else 1.0
            )
        asymmetry = np.sqrt(np.square(crossed - crossed.T).sum() / max(1, count * (count - 1)))
        pilots = Pilots(mass, diagonal, overlaps)
        masses = {base.name: sums[base.name].mean(0).numpy() for base in bases}
        return pilots, float(asymmetry / np.sqrt(mean)) if mean else 0.0, masses

    def draws(
        self,
        base: Cutting,
        around: Sequence[Cutting],
        every: Sequence[Cutting],
        masses: np.ndarray,
        num_blocks: int,
    ) -> Draws:
        """Masses of all blocks of ``base``, or of drawn ones, within each cut ``around`` them."""
        count, total = _rows_of(base.num_blocks, num_blocks), base.num_blocks
        if 2 * total <= num_blocks:
            blocks = np.repeat(np.arange(total), count // total)
            weights, strata = np.full(count, total / count), blocks
        else:
            chances = (1 - _EVEN) * masses / masses.sum() + _EVEN * (masses > 0) / (
                masses > 0
            ).sum()
            stream = np.random.Generator(keyed_stream(self.seed, self.name, base.name))
            blocks = stream.choice(total, count, p=chances / chances.sum())
            weights, strata = 1 / (count * chances[blocks]), np.zeros(count, int)
        found = np.full((count, len(every)), np.nan)
        columns = [next(i for i, c in enumerate(every) if c is cut) for cut in around]
        for first in range(0, count, self.rows):
            chosen = blocks[first : first + self.rows]
            places = [torch.nonzero(base.labels == int(block)).flatten() for block in chosen]
            z = torch.zeros(len(chosen), self.operator.size, dtype=self.operator.dtype)
            for row, entries in enumerate(places):
                label = f"{self.name}, {base.name}, draw {first + row}"
                z[row, entries] = draw_probes(
                    "rademacher", self.seed, label, 1, len(entries), dtype=z.dtype
                )[0]
            y = self._products(z.to(self.operator.device)).cpu()
            for row, entries in enumerate(places):
                squares = y[row].double().square()
                masses_around = [_around(squares, c, entries[0]) for c in around]
                found[first + row, columns] = np.array(masses_around) * weights[first + row]
        return Draws(found, strata)

    def exactly(
        self,
        pairs: Sequence[tuple[Cutting, Cutting]],
        every: Sequence[Cutting],
        bases: Sequence[Cutting],
    ) -> tuple[Pilots, dict[str, Draws], float, int]:
        """The same from the dense matrix, without any error."""
        size = self.operator.size
        dense = torch.cat([self._products(units) for units in self._units()]).double().cpu()
        squares = ((dense + dense.T) / 2).square()
        norm, column = float(squares.sum()), squares.sum(1)
        difference = float((dense - dense.T).norm())
        inside = {c.name: norm if c.name == WHOLE else float(squares.diagonal().sum()) if c.name == ELEMENTS
                  else _inside(squares, c.labels) for c in every}  # fmt: skip
        sums = {c.name: _sums(column[None], c)[0] for c in every}
        overlaps = {}
        for finer, coarser in pairs:
            around = sums[coarser.name][_parents(finer, coarser)].clamp_min(_TINY)
            own = sums[finer.name]
            overlaps[finer.name, coarser.name] = np.array([[float((own * own / around).sum())]])
        diagonal = np.array([[inside[ELEMENTS]]]) if ELEMENTS in inside else np.zeros((1, 1))
        row = Draws(np.array([[inside[c.name] for c in every]]), np.zeros(1, int))
        pilots = Pilots(np.array([norm]), diagonal, overlaps)
        return (
            pilots,
            {base.name: row for base in bases},
            difference / norm**0.5 if norm else 0.0,
            size,
        )

    def _units(self) -> Iterator[Tensor]:
        size, like = self.operator.size, self.operator
        for numbers in torch.arange(size, device=like.device).split(self.rows):
            units = torch.zeros(len(numbers), size, dtype=like.dtype, device=like.device)
            units[torch.arange(len(numbers)), numbers] = 1
            yield units

    def _products(self, vectors: Tensor) -> Tensor:
        products = self.operator.matmat(vectors)
        if not bool(torch.isfinite(products).all()):
            raise NumericalError(
                f"a product with the Hessian of {self.name} is NaN or inf; check the loss and the dtype's range"
            )
        self.told(len(vectors))
        return products


def _sums(squares: Tensor, cut: Cutting) -> Tensor:
    """(r, n) -> (r, B) float64 sums by block."""
    if cut.name == WHOLE:
        return squares.double().sum(1, keepdim=True)
    if cut.name == ELEMENTS:
        return squares
    return torch.stack(
        [torch.bincount(cut.labels, row.double(), cut.num_blocks) for row in squares]
    )


def _around(squares: Tensor, cut: Cutting, entry: Tensor) -> float:
    """Sum of (n,) ``squares`` over the block of ``cut`` that holds ``entry``."""
    return float((squares if cut.name == WHOLE else squares[cut.labels == cut.labels[entry]]).sum())


def _parents(finer: Cutting, coarser: Cutting) -> Tensor:
    """(B,) the block of ``coarser`` around each block of ``finer``."""
    if coarser.name == WHOLE:
        return torch.zeros(finer.num_blocks, dtype=torch.int64)
    if finer.name == ELEMENTS:
        return coarser.labels
    return torch.zeros(finer.num_blocks, dtype=torch.int64).scatter_(
        0, finer.labels, coarser.labels
    )


def _gram(vectors: Tensor, weights: Tensor | None = None) -> np.ndarray:
    """(K, n) -> (K, K) inner products, weighted by (n,) ``weights``, summed in float64."""
    found = np.zeros((len(vectors), len(vectors)))
    for i, one in enumerate(vectors):
        one = one.double() if weights is None else one * weights
        found[i, i:] = found[i:, i] = [float((one * other).sum()) for other in vectors[i:]]
    return found


def _inside(squares: Tensor, labels: Tensor) -> float:
    """Mass of a dense matrix of squares inside the blocks of ``labels``."""
    parts = zip(squares.split(_ROWS), labels.split(_ROWS), strict=True)
    return sum(float((rows * (own[:, None] == labels)).sum()) for rows, own in parts)
