"""Arithmetic between batches of row vectors, in place and in pieces that stay in a CPU's cache.

Each function reads its vectors once. Nothing here looks at a value, so a device never waits.

Shapes: k rows, n entries of each, j basis vectors a row.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RUN = 1 << 12  # entries that are summed in the vectors' dtype
_TURNED = 1 << 18  # columns of a whole basis, taken at a time
_DEVICE_COLUMNS = 1 << 22  # taken at a time on a device: no copy of the whole batch is made
_CPU_ENTRIES = 1 << 18  # of a batch that stay in a CPU's cache from one operation to the next
_CPU_COLUMNS = 1 << 14  # at least so many, else the calls cost more than the arithmetic


def units(vectors: Tensor) -> Tensor:
    """(k,) float64 powers of two near the largest entry of each row of (k, n) ``vectors``.

    A row divided by its unit has entries of about 1 at most, and the same digits. Rows that are
    zero or not finite have the unit 1.
    """
    pieces = vectors.split(_width(vectors), dim=1)
    largest = torch.stack([piece.abs().amax(1) for piece in pieces]).amax(0).double()
    _, exponents = torch.frexp(largest)
    # both the unit and its inverse have to be numbers of the vectors' dtype
    most = int(math.log2(torch.finfo(vectors.dtype).max)) - 1
    powers = torch.ldexp(torch.ones_like(largest), exponents.clamp(-most, most))
    return torch.where(torch.isfinite(largest) & (largest > 0), powers, 1.0)


def divided(vectors: Tensor, by: Tensor, out: Tensor | None = None) -> Tensor:
    """(k, n) ``vectors`` over the powers of two ``by`` (k,), which changes no digit."""
    factors = by.reciprocal().to(vectors.dtype)[:, None]
    return torch.mul(vectors, factors, out=out)


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot products of the rows of two (k, n) batches, (k,) float64.

    The products keep the vectors' dtype, where their roundings average out; the sums are float64.
    The products of float32 underflow where both factors are below 1e-19 and overflow above 1e19:
    rows have to come in their own :func:`units`.
    """
    width = _width(left)
    pieces = zip(left.split(width, dim=1), right.split(width, dim=1), strict=True)
    sums = [(a * b).sum(1, dtype=torch.float64) for a, b in pieces]
    return torch.stack(sums).sum(0)


def subtract(vectors: Tensor, factors: Tensor, directions: Tensor) -> None:
    """``vectors`` - ``factors`` * ``directions``, row by row, in place; (k, n), (k,), (k, n)."""
    vectors.addcmul_(factors.to(vectors.dtype)[:, None], directions, value=-1)


def project_out(vectors: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """One classical Gram-Schmidt pass over ``vectors``, (k, n), in place.

    Args:
        basis: tensors (k, j, n) of orthonormal vectors, each row's own.
    Returns:
        (k,) float64, the square of the norm of what was taken from each row.
    """
    width = _width(vectors)
    taken = vectors.new_zeros(len(vectors), dtype=torch.float64)
    for earlier in basis:
        pieces = list(zip(vectors.split(width, dim=1), earlier.split(width, dim=2), strict=True))
        # a row times a matrix is the fast way round, (k, 1, j)
        products = [torch.bmm(v[:, None], q.transpose(1, 2)) for v, q in pieces]
        coefficients = torch.stack(products).sum(0, dtype=torch.float64)
        taken += coefficients.square().sum((1, 2))
        coefficients = coefficients.to(vectors.dtype)
        for v, q in pieces:
            v.sub_(torch.bmm(coefficients, q)[:, 0])
    return taken


def dot_table(left: Tensor, right: Tensor) -> Tensor:
    """(r, m) float64 dot products of all rows of (r, n) ``left`` and (m, n) ``right``.

    Runs of entries are summed in the vectors' dtype, and the runs in float64: a float32 sum of a
    million terms of one sign is wrong by 100 roundings.
    """
    whole = left.shape[1] // _RUN * _RUN
    table = (left[:, whole:] @ right[:, whole:].T).double()
    pairs = zip(left[:, :whole].split(_TURNED, 1), right[:, :whole].split(_TURNED, 1), strict=True)
    for a, b in pairs:
        if a.shape[1]:
            runs_of_a = a.unflatten(1, (-1, _RUN)).transpose(0, 1)
            runs_of_b = b.unflatten(1, (-1, _RUN)).permute(1, 2, 0)
            table += torch.bmm(runs_of_a, runs_of_b).sum(0, dtype=torch.float64)
    return table


def turn_rows(rows: Tensor, turn: NDArray[np.float64]) -> None:
    """Writes ``turn``' (j, m) times ``rows`` (m, n) over the first j rows, in place."""
    factors = torch.from_numpy(turn.T.copy()).to(rows)
    for piece in rows.split(_TURNED, dim=1):
        piece[: len(factors)] = factors @ piece


def straighten(rows: Tensor) -> None:
    """Makes (m, n) ``rows`` that are orthonormal but for rounding so once more, in place.

    By one Newton step for the polar factor, X - (X X' - 1) X / 2; without it the roundings of many
    restarts add up.
    """
    gram = dot_table(rows, rows).cpu().numpy()
    turn_rows(rows, 1.5 * np.eye(len(rows)) - 0.5 * gram)


def _width(vectors: Tensor) -> int:
    """How many columns of (k, n) ``vectors`` are worked on at a time."""
    if vectors.device.type == "cpu":
        return max(_CPU_ENTRIES // len(vectors), _CPU_COLUMNS)
    return _DEVICE_COLUMNS
