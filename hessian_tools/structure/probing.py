"""Measures :class:`hessian_tools.structure.mass.BlockMass` of one region: by probing, or from its
dense matrix.

Letters as there: n entries of the region, B blocks of a cut, S draws, K pilots, C cuts, r vectors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.symmetric import SymmetricOperator, unit_products
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.probes import draw_probes, keyed_stream
from hessian_tools.structure.cuttings import (
    ELEMENTS,
    WHOLE,
    Cutting,
    Nesting,
    all_log_alternatives,
    parents_of,
)
from hessian_tools.structure.mass import BlockMass, Draws, Floats, Pilots
from hessian_tools.structure.pairs import (
    Blocks,
    Candidate,
    Pairs,
    candidate,
    exact_pairs,
    pairs_of,
    product_of,
)

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
            the finest cuts; then as many with the closest of these blocks, for every cut.
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
        pairs=evidence.pairs,
        pilots=evidence.pilots,
        asymmetry=evidence.asymmetry,
        exact=exact,
        num_matvecs=evidence.num_products,
        unit=evidence.unit,
        log_alternatives=all_log_alternatives(nesting, operator.size),
    )


def cost(cuttings: Sequence[Cutting], num_probes: int, num_blocks: int) -> int:
    """Products that :func:`measure` spends, at most, without ``exact``."""
    nesting = Nesting(cuttings)
    drawn = {base.name: _num_draws(base.num_blocks, num_blocks) for base in nesting.bases}
    closest = (drawn[nesting.base_of[cut.name]] for cut in nesting.others)
    return num_probes + sum(drawn.values()) + sum(closest)


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
    pairs: dict[str, Pairs]  # by cut between the whole and single entries
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
    told = _pilots(products, nesting, num_probes)
    draws: dict[str, Draws] = {}
    pairs: dict[str, Pairs] = {}
    if told.pilots.mass.mean():
        for base in nesting.bases:
            sample = _sample(products, base, told.masses[base.name], num_blocks)
            draws[base.name], candidates = _draws(products, nesting, base, sample, told)
            for blocks in told.blocks_around(base):
                name = blocks.cut.name
                pairs[name] = _pairs(products, blocks, candidates[name], told)
    spent = num_probes + sum(len(drawn.masses) for drawn in draws.values())
    spent += sum(len(found.weights) for found in pairs.values())
    return _Evidence(draws, pairs, told.pilots, told.asymmetry, spent, told.unit)


def _unit(products: Tensor) -> float:
    """A power of two near the largest |entry|; 1 where all are zero.

    Squares of float32 underflow below 1e-23 and overflow above 1e19: divided by the unit none does
    that matters beside the largest, and no digit changes.
    """
    ends = torch.aminmax(products)  # without a copy of a large tensor
    largest = max(-float(ends.min), float(ends.max))
    return 2.0 ** (math.frexp(largest)[1] - 1) if largest else 1.0


@dataclass(frozen=True)
class _Told:
    """What products with all of a region tell, in units of ``unit`` (squares of ``unit``^2)."""

    nesting: Nesting
    pilots: Pilots
    asymmetry: float
    masses: dict[str, Floats]  # by cut: the mean mass of each block's columns, (B,)
    diagonal: Tensor  # (n,) estimates of the Hessian's
    unit: float

    def blocks_around(self, base: Cutting) -> list[Blocks]:
        """The cuts that products with blocks of ``base`` measure."""
        return [
            Blocks.of(cut, self.masses[cut.name])
            for cut in self.nesting.others
            if self.nesting.base_of[cut.name] == base.name
        ]


def _pilots(products: _Products, nesting: Nesting, count: int) -> _Told:
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
    of_entries = z.mul_(y)
    diagonal = of_entries.mean(0)
    squares = y.square_()
    sums = {cut.name: _sums(squares, cut) for cut in nesting.others}
    overlaps = {}
    for finer, coarser in nesting.pairs:
        finer_sums = squares if finer.name == ELEMENTS else sums[finer.name]
        if coarser.name == WHOLE:
            overlap = _gram(finer_sums) / (mean if mean else 1.0)
        else:
            coarser_means = sums[coarser.name].mean(0).clamp_min(_TINY)
            overlap = _gram(finer_sums, coarser_means.reciprocal()[parents_of(finer, coarser)])
        overlaps[finer.name, coarser.name] = overlap
    masses = {name: table.mean(0).numpy() for name, table in sums.items()}
    pilots = Pilots(mass, _gram(of_entries), overlaps)
    return _Told(nesting, pilots, float(asymmetry), masses, diagonal, unit)


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
    products: _Products, nesting: Nesting, base: Cutting, sample: _Sample, told: _Told
) -> tuple[Draws, dict[str, list[Candidate]]]:
    """The masses of the blocks in ``sample`` within each cut around ``base``, over ``unit``^2.

    Also, by cut that ``base`` measures, which block seems closest to that of each draw.
    """
    around = {cut.name: cut for cut in nesting.around(base)}
    table = np.full((len(sample.blocks), len(nesting.with_groups)), np.nan)
    columns = [i for i, cut in enumerate(nesting.with_groups) if cut.name in around]
    shares = sample.weights * told.masses[base.name][sample.blocks]
    known = told.blocks_around(base)
    candidates: dict[str, list[Candidate]] = {blocks.cut.name: [] for blocks in known}
    drawn = _products_with(products, base, sample.blocks, "draw")
    for row, (z, y, inside) in enumerate(drawn):
        product = y.double() / told.unit
        squares = product.square()
        masses = [_mass_around(squares, cut, inside[0]) for cut in around.values()]
        table[row, columns] = np.array(masses) * sample.weights[row]
        for blocks in known:
            found = product_of(z, product, inside, blocks, told.diagonal)
            candidates[blocks.cut.name].append(candidate(blocks, found, shares[row]))
    return Draws(table, sample.strata), candidates


def _pairs(products: _Products, blocks: Blocks, candidates: list[Candidate], told: _Told) -> Pairs:
    """The ``candidates``, each measured by a product with its closest block."""
    closest = np.array([found.closest for found in candidates])
    drawn = _products_with(products, blocks.cut, closest, "closest")
    found = [
        product_of(z, y.double() / told.unit, entries, blocks, told.diagonal)
        for z, y, entries in drawn
    ]
    return pairs_of(blocks, candidates, found)


def _products_with(
    products: _Products, cut: Cutting, numbers: NDArray[np.int64], label: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each block of ``cut`` in ``numbers``: signs z on it, (n,), H z, and its entries."""
    operator = products.operator
    for first in range(0, len(numbers), products.at_once):
        chosen = numbers[first : first + products.at_once]
        entries = [torch.nonzero(cut.labels == int(block)).flatten() for block in chosen]
        z = torch.zeros(len(chosen), operator.size, dtype=operator.dtype)
        for row, inside in enumerate(entries):
            key = f"{cut.name}, {label} {first + row}"
            z[row, inside] = products.signs(key, 1, len(inside))[0]
        y = products(z.to(operator.device)).cpu()
        yield from zip(z, y, entries, strict=True)


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
    column_masses = squares.sum(1)
    known = [Blocks.of(cut, _sums(column_masses[None], cut)[0].numpy()) for cut in nesting.others]
    masses = np.array([list(inside.values())])
    draws = Draws(masses, strata=np.zeros(1, int))
    pilots = Pilots(
        mass=np.array([norm]),
        diagonal=np.array([[inside.get(ELEMENTS, 0.0)]]),
        overlaps=_exact_overlaps(column_masses, nesting),
    )
    return _Evidence(
        draws={base.name: draws for base in nesting.bases},
        pairs={blocks.cut.name: exact_pairs(squares, blocks) for blocks in known},
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
        around = sums[coarser.name][parents_of(finer, coarser)].clamp_min(_TINY)
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


def _gram(vectors: Tensor, weights: Tensor | None = None) -> Floats:
    """(K, n) -> (K, K) inner products, weighted by (n,) ``weights``, summed in float64."""
    gram = np.zeros((len(vectors), len(vectors)))
    for i, one in enumerate(vectors):
        wide = one.double() if weights is None else one * weights
        row = [float((wide * other).sum()) for other in vectors[i:]]
        gram[i, i:] = row
        gram[i:, i] = row
    return gram
