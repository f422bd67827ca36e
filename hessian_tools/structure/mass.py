"""How much of a tensor's Hessian lies inside the blocks of every way to cut it, measured together.

All masses are squared Frobenius norms within one region t (a tensor, or a role of a fused one), in
units of |H_tt|_F^2.

- A random sign vector z on block d alone gives y = H_td z with E |y_d|^2 = |H_dd|_F^2 and
  E |y|^2 = |H_td|_F^2, and the mass within every coarser block around d besides. A cut's share is a
  ratio of totals of these over its blocks: all of them, or S drawn with replacement with
  probability p_d, weighted by 1 / (S p_d) (Hansen & Hurwitz 1943). Both totals come from the same
  products, so most of what is random in them cancels.
- K products with sign vectors on all of t (pilots) give the masses m_d of the block columns, from
  which p_d is made (nine tenths in proportion to them, one tenth evenly over the blocks that have
  any), and the diagonal's share D, the mean over pairs of pilots of sum_i (z_i y_i)(z'_i y'_i).
- Expected without structure: mass off the diagonal placed without regard to blocks, given the
  masses of the columns; a block d of a cut X within the block c of a coarser cut Y then holds
  m_d^2 / m_c (the null model of modularity, Newman 2006); the diagonal is inside every cut. So a
  few heavy rows are no block structure.

The *contrast* of X within Y is the odds of off-diagonal mass of Y's blocks to lie in X's, divided
by these odds without structure: 1 without structure, 4 where entries inside are twice as large
(rms) as those outside, infinite where nothing is outside. The *excess* is
(share - expected) / (1 - expected).

Errors: delete-one jackknife over draws (within a block, where all blocks are taken) and over
pilots.
Letters: n entries of t, B blocks of a cut, S draws, K pilots, C cuts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hessian_tools.structure.cuttings import ELEMENTS, WHOLE, grouped
from hessian_tools.structure.pairs import Floats, Pairs


@dataclass(frozen=True)
class Measured:
    """An estimate, its standard error, and the degrees of freedom of that; 0 and inf when exact."""

    value: float
    standard_error: float
    freedom: float


@dataclass(frozen=True)
class LeftOut:
    """What a replicate of the jackknife leaves out: one row of ``source``, or nothing."""

    source: str = ""  # a base, whose draws miss a row, or PILOTS
    row: int = -1

    def row_of(self, source: str) -> int | None:
        return self.row if self.source == source else None


PILOTS = "(pilots)"
NOTHING = LeftOut()


@dataclass(frozen=True, eq=False)
class Draws:
    """Weighted masses of the drawn blocks of one cut within every cut around them."""

    masses: Floats  # (S, C), nan for cuts that are not around
    strata: NDArray[np.int64]  # (S,) rows of one stratum are alike

    def total(self, missing: int | None = None) -> Floats:
        """(C,) sums, without row ``missing``, for which the rest of its stratum stands."""
        return self._totals[-1 if missing is None else missing]

    @cached_property
    def _totals(self) -> Floats:
        """(S + 1, C): without each row, and with all."""
        alike = (self.strata[:, None] == self.strata).astype(float)
        counts = alike.sum(1, keepdims=True)
        weights = 1 + alike / np.maximum(counts - 1, 1)
        np.fill_diagonal(weights, 0.0)
        return np.concatenate([weights @ self.masses, self.masses.sum(0, keepdims=True)])


@dataclass(frozen=True, eq=False)
class Pilots:
    """What K products with all of the region say; K = 1 for the exact values."""

    mass: Floats  # (K,) |y|^2
    diagonal: Floats  # (K, K) sums of (z_i y_i)(z'_i y'_i)
    # (finer, coarser) -> (K, K) sums of m_d m'_d / (mean m_c)
    overlaps: dict[tuple[str, str], Floats]

    def diagonal_share(self, missing: int | None = None) -> float:
        mean = self.mass[self._kept(missing)].mean()
        return _ratio(self._mean_over_pairs(self.diagonal, missing), mean)

    def overlap(self, finer: str, coarser: str, missing: int | None = None) -> float:
        """The share that columns' masses alone make ``finer``'s blocks hold in ``coarser``'s."""
        total = self._mean_over_pairs(np.outer(self.mass, self.mass), missing)
        overlap = self._mean_over_pairs(self.overlaps[finer, coarser], missing)
        return _ratio(overlap * self.mass.mean(), total)

    def _kept(self, missing: int | None) -> NDArray[np.bool_]:
        return np.arange(len(self.mass)) != (-1 if missing is None else missing)

    def _mean_over_pairs(self, table: Floats, missing: int | None) -> float:
        """The mean over pairs of different pilots, which is unbiased for products of means."""
        if len(table) == 1:
            return float(table[0, 0])
        kept = self._kept(missing)
        table = table[np.ix_(kept, kept)]
        count = len(table)
        return float((table.sum() - np.trace(table)) / (count * (count - 1)))


