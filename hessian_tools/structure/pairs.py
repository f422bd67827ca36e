"""Are the blocks of a cut coupled to another one nearly as strongly as within themselves?

The *coupling* of two blocks b and c is rho_bc = M_bc / sqrt(M_bb M_cc), where M_bc is the mean
square of the entries of H_bc (of H_bb those off the diagonal). Scales of blocks cancel in it: it is
1 where b and c together are one dense block, whatever their scales, and 1 / contrast where a
contrast is planted. The *closest* of b is the c with the largest rho_bc, wherever it stands: no
order of the blocks plays a part, so groups along a permuted axis are seen like neighbours. Of a
group of blocks the mean coupling is at most that of its closest pair: pairs stand for groups.

Blocks are *closely coupled* if both of two statements hold, neither of which is safe alone:

- their mean coupling to the closest exceeds 1 / contrast (numerator and denominator summed apart, a
  pair weighted by the mass of the block and divided by the scales of both), which a few entries of
  heavy tails can bring about;
- more than half of the blocks, by mass, have a coupling above it, which noise of the denominators
  can feign.

By probing: a product with signs on block b tells M_cb for all c at once and so which c seems
closest (the mass of y_c over that of the columns of c, the largest). That choice is biased towards
what chance made large, so the pair is measured by another product, with fresh signs on c: y_b there
tells M_bc without bias, H being symmetric, and y_c tells M_cc. The error is that of a delete-one
jackknife over pairs.

Letters: n entries of the region, B blocks of a cut, P pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.structure.cuttings import Cutting

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Blocks with their closest, of one cut; mean squares, divided by the scales of both blocks."""

    between: Floats  # (P,) of the entries between the two
    within: Floats  # (P,) geometric means of those within each
    weights: Floats  # (P,) the share of all blocks' mass that each pair stands for

    def mean(self, kept: NDArray[np.bool_]) -> float:
        """The mean coupling of the pairs ``kept``; nan where all is zero."""
        weights = self.weights[kept]
        within = float(weights @ self.within[kept])
        between = float(weights @ self.between[kept])
        if within > 0:
            return between / within
        return float("inf") if between > 0 else float("nan")

    def close_share(self, kept: NDArray[np.bool_], contrast: float) -> float:
        """Of the pairs ``kept``, by mass, those with a coupling above 1 / ``contrast``."""
        is_close = contrast * self.between[kept] > self.within[kept]
        weights = self.weights[kept]
        total = weights.sum()
        return float(weights[is_close].sum() / total) if total > 0 else float("nan")

    @property
    def every(self) -> NDArray[np.bool_]:
        """(P,) all pairs."""
        return np.ones(len(self.weights), bool)

    @property
    def all_but_one(self) -> NDArray[np.bool_]:
        """(P, P) the pairs without each in turn."""
        return ~np.eye(len(self.weights), dtype=bool)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a cut, and the mass of a column of each."""

    cut: Cutting
    sizes: Floats  # (B,) entries of each block
    column_masses: Floats  # (B,) mean over the columns of a block; 0 where it has no mass

    @classmethod
    def of(cls, cut: Cutting, masses: Floats) -> "Blocks":
        """From the ``masses`` (B,) of all columns of each block together."""
        sizes = torch.bincount(cut.labels, minlength=cut.num_blocks).double().numpy()
        return cls(cut, sizes, masses / sizes)

    def sums(self, squares: Tensor) -> Floats:
        """(n,) -> (B,)."""
        return torch.bincount(self.cut.labels, squares, self.cut.num_blocks).numpy()

    def block_of(self, entry: Tensor) -> int:
        return int(self.cut.labels[entry])

    def closest(self, sums: Floats, block: int) -> int:
        """The block that seems closest to ``block``, by the masses (B,) of a product with it."""
        scales = self.column_masses * self.sizes
        score = np.divide(sums, scales, out=np.zeros_like(sums), where=scales > 0)
        score[block] = -1.0
        return int(score.argmax())

    def within(self, product: "Product", block: int) -> float:
        """The mean square off the diagonal within ``block``, from a product with columns of it."""
        off_diagonal = product.sums[block] - product.diagonal
        count = len(product.entries) * (self.sizes[block] - 1)
        return float(off_diagonal / count) if count else 0.0

    def between(self, product: "Product", block: int) -> float:
        """The mean square between ``block`` and another one, from a product with that other."""
        return float(product.sums[block] / (len(product.entries) * self.sizes[block]))

    def scales(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> Floats:
        """(P,) by which pairs of blocks are divided; blocks without mass weigh nothing."""
        products = self.column_masses[one] * self.column_masses[other]
        return np.where(products > 0, products, np.inf)


@dataclass(frozen=True, eq=False)
class Product:
    """What a product y with random signs z at some entries of one block says of a cut's blocks."""

    entries: Tensor  # those with signs
    sums: Floats  # (B,) of y^2 by block
    diagonal: float  # of the sum of H_ii^2 over ``entries``, an estimate without bias


