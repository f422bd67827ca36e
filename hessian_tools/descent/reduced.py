"""The local quadratic along a few directions: the best rate for each, all together.

q(w) = g'w + w'A w / 2, along w = -sum_b eta_b d_b where d_b is a direction d within block b and
zero elsewhere, is q = -r'eta + eta'M eta / 2 with r_b = g'd_b and M_bc = d_b'A d_c. The best rates
are eta = M^-1 r, and q falls by r'M^-1 r / 2. All cross terms between blocks count.

M takes B products with A. They are never held: of each, only its inner products with the B
directions are kept.

**Solving.** Gradients of blocks differ by orders of magnitude, so M is scaled to a unit diagonal
before its eigenvalues are taken. Those within ``relative_floor`` times the largest of zero are
dropped; default 10 sqrt(B) eps of the operator's dtype, what independent rounding of M's entries
leaves. Blocks without gradient are left out. There is no best rate where M has a negative
eigenvalue (A is not positive semidefinite), and none where A vanishes along a direction in which g
does not; then the decrease is nan, with the reason.

Letters: B blocks, r rows (vectors) of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from hessian_tools.blocks.block import Cut
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem

Floats = NDArray[np.float64]
Tensors = Mapping[str, Tensor]  # by parameter name
LEFT = "(no block)"  # the entries in no block, which share a rate
_ROUNDINGS = 10.0


@dataclass(frozen=True, eq=False)
class Owners:
    """Which block every entry belongs to."""

    names: tuple[str, ...]  # (B,)
    numbers: dict[str, Tensor]  # of the blocks, of each parameter's shape

    def holds(self, name: str, part: slice) -> bool:
        """Whether tensor ``name`` has entries of the blocks in ``part``."""
        numbers = self.numbers[name]
        return bool(((numbers >= part.start) & (numbers < part.stop)).any())

    def spread(self, values: Floats) -> dict[str, Tensor]:
        """A value a block, for every entry; float64."""
        table = torch.from_numpy(values)
        return {name: table.to(n.device)[n.long()] for name, n in self.numbers.items()}


def owners_of(problem: Problem, cuts: Sequence[Cut]) -> Owners:
    """The blocks of ``cuts``, and last, if any entry is in none of them, :data:`LEFT`."""
    device = problem.device
    names = [name for cut in cuts for name in cut.names]
    numbers = {
        name: torch.full(p.shape, len(names), dtype=torch.int32, device=device)
        for name, p in problem.parameters.items()
    }
    first = 0
    for cut in cuts:
        mine = torch.arange(first, first + cut.num_blocks, device=device)[:, None]
        for part in cut.parts:
            part.place(mine.expand(-1, part.block_size), numbers[part.parameter])
        first += cut.num_blocks
    if any(bool((n == len(names)).any()) for n in numbers.values()):
        names.append(LEFT)
    return Owners(tuple(names), numbers)


def inner_products(a: Tensors, b: Tensors, owners: Owners) -> Floats:
    """(B,) a_b'b_b of the blocks."""
    total = torch.zeros(len(owners.names), dtype=torch.float64)
    for name, numbers in owners.numbers.items():
        products = (a[name].double() * b[name].double()).flatten().cpu()
        total.index_add_(0, numbers.flatten().cpu(), products)
    return total.numpy()


