"""How much of a tensor's Hessian lies inside the blocks of every way to cut it, measured together.

All masses are squared Frobenius norms within one region t (a tensor, or a role of a fused one), in units of |H_tt|_F^2.

- A random sign vector z on block d alone gives y = H_td z with E |y_d|^2 = |H_dd|_F^2 and E |y|^2 = |H_td|_F^2, and the
  mass within every coarser block around d besides. A cut's share is a ratio of totals of these over its blocks: all of
  them, or S drawn with replacement with probability p_d, weighted by 1 / (S p_d) (Hansen & Hurwitz 1943). Both totals
  come from the same products, so most of what is random in them cancels.
- K products with sign vectors on all of t (pilots) give the masses m_d of the block columns, from which p_d is made
  (nine tenths in proportion to them, one tenth evenly over the blocks that have any), and the diagonal's share D, the
  mean over pairs of pilots of sum_i (z_i y_i)(z'_i y'_i).
- Expected without structure: mass off the diagonal placed without regard to blocks, given the masses of the columns; a
  block d of a cut X within the block c of a coarser cut Y then holds m_d^2 / m_c (the null model of modularity, Newman
  2006); the diagonal is inside every cut. So a few heavy rows are no block structure.

The *contrast* of X within Y is the odds of off-diagonal mass of Y's blocks to lie in X's, divided by these odds without
structure: 1 without structure, 4 where entries inside are twice as large (rms) as those outside, infinite where nothing
is outside. The *excess* is (share - expected) / (1 - expected).

Errors: delete-one jackknife over draws (within a block, where all blocks are taken) and over pilots.
Letters: n entries of t, B blocks of a cut, S draws, K pilots, C cuts, r rows (vectors).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.blocks.block import Block, Cut

WHOLE, ELEMENTS = "whole", "elements"


@dataclass(frozen=True, eq=False)
class Cutting:
    """One way to cut a region of n entries."""

    name: str
    labels: Tensor = field(repr=False)  # (n,) int64, the number of each entry's block
    num_blocks: int

    def is_inside(self, other: "Cutting") -> bool:
        """Whether each of its blocks lies in one block of ``other``."""
        low = torch.full((self.num_blocks,), other.num_blocks).scatter_reduce_(
            0, self.labels, other.labels, "amin"
        )
        high = torch.full((self.num_blocks,), -1).scatter_reduce_(
            0, self.labels, other.labels, "amax"
        )
        return bool((low >= high).all())

    def grouped(self, num_blocks: int) -> "Cutting":
        """Runs of neighbouring blocks together, as even as can be."""
        labels = torch.div(self.labels * num_blocks, self.num_blocks, rounding_mode="floor")
        return Cutting(grouped(self.name, num_blocks), labels, num_blocks)


def grouped(name: str, num_blocks: int) -> str:
    """The name of a cut whose neighbours are put together."""
    return f"{name}, in {num_blocks} groups"


def cutting(name: str, cuts: Sequence[Cut], region: Block) -> Cutting | None:
    """What ``cuts`` make of ``region``, entries that they leave out being one block; None where they hold nothing."""
    part, count = region.as_cut().parts[0], 0
    owner = torch.full(part.shape, -1)
    for cut in cuts:
        for piece in cut.parts:
            if piece.parameter == part.parameter:
                numbers = torch.arange(count, count + piece.num_blocks)[:, None]
                piece.place(numbers.expand(-1, piece.block_size), owner)
        count += cut.num_blocks
    labels = region.select(owner).reshape(-1) + 1
    used = torch.bincount(labels) > 0
    if not bool(used[1:].any()):
        return None
    numbers = used.cumsum(0) - 1
    return Cutting(name, numbers[labels], int(used.sum()))


@dataclass(frozen=True)
class Measured:
    """An estimate, its standard error, and the degrees of freedom of that; 0 and infinite when exact."""

    value: float
    standard_error: float
    freedom: float


@dataclass(frozen=True, eq=False)
class Draws:
    """Weighted masses of the drawn blocks of one cut within every cut around them."""

    masses: np.ndarray  # (r, C), nan for cuts that are not around
    strata: np.ndarray  # (r,) int; rows of one stratum are alike

    def total(self, missing: int | None = None) -> np.ndarray:
        """(C,) sums, without row ``missing``, for which the rest of its stratum stands."""
        return self._totals[-1 if missing is None else missing]

    @cached_property
    def _totals(self) -> np.ndarray:
        """(r + 1, C): without each row, and with all."""
        alike = (self.strata[:, None] == self.strata).astype(float)
        counts = alike.sum(1, keepdims=True)
        weights = 1 + alike / np.maximum(counts - 1, 1)
        np.fill_diagonal(weights, 0.0)
        return np.concatenate([weights @ self.masses, self.masses.sum(0, keepdims=True)])


@dataclass(frozen=True, eq=False)
class Pilots:
    """What K products with all of the region say; K = 1 for the exact values."""

    mass: np.ndarray  # (K,) |y|^2
    diagonal: np.ndarray  # (K, K) sums of (z_i y_i)(z'_i y'_i)
    overlaps: dict[
        tuple[str, str], np.ndarray
    ]  # (finer, coarser) -> (K, K) sums of m_d m'_d / (mean m_c)

    def diagonal_share(self, missing: int | None = None) -> float:
        return _ratio(self._pairs(self.diagonal, missing), self.mass[self._kept(missing)].mean())

    def overlap(self, finer: str, coarser: str, missing: int | None = None) -> float:
        """The share that columns' masses alone make ``finer``'s blocks hold within ``coarser``'s."""
        both = self._pairs(np.outer(self.mass, self.mass), missing)
        return _ratio(self._pairs(self.overlaps[finer, coarser], missing) * self.mass.mean(), both)

    def _kept(self, missing: int | None) -> np.ndarray:
        return np.arange(len(self.mass)) != (-1 if missing is None else missing)

    def _pairs(self, table: np.ndarray, missing: int | None) -> float:
        """The mean over pairs of different pilots, which is unbiased for products of means."""
        if len(table) == 1:
            return float(table[0, 0])
        kept = self._kept(missing)
        table = table[np.ix_(kept, kept)]
        return float((table.sum() - np.trace(table)) / (len(table) * (len(table) - 1)))