def product_of(z: Tensor, y: Tensor, entries: Tensor, blocks: Blocks, diagonal: Tensor) -> Product:
    """Of (n,) signs z and y = H z, with ``diagonal`` (n,) from other products than this one."""
    told = z[entries].double() * y[entries].double()
    squares = y.double().square()
    return Product(entries, blocks.sums(squares), float((told * diagonal[entries].double()).sum()))


@dataclass(frozen=True, eq=False)
class Candidate:
    """A block with what seems its closest, to be measured by a product with the latter."""

    block: int
    closest: int
    weight: float  # the share of all blocks' mass that it stands for
    within: float  # of ``block``


def candidate(blocks: Blocks, product: Product, weight: float) -> Candidate:
    """From a ``product`` with entries of one block, which stands for ``weight`` of the mass."""
    block = blocks.block_of(product.entries[0])
    closest = blocks.closest(product.sums, block)
    return Candidate(block, closest, weight, blocks.within(product, block))


def pairs_of(blocks: Blocks, candidates: list[Candidate], products: list[Product]) -> Pairs:
    """The pairs ``candidates``, from a product with the closest of each."""
    measured = list(zip(candidates, products, strict=True))
    between = [blocks.between(product, pair.block) for pair, product in measured]
    # An estimate may fall below 0, what it estimates may not.
    squares = [
        max(0.0, pair.within) * max(0.0, blocks.within(product, pair.closest))
        for pair, product in measured
    ]
    chosen = np.array([(pair.block, pair.closest) for pair in candidates])
    scales = blocks.scales(*chosen.T)
    weights = np.array([pair.weight for pair in candidates])
    return Pairs(np.array(between) / scales, np.sqrt(squares) / scales, weights)


def exact_pairs(squares: Tensor, blocks: Blocks) -> Pairs:
    """From the squares (n, n) of a dense matrix."""
    off_diagonal = squares - torch.diag(squares.diagonal())
    by_column = np.stack([blocks.sums(row) for row in off_diagonal])
    labels = blocks.cut.labels.numpy()
    sums = np.zeros((blocks.cut.num_blocks, blocks.cut.num_blocks))
    np.add.at(sums, labels, by_column)
    sizes = blocks.sizes
    mean_squares = sums / (np.outer(sizes, sizes) - np.diag(sizes)).clip(1)
    inside = mean_squares.diagonal()
    within = np.sqrt(np.outer(inside, inside))
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = np.nan_to_num(mean_squares / within, nan=0.0, posinf=np.inf)
    np.fill_diagonal(rho, -1.0)
    every = np.arange(len(sizes))
    closest = rho.argmax(1)
    scales = blocks.scales(every, closest)
    return Pairs(
        between=mean_squares[every, closest] / scales,
        within=within[every, closest] / scales,
        weights=blocks.column_masses * sizes,
    )