@dataclass(frozen=True, eq=False)
class BlockMass:
    """Masses inside the blocks of the cuts of one region; cuts are given by their names."""

    region: str
    size: int  # n
    num_blocks: dict[str, int]  # by cut, "whole" first; groups of neighbours last
    inside: dict[str, tuple[str, ...]]  # cut -> the coarser cuts that it refines
    base: dict[str, str]  # cut -> the cut whose draws measure it
    draws: dict[str, Draws] = field(repr=False)  # by base; none where there is no mass to draw by
    pairs: dict[str, Pairs] = field(repr=False)  # by cut between the whole and single entries
    pilots: Pilots = field(repr=False)
    asymmetry: float  # rms of z'H z'' - z''H z' in units of |H_tt|_F: rounding
    exact: bool
    num_matvecs: int
    # products were divided by it: masses are in its square, whatever the scale of the loss
    unit: float = 1.0
    # (finer, coarser) -> logarithm of how many such cuts of the coarser's blocks there are
    log_alternatives: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names, without groups of neighbours."""
        return tuple(self.inside)

    @property
    def norm(self) -> float:
        """|H_tt|_F."""
        return self.unit * float(np.sqrt(self.pilots.mass.mean()))

    def share(self, finer: str, coarser: str = WHOLE) -> Measured:
        """Of the mass inside ``coarser``'s blocks, what lies inside ``finer``'s."""

        def share(left_out: LeftOut) -> float:
            return self._share(finer, coarser, left_out)

        return self._measured(("share", finer, coarser), share, finer, coarser)

    def expected(self, finer: str, coarser: str = WHOLE) -> float:
        """That share if there were no structure within ``coarser``'s blocks."""
        return self._share_at(1.0, finer, coarser, NOTHING)

    def excess(self, finer: str, coarser: str = WHOLE) -> Measured:
        """(share - expected) / (1 - expected)."""

        def excess(left_out: LeftOut) -> float:
            expected = self._share_at(1.0, finer, coarser, left_out)
            return _ratio(self._share(finer, coarser, left_out) - expected, 1 - expected)

        return self._measured(("excess", finer, coarser), excess, finer, coarser)

    def contrast(self, finer: str, coarser: str = WHOLE) -> float:
        """Odds of off-diagonal mass to lie in ``finer``'s blocks, over those without structure."""
        diagonal = self._share(ELEMENTS, coarser, NOTHING) if finer != ELEMENTS else 0.0

        def odds(share: float) -> float:
            return _odds(_ratio(share - diagonal, 1 - diagonal))

        share = self._share(finer, coarser, NOTHING)
        return _ratio(odds(share), odds(self.expected(finer, coarser)))

    def above(self, finer: str, coarser: str, contrast: float, diagonal: float) -> Measured:
        """By how much the share exceeds that of a given ``contrast``.

        That of "elements" is compared with the share ``diagonal``.
        """

        def above(left_out: LeftOut) -> float:
            level = diagonal
            if finer != ELEMENTS:
                level = self._share_at(contrast, finer, coarser, left_out)
            return self._share(finer, coarser, left_out) - level

        return self._measured(("above", finer, coarser, contrast, diagonal), above, finer, coarser)

    def lead(self, one: str, other: str, odds: float = 1.0) -> Measured:
        """By how much the share of ``one`` exceeds that at ``odds`` times the odds of ``other``'s.

        Both are taken at the same number of blocks, see :meth:`matched`.
        """
        one, other = self.matched(one, other)

        def lead(left_out: LeftOut) -> float:
            held = self._share(other, WHOLE, left_out)
            level = odds * held / (1 + (odds - 1) * held)
            return self._share(one, WHOLE, left_out) - level

        return self._measured(("lead", one, other, odds), lead, one, other)

    def coupling(self, cut: str) -> Measured:
        """The mean coupling of ``cut``'s blocks to their closest.

        See :mod:`hessian_tools.structure.pairs`.
        """
        return self._of_pairs(cut, Pairs.mean)

    def close_share(self, cut: str, contrast: float) -> Measured:
        """Of ``cut``'s blocks, by mass, those coupled to their closest above 1 / ``contrast``."""
        return self._of_pairs(cut, lambda pairs, kept: pairs.close_share(kept, contrast))

    def _of_pairs(
        self,
        cut: str,
        value: Callable[[Pairs, NDArray[np.bool_]], float],
    ) -> Measured:
        if cut not in self.pairs:
            return Measured(float("nan"), 0.0, float("inf"))
        pairs = self.pairs[cut]
        estimate = value(pairs, pairs.every)
        if self.exact:
            return Measured(estimate, 0.0, float("inf"))
        replicates = np.array([value(pairs, kept) for kept in pairs.all_but_one])
        if not np.isfinite([estimate, *replicates]).all():  # without one pair there is no mass
            return Measured(float("nan"), 0.0, float("inf"))
        variance, freedom = _jackknife(replicates, np.zeros(len(replicates), int))
        return Measured(estimate, float(np.sqrt(variance)), freedom)

    def matched(self, one: str, other: str) -> tuple[str, str]:
        """Both at the same number of blocks: of the one with more, neighbours go together."""
        few = min(self.num_blocks[one], self.num_blocks[other])

        def at_few(name: str) -> str:
            return name if self.num_blocks[name] == few else grouped(name, few)

        return at_few(one), at_few(other)

    def least_p(self, finer: str, coarser: str = WHOLE) -> float:
        """The least p-value that random cuts like ``finer`` could give: one in as many as exist."""
        return float(np.exp(-self.log_alternatives.get((finer, coarser), np.inf)))

    @cached_property
    def _column(self) -> dict[str, int]:
        """Cut -> its column in the tables of draws."""
        return {name: column for column, name in enumerate(self.num_blocks)}

    @cached_property
    def _known(self) -> dict[tuple[str | float, ...], Measured]:
        return {}

    def _share(self, finer: str, coarser: str, left_out: LeftOut) -> float:
        if finer in (coarser, WHOLE):
            return 1.0
        if finer == ELEMENTS:
            diagonal = self.pilots.diagonal_share(left_out.row_of(PILOTS))
            return _ratio(diagonal, self._share(coarser, WHOLE, left_out))
        base = self.base[finer]
        if base not in self.draws:
            return float("nan")
        masses = self.draws[base].total(left_out.row_of(base))
        return _ratio(masses[self._column[finer]], masses[self._column[coarser]])

    def _share_at(self, contrast: float, finer: str, coarser: str, left_out: LeftOut) -> float:
        """The share that ``finer`` would have at a given contrast; 1 is no structure."""
        if finer in (coarser, WHOLE):
            return 1.0
        pilot = left_out.row_of(PILOTS)
        alone = self.pilots.overlap(ELEMENTS, coarser, pilot)
        if finer == ELEMENTS:
            return alone
        diagonal = self._share(ELEMENTS, coarser, left_out)
        even = _ratio(self.pilots.overlap(finer, coarser, pilot) - alone, 1 - alone)
        beside = _ratio(contrast * even, 1 + (contrast - 1) * even)
        return diagonal + (1 - diagonal) * beside

    def _measured(
        self,
        key: tuple[str | float, ...],
        value: Callable[[LeftOut], float],
        finer: str,
        coarser: str,
    ) -> Measured:
        """``value`` of two cuts with its error, kept by ``key``: several tests may ask for it."""
        if key not in self._known:
            estimate = value(NOTHING)
            if self.exact:
                self._known[key] = Measured(estimate, 0.0, float("inf"))
            else:
                self._known[key] = self._jackknifed(estimate, value, finer, coarser)
        return self._known[key]

    def _jackknifed(
        self,
        estimate: float,
        value: Callable[[LeftOut], float],
        finer: str,
        coarser: str,
    ) -> Measured:
        """The error of ``estimate`` from those of the draws of both cuts and of the pilots."""
        bases = dict.fromkeys([self.base.get(finer, ""), self.base.get(coarser, "")])
        strata = {base: self.draws[base].strata for base in bases if base in self.draws}
        strata[PILOTS] = np.zeros(len(self.pilots.mass), int)
        parts = []  # (variance, degrees of freedom) of independent sources
        for source, of_rows in strata.items():
            replicates = [value(LeftOut(source, row)) for row in range(len(of_rows))]
            parts.append(_jackknife(np.array(replicates), of_rows))
        total = sum(variance for variance, _ in parts)
        spread = sum(variance**2 / freedom for variance, freedom in parts)
        # Degrees of freedom of a sum of variances: Satterthwaite 1946.
        freedom = float(total**2 / spread) if spread > 0 else float("inf")
        return Measured(estimate, float(np.sqrt(total)), freedom)


def _jackknife(replicates: Floats, strata: NDArray[np.int64]) -> tuple[float, int]:
    """Variance and degrees of freedom from replicates that each leave one row of a stratum out."""
    alike = [replicates[strata == stratum] for stratum in np.unique(strata)]
    variance = sum((len(group) - 1) * group.var() for group in alike)
    return variance, len(replicates) - len(alike)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else float("inf")