def reduced_matrix(
    operator: CurvatureOperator,
    direction: Tensors,
    owners: Owners,
    bar: tqdm,
) -> Floats:
    """(B, B) M_bc = d_b'A d_c, symmetrised; ``bar`` counts the products.

    Raises:
        NumericalError: for a product with NaN or inf, naming the block.
    """
    names = list(operator.problem.parameters)
    count = len(owners.names)
    matrix = torch.zeros(count, count, dtype=torch.float64, device=operator.device)

    def spread(part: slice) -> list[Tensor | None]:
        blocks = torch.arange(part.start, part.stop, device=operator.device)
        rows: list[Tensor | None] = []
        for name in names:
            if not owners.holds(name, part):
                rows.append(None)
                continue
            numbers = owners.numbers[name]
            is_mine = numbers == blocks.view(-1, *[1] * numbers.ndim)
            rows.append(direction[name].to(operator.dtype) * is_mine)
        return rows

    counted = 0  # rows told to the bar: each part comes once a micro-batch

    def collect(part: slice, products: Sequence[Tensor | None], weight: float) -> None:
        nonlocal counted
        bar.update(max(0, part.stop - counted))
        counted = max(counted, part.stop)
        for name, product in zip(names, products, strict=True):
            if product is None:
                continue
            terms = (product.double() * direction[name].double()).flatten(1)
            matrix[part].index_add_(1, owners.numbers[name].flatten(), terms, alpha=weight)

    operator.products(names, count, spread, collect)
    found = matrix.cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if bad.size:
        raise NumericalError(
            f"a product with the direction of block {owners.names[bad[0]]} is NaN or inf; check "
            "the loss and the dtype's range"
        )
    return (found + found.T) / 2


@dataclass(frozen=True, eq=False)
class Best:
    """The best rates along B directions."""

    decrease: float  # of q; nan where there is no best
    rates: Floats  # (B,), 0 for blocks without gradient; nan where there is no best
    why: str = ""  # there is no best


def best_rates(
    matrix: Floats,
    slopes: Floats,
    names: Sequence[str],
    relative_floor: float,
) -> Best:
    """eta = M^-1 r for M = ``matrix``, (B, B), and r = ``slopes``, (B,)."""
    diagonal = np.diag(matrix)
    used = (slopes != 0) | (diagonal != 0)
    rates = np.zeros(len(slopes))
    if not used.any():
        return Best(0.0, rates)
    numbers = np.flatnonzero(used)
    flattest = numbers[np.argmin(diagonal[numbers])]
    if diagonal[flattest] <= 0:
        return _none(len(slopes), f"d'A d is {diagonal[flattest]:.3g} within {names[flattest]}")
    scale = 1 / np.sqrt(diagonal[numbers])
    values, vectors = np.linalg.eigh(scale[:, None] * matrix[np.ix_(numbers, numbers)] * scale)
    floor = relative_floor * values[-1]
    if values[0] < -floor:
        lowest = values[0] / values[-1]
        why = f"not positive semidefinite: an eigenvalue {lowest:.2g} times the largest"
        return _none(len(slopes), why)
    kept = values > floor
    coordinates = vectors.T @ (scale * slopes[numbers])
    decrease = float((coordinates[kept] ** 2 / values[kept]).sum()) / 2
    # What the dropped would promise at the least: their eigenvalues are at most the floor.
    dropped = float((coordinates[~kept] ** 2).sum()) / (2 * floor) if floor else 0.0
    if dropped > decrease:
        return _none(len(slopes), "unbounded: A vanishes along a direction in which g does not")
    rates[numbers] = scale * (vectors[:, kept] @ (coordinates[kept] / values[kept]))
    return Best(decrease, rates)


def _none(count: int, why: str) -> Best:
    return Best(math.nan, np.full(count, math.nan), why)


def default_floor(count: int, dtype: torch.dtype) -> float:
    """10 sqrt(B) eps: what independent rounding of M's entries may leave of a zero eigenvalue."""
    return _ROUNDINGS * math.sqrt(count) * torch.finfo(dtype).eps


def nonnegative_rates(matrix: Floats, slopes: Floats, best: Best) -> Floats:
    """(B,) the rates of the largest decrease among those that are not negative."""
    if (best.rates >= 0).all():
        return best.rates
    used = np.flatnonzero(np.diag(matrix) > 0)
    scale = 1 / np.sqrt(np.diag(matrix)[used])
    scaled = scale[:, None] * matrix[np.ix_(used, used)] * scale
    target = scale * slopes[used]
    unit = np.abs(target).max()  # so that tolerances below are relative

    def fall(rates: Floats) -> tuple[float, Floats]:
        product = scaled @ rates
        value = rates @ product / 2 - target @ rates / unit
        return float(value), product - target / unit

    found = minimize(
        fall,
        np.clip(best.rates[used] / scale / unit, 0, None),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(used),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000},
    )
    rates = np.zeros(len(slopes))
    rates[used] = found.x * scale * unit
    return rates