Missing = tuple[str, int] | None  # (cut whose draws miss a row, or "pilots"; the row)


@dataclass(frozen=True, eq=False)
class BlockMass:
    """Masses inside the blocks of the cuts of one region, asked for by the names of cuts."""

    region: str
    size: int  # n
    num_blocks: dict[str, int]  # by cut, "whole" first; groups of neighbours last
    inside: dict[str, tuple[str, ...]]  # cut -> the coarser cuts that it refines
    base: dict[str, str]  # cut -> the cut whose draws measure it
    draws: dict[str, Draws] = field(repr=False)
    pilots: Pilots = field(repr=False)
    asymmetry: float  # rms of z'H z'' - z''H z' in units of |H_tt|_F: rounding
    exact: bool
    num_matvecs: int

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names, without groups of neighbours."""
        return tuple(self.inside)

    @property
    def norm(self) -> float:
        """|H_tt|_F."""
        return float(np.sqrt(self.pilots.mass.mean()))

    def share(self, finer: str, coarser: str = WHOLE) -> Measured:
        """Of the mass inside ``coarser``'s blocks, what lies inside ``finer``'s."""
        return self._measured(lambda missing: self._share(finer, coarser, missing), finer, coarser)

    def expected(self, finer: str, coarser: str = WHOLE) -> float:
        """That share if there were no structure within ``coarser``'s blocks."""
        return self._expected(finer, coarser, 1.0, None)

    def excess(self, finer: str, coarser: str = WHOLE) -> Measured:
        """(share - expected) / (1 - expected)."""

        def excess(missing: Missing) -> float:
            expected = self._expected(finer, coarser, 1.0, missing)
            return _ratio(self._share(finer, coarser, missing) - expected, 1 - expected)

        return self._measured(excess, finer, coarser)

    def contrast(self, finer: str, coarser: str = WHOLE) -> float:
        """Odds of off-diagonal mass to lie inside ``finer``'s blocks, over those without structure."""
        diagonal = self._share(ELEMENTS, coarser, None) if finer != ELEMENTS else 0.0
        share, even = (
            _ratio(value - diagonal, 1 - diagonal)
            for value in (
                self._share(finer, coarser, None),
                self._expected(finer, coarser, 1.0, None),
            )
        )
        return _ratio(_odds(share), _odds(even))

    def above(self, finer: str, coarser: str, contrast: float, diagonal: float) -> Measured:
        """By how much the share exceeds that of a given ``contrast``; for "elements", the share ``diagonal``."""

        def above(missing: Missing) -> float:
            at = (
                diagonal if finer == ELEMENTS else self._expected(finer, coarser, contrast, missing)
            )
            return self._share(finer, coarser, missing) - at

        return self._once(("above", finer, coarser, contrast, diagonal), above, finer, coarser)

    def lead(self, one: str, other: str, odds: float = 1.0) -> Measured:
        """Share of ``one`` minus the share of ``odds`` times the odds of ``other``'s, at the same number of blocks."""
        one, other = self.matched(one, other)

        def lead(missing: Missing) -> float:
            held = self._share(other, WHOLE, missing)
            return self._share(one, WHOLE, missing) - odds * held / (1 + (odds - 1) * held)

        return self._once(("lead", one, other, odds), lead, one, other)

    def matched(self, one: str, other: str) -> tuple[str, str]:
        """Both at the same number of blocks: neighbouring blocks of the one that has more go together."""
        few = min(self.num_blocks[one], self.num_blocks[other])
        one, other = (
            name if self.num_blocks[name] == few else grouped(name, few) for name in (one, other)
        )
        return one, other

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.num_blocks)}

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], Measured]:
        return {}

    def _share(self, finer: str, coarser: str, missing: Missing) -> float:
        if finer in (coarser, WHOLE):
            return 1.0
        if finer == ELEMENTS:
            diagonal = self.pilots.diagonal_share(_of("pilots", missing))
            return _ratio(diagonal, self._share(coarser, WHOLE, missing))
        base = self.base[finer]
        if base not in self.draws:  # there is no mass to draw by
            return float("nan")
        masses = self.draws[base].total(_of(base, missing))
        return _ratio(masses[self._place[finer]], masses[self._place[coarser]])

    def _expected(self, finer: str, coarser: str, contrast: float, missing: Missing) -> float:
        """The share at ``contrast``."""
        if finer in (coarser, WHOLE):
            return 1.0
        alone = self.pilots.overlap(ELEMENTS, coarser, _of("pilots", missing))
        if finer == ELEMENTS:
            return alone
        diagonal = self._share(ELEMENTS, coarser, missing)
        even = _ratio(
            self.pilots.overlap(finer, coarser, _of("pilots", missing)) - alone, 1 - alone
        )
        return diagonal + (1 - diagonal) * _ratio(contrast * even, 1 + (contrast - 1) * even)

    def _once(
        self, key: tuple[Any, ...], value: Callable[[Missing], float], *names: str
    ) -> Measured:
        if key not in self._known:
            self._known[key] = self._measured(value, *names)
        return self._known[key]

    def _measured(self, value: Callable[[Missing], float], *names: str) -> Measured:
        found, parts = value(None), []
        if self.exact:
            return Measured(found, 0.0, float("inf"))
        for base in dict.fromkeys(
            self.base[name] for name in names if self.base.get(name) in self.draws
        ):
            strata = self.draws[base].strata
            changed = np.array([value((base, row)) for row in range(len(strata))])
            alike = [changed[strata == stratum] for stratum in np.unique(strata)]
            variance = sum((len(own) - 1) * own.var() for own in alike)
            parts.append((variance, len(changed) - len(alike)))
        probes = len(self.pilots.mass)
        changed = np.array([value(("pilots", probe)) for probe in range(probes)])
        parts.append(((probes - 1) * changed.var(), probes - 1))
        total = sum(variance for variance, _ in parts)
        spread = sum(variance**2 / freedom for variance, freedom in parts)  # Satterthwaite 1946
        return Measured(
            found, float(np.sqrt(total)), float(total**2 / spread) if spread > 0 else float("inf")
        )


def _of(source: str, missing: Missing) -> int | None:
    return missing[1] if missing is not None and missing[0] == source else None


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else float("inf")
