"""Measures :class:`hessian_tools.structure.mass.BlockMass` of one region: by probing, or from its
dense matrix.

Letters as there: n entries of the region, B blocks of a cut, S draws, K pilots, C cuts, r vectors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.symmetric import SymmetricOperator, unit_products
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.probes import draw_probes, keyed_stream
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE, Cutting, Nesting
from hessian_tools.structure.mass import BlockMass, Draws, Floats, Pilots

_EVEN = 0.1  # share of the draws that is made evenly
_MOST_VECTORS = 64  # in one product
_COPIES = 4  # of a vector, at a time: itself, its product, squares in float64
_TINY = torch.finfo(torch.float64).tiny  # for blocks without mass, which have no share in anything
_ROWS = 512  # of a dense matrix that are squared at a time


def measure(
    curvature: CurvatureOperator,
    region: Block,
    cuttings: Sequence[Cutting],
    *,
    num_probes: int,
    num_blocks: int,
    seed: int,
    exact: bool,
    on_products: Callable[[int], None],
) -> BlockMass:
    """Masses of ``cuttings`` of ``region``, and of groups of neighbouring blocks.

    Args:
        cuttings: "whole", "elements" and others, no two alike.
        num_probes, num_blocks: products with all of the region, and with single blocks of each of
            the finest cuts.
        exact: take the dense matrix instead.
        on_products: called with the number of products as they are spent.
    Raises:
        NumericalError: for a product with NaN or inf.
    """
    nesting = Nesting(cuttings)
    operator = curvature.block(region)
    room = curvature.krylov_bytes // (_COPIES * operator.size * 8)
    at_once = max(1, min(_MOST_VECTORS, room))
    products = _Products(operator, region.name, seed, at_once, on_products)
    if exact:
        evidence = _exact_evidence(products, nesting)
    else:
        evidence = _probed_evidence(products, nesting, num_probes, num_blocks)
    return BlockMass(
        region=region.name,
        size=operator.size,
        num_blocks={cut.name: cut.num_blocks for cut in nesting.with_groups},
        inside=nesting.inside,
        base=nesting.base_of,
        draws=evidence.draws,
        pilots=evidence.pilots,
        asymmetry=evidence.asymmetry,
        exact=exact,
        num_matvecs=evidence.num_products,
        unit=evidence.unit,
        log_alternatives=_all_log_alternatives(nesting, operator.size),
    )


def cost(cuttings: Sequence[Cutting], num_probes: int, num_blocks: int) -> int:
    """Products that :func:`measure` spends, at most, without ``exact``."""
    bases = Nesting(cuttings).bases
    return num_probes + sum(_num_draws(base.num_blocks, num_blocks) for base in bases)


def _num_draws(blocks: int, num_blocks: int) -> int:
    """Products with the blocks of a cut: all of them equally often, at least twice, where that is
    not more than ``num_blocks``."""
    if 2 * blocks > num_blocks:
        return num_blocks
    return blocks * max(2, num_blocks // blocks)


@dataclass(frozen=True)
class _Evidence:
    """What :class:`BlockMass` is made of."""

    draws: dict[str, Draws]  # by base
    pilots: Pilots
    asymmetry: float
    num_products: int
    unit: float  # what the products were divided by


@dataclass(frozen=True)
class _Products:
    """Products with the diagonal block of one region."""

    operator: SymmetricOperator
    name: str  # of the region
    seed: int
    at_once: int  # vectors in one product
    on_products: Callable[[int], None]

    def __call__(self, vectors: Tensor) -> Tensor:
        """(r, n) -> (r, n). Raises NumericalError where one is not finite."""
        return self.checked(self.operator.matmat(vectors))

    def checked(self, products: Tensor) -> Tensor:
        """``products`` (r, n), which are reported. Raises NumericalError as above."""
        if not bool(torch.isfinite(products).all()):
            raise NumericalError(
                f"a product with the Hessian of {self.name} is NaN or inf; "
                "check the loss and the dtype's range"
            )
        self.on_products(len(products))
        return products

    def signs(self, label: str, count: int, size: int) -> Tensor:
        """(count, size) random signs that belong to this region and ``label``."""
        key = f"{self.name}, {label}"
        dtype = self.operator.dtype
        return draw_probes("rademacher", self.seed, key, count, size, dtype=dtype)


def _probed_evidence(
    products: _Products, nesting: Nesting, num_probes: int, num_blocks: int
) -> _Evidence:
    pilots, asymmetry, column_masses, unit = _pilots(products, nesting, num_probes)
    draws: dict[str, Draws] = {}
    if pilots.mass.mean():
        for base in nesting.bases:
            sample = _sample(products, base, column_masses[base.name], num_blocks)
            draws[base.name] = _draws(products, nesting, base, sample, unit)
    spent = num_probes + sum(len(drawn.masses) for drawn in draws.values())
    return _Evidence(draws, pilots, asymmetry, spent, unit)


def _unit(products: Tensor) -> float:
    """A power of two near the largest |entry|; 1 where all are zero.

    Squares of float32 underflow below 1e-23 and overflow above 1e19: divided by the unit none does
    that matters beside the largest, and no digit changes.
    """
    ends = torch.aminmax(products)  # without a copy of a large tensor
    largest = max(-float(ends.min), float(ends.max))
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest else 1.0


def _pilots(
    products: _Products, nesting: Nesting, count: int
) -> tuple[Pilots, float, dict[str, Floats], float]:
    """Pilots, their asymmetry, by base the mean mass of each block's columns, (B,), and the unit of
    the products, in whose square all masses are."""
    operator = products.operator
    z = products.signs("pilots", count, operator.size)
    parts = z.split(products.at_once)
    y = torch.cat([products(part.to(operator.device)).cpu() for part in parts])
    unit = _unit(y)
    y.div_(unit)
    mass = np.array([float(row.double().square().sum()) for row in y])
    mean = mass.mean()
    asymmetry = _rms_asymmetry(z, y) / np.sqrt(mean) if mean else 0.0
    # Both in place: of a large tensor there is room for two such arrays.
    diagonal = _gram(z.mul_(y))
    squares = y.square_()
    sums = {cut.name: _sums(squares, cut) for cut in nesting.others}
    overlaps = {}
    for finer, coarser in nesting.pairs:
        finer_sums = squares if finer.name == ELEMENTS else sums[finer.name]
        if coarser.name == WHOLE:
            overlap = _gram(finer_sums) / (mean if mean else 1.0)
        else:
            coarser_means = sums[coarser.name].mean(0).clamp_min(_TINY)
            overlap = _gram(finer_sums, coarser_means.reciprocal()[_parents(finer, coarser)])
        overlaps[finer.name, coarser.name] = overlap
    column_masses = {base.name: sums[base.name].mean(0).numpy() for base in nesting.bases}
    return Pilots(mass, diagonal, overlaps), float(asymmetry), column_masses, unit


def _rms_asymmetry(vectors: Tensor, products: Tensor) -> float:
    """The rms over pairs i, j of z_i' y_j - z_j' y_i, which vanishes for a symmetric matrix."""
    crossed = np.array([[float((z.double() * y).sum()) for y in products] for z in vectors])
    pairs = len(vectors) * (len(vectors) - 1)
    squares = np.square(crossed - crossed.T)
    return float(np.sqrt(squares.sum() / max(1, pairs)))


@dataclass(frozen=True)
class _Sample:
    """Blocks of one cut, each to be probed once."""

    blocks: NDArray[np.int64]  # (S,)
    weights: Floats  # (S,) with which their masses add up to those of all blocks
    strata: NDArray[np.int64]  # (S,) rows of one stratum are alike


def _sample(products: _Products, base: Cutting, masses: Floats, num_blocks: int) -> _Sample:
    """All blocks of ``base`` equally often, or some drawn by ``masses`` (B,)."""
    total = base.num_blocks
    count = _num_draws(total, num_blocks)
    if 2 * total <= num_blocks:
        blocks = np.repeat(np.arange(total), count // total)
        return _Sample(blocks, np.full(count, total / count), blocks)
    has_mass = masses > 0
    chances = (1 - _EVEN) * masses / masses.sum() + _EVEN * has_mass / has_mass.sum()
    stream = np.random.Generator(keyed_stream(products.seed, products.name, base.name))
    blocks = stream.choice(total, count, p=chances / chances.sum())
    return _Sample(blocks, 1 / (count * chances[blocks]), np.zeros(count, int))


def _draws(
    products: _Products, nesting: Nesting, base: Cutting, sample: _Sample, unit: float
) -> Draws:
    """The masses of the blocks in ``sample`` within each cut around ``base``, over ``unit``^2."""
    around = {cut.name: cut for cut in nesting.around(base)}
    table = np.full((len(sample.blocks), len(nesting.with_groups)), np.nan)
    columns = [i for i, cut in enumerate(nesting.with_groups) if cut.name in around]
    for first in range(0, len(table), products.at_once):
        chosen = sample.blocks[first : first + products.at_once]
        entries = [torch.nonzero(base.labels == int(block)).flatten() for block in chosen]
        z = _signs_on_blocks(products, base, entries, first)
        y = products(z.to(products.operator.device)).cpu()
        for row, (product, inside) in enumerate(zip(y, entries, strict=True), start=first):
            squares = (product.double() / unit).square()
            masses = [_mass_around(squares, cut, inside[0]) for cut in around.values()]
            table[row, columns] = np.array(masses) * sample.weights[row]
    return Draws(table, sample.strata)


def _signs_on_blocks(
    products: _Products, base: Cutting, entries: Sequence[Tensor], first: int
) -> Tensor:
    """(r, n) vectors, each with random signs at the ``entries`` of one block, of the draws from
    number ``first`` on."""
    operator = products.operator
    z = torch.zeros(len(entries), operator.size, dtype=operator.dtype)
    for row, inside in enumerate(entries):
        label = f"{base.name}, draw {first + row}"
        z[row, inside] = products.signs(label, 1, len(inside))[0]
    return z


def _exact_evidence(products: _Products, nesting: Nesting) -> _Evidence:
    """The same from the dense matrix, without any error."""
    size = products.operator.size
    strips = unit_products(products.operator, rows=products.at_once)
    dense = torch.cat([products.checked(strip[0]) for _, strip in strips]).double().cpu()
    unit = _unit(dense)
    dense /= unit
    squares = ((dense + dense.T) / 2).square()
    norm = float(squares.sum())
    difference = float((dense - dense.T).norm())
    inside = {cut.name: _mass_inside(squares, cut) for cut in nesting.with_groups}
    masses = np.array([list(inside.values())])
    draws = Draws(masses, strata=np.zeros(1, int))
    pilots = Pilots(
        mass=np.array([norm]),
        diagonal=np.array([[inside.get(ELEMENTS, 0.0)]]),
        overlaps=_exact_overlaps(squares.sum(1), nesting),
    )
    return _Evidence(
        draws={base.name: draws for base in nesting.bases},
        pilots=pilots,
        asymmetry=difference / norm**0.5 if norm else 0.0,
        num_products=size,
        unit=unit,
    )


def _exact_overlaps(column_masses: Tensor, nesting: Nesting) -> dict[tuple[str, str], Floats]:
    """(finer, coarser) -> (1, 1) sum of m_d^2 / m_c, from the masses (n,) of single columns."""
    sums = {cut.name: _sums(column_masses[None], cut)[0] for cut in nesting.cuttings}
    overlaps = {}
    for finer, coarser in nesting.pairs:
        inner = sums[finer.name]
        around = sums[coarser.name][_parents(finer, coarser)].clamp_min(_TINY)
        overlap = float((inner * inner / around).sum())
        overlaps[finer.name, coarser.name] = np.array([[overlap]])
    return overlaps


def _sums(squares: Tensor, cut: Cutting) -> Tensor:
    """(r, n) -> (r, B) float64 sums by block."""
    if cut.name == WHOLE:
        return squares.double().sum(1, keepdim=True)
    if cut.name == ELEMENTS:
        return squares
    sums = [torch.bincount(cut.labels, row.double(), cut.num_blocks) for row in squares]
    return torch.stack(sums)


def _mass_around(squares: Tensor, cut: Cutting, entry: Tensor) -> float:
    """Sum of (n,) ``squares`` over the block of ``cut`` that holds ``entry``."""
    if cut.name == WHOLE:
        return float(squares.sum())
    return float(squares[cut.labels == cut.labels[entry]].sum())


def _mass_inside(squares: Tensor, cut: Cutting) -> float:
    """Mass inside the blocks of ``cut`` of a dense (n, n) matrix of squares."""
    if cut.name == WHOLE:
        return float(squares.sum())
    if cut.name == ELEMENTS:
        return float(squares.diagonal().sum())
    total = 0.0
    for rows, labels in zip(squares.split(_ROWS), cut.labels.split(_ROWS), strict=True):
        is_inside = labels[:, None] == cut.labels
        total += float((rows * is_inside).sum())
    return total


def _parents(finer: Cutting, coarser: Cutting) -> Tensor:
    """(B,) the block of ``coarser`` around each block of ``finer``."""
    if coarser.name == WHOLE:
        return torch.zeros(finer.num_blocks, dtype=torch.int64)
    if finer.name == ELEMENTS:
        return coarser.labels
    parents = torch.zeros(finer.num_blocks, dtype=torch.int64)
    return parents.scatter_(0, finer.labels, coarser.labels)


def _all_log_alternatives(nesting: Nesting, size: int) -> dict[tuple[str, str], float]:
    """By (finer, coarser): of nested cuts, and of groups of neighbours in the whole region."""
    whole = next(cut for cut in nesting.cuttings if cut.name == WHOLE)
    groups = nesting.with_groups[len(nesting.cuttings) :]
    pairs = [*nesting.pairs, *((group, whole) for group in groups)]
    return {(one.name, other.name): _log_alternatives(one, other, size) for one, other in pairs}


def _log_alternatives(finer: Cutting, coarser: Cutting, size: int) -> float:
    """The logarithm of how many cuts like ``finer`` there are of the blocks of ``coarser``.

    A block of n entries falls into blocks of sizes s in n! / prod s! ways, over the orders of those
    of one size. For single entries, which can be cut in one way, it is the ways to choose which n
    of the n (n + 1) / 2 numbers of a symmetric block are its diagonal.
    """
    around = np.array([size])
    if coarser.name != WHOLE:
        around = torch.bincount(coarser.labels).numpy()
    if finer.name == ELEMENTS:
        pairs = around * (around - 1) / 2
        ways = gammaln(pairs + around + 1) - gammaln(around + 1) - gammaln(pairs + 1)
        return float(ways.sum())
    sizes = torch.bincount(finer.labels).numpy()
    parents = _parents(finer, coarser).numpy()
    _, alike = np.unique(np.stack([parents, sizes]), axis=1, return_counts=True)
    orders = gammaln(sizes + 1).sum() + gammaln(alike + 1).sum()
    return float(gammaln(around + 1).sum() - orders)


def _gram(vectors: Tensor, weights: Tensor | None = None) -> Floats:
    """(K, n) -> (K, K) inner products, weighted by (n,) ``weights``, summed in float64."""
    gram = np.zeros((len(vectors), len(vectors)))
    for i, one in enumerate(vectors):
        wide = one.double() if weights is None else one * weights
        row = [float((wide * other).sum()) for other in vectors[i:]]
        gram[i, i:] = row
        gram[i:, i] = row
    return gram
