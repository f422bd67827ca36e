"""Arithmetic between batches of row vectors, in place and in pieces that stay in a CPU's cache.

Each function reads its vectors once. Nothing here looks at a value, so a device never waits.

Shapes: k rows, n entries of each, j basis vectors a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_DEVICE_COLUMNS = 1 << 22  # taken at a time on a device: no copy of the whole batch is made
_CPU_ENTRIES = 1 << 18  # of a batch that stay in a CPU's cache from one operation to the next
_CPU_COLUMNS = 1 << 14  # at least so many, else the calls cost more than the arithmetic


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Dot products of the rows of two (k, n) batches, (k,) float64.

    The products keep the vectors' dtype, where their roundings average out; the sums are float64.
    """
    parts = [(left[:, c] * right[:, c]).sum(1, dtype=torch.float64) for c in _pieces(left)]
    return torch.stack(parts).sum(0)


def subtract(vectors: Tensor, factors: Tensor, directions: Tensor) -> None:
    """``vectors`` - ``factors`` * ``directions``, row by row, in place; (k, n), (k,), (k, n)."""
    vectors.addcmul_(factors.to(vectors.dtype)[:, None], directions, value=-1)


def project_out(vectors: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """One classical Gram-Schmidt pass over ``vectors``, (k, n), in place.

    Args:
        basis: pieces (k, j, n) of orthonormal vectors, each row's own.
    Returns:
        (k,) float64, the square of the norm of what was taken from each row.
    """
    taken = vectors.new_zeros(len(vectors), dtype=torch.float64)
    pieces = _pieces(vectors)
    for vectors_before in basis:
        coefficients = _coefficients(vectors, vectors_before, pieces)
        taken += coefficients.square().sum((1, 2))
        coefficients = coefficients.to(vectors.dtype)
        for columns in pieces:
            vectors[:, columns] -= torch.bmm(coefficients, vectors_before[..., columns])[:, 0]
    return taken


def _coefficients(vectors: Tensor, basis: Tensor, pieces: list[slice]) -> Tensor:
    """Dot products of each row with its j basis vectors, (k, 1, j) float64."""
    parts = []
    for columns in pieces:
        row = vectors[:, None, columns]  # a row times a matrix is the fast way round
        parts.append(torch.bmm(row, basis[..., columns].transpose(1, 2)))
    return torch.stack(parts).sum(0, dtype=torch.float64)


def _pieces(vectors: Tensor) -> list[slice]:
    """The columns of (k, n) ``vectors`` in runs that are worked on at a time."""
    rows, columns = vectors.shape
    size = _DEVICE_COLUMNS
    if vectors.device.type == "cpu":
        size = max(_CPU_ENTRIES // rows, _CPU_COLUMNS)
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]
