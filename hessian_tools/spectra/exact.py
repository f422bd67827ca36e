"""Exact spectra of small blocks: all eigenvalues of their dense matrices, in float64.

Shapes: B blocks side by side, n size of each.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hessian_tools.curvature.symmetric import SymmetricOperator, unit_products
from hessian_tools.errors import NumericalError, nonfinite_product
from hessian_tools.spectra.quadrature import Floats, Quadrature

_ROWS = 64  # unit vectors in one product, over all blocks


def dense_bytes(size: int) -> int:
    """What a dense block of ``size`` takes in float64, with a copy on the host."""
    return 2 * 8 * size * size


def exact_quadratures(
    operator: SymmetricOperator,
    names: Sequence[str],
    size: int,
) -> Iterator[Quadrature | NumericalError]:
    """All eigenvalues of each block, or the error that names where its products were not finite.

    ``operator`` holds the blocks ``names`` side by side: its rows come in equal runs, one a block.
    """
    for name, matrix in zip(names, _dense(operator, len(names), size).cpu().numpy(), strict=True):
        finite = np.isfinite(matrix).all(axis=1)
        if finite.all():
            yield _spectrum(matrix)
        else:
            yield nonfinite_product(name, f"for unit vector {finite.argmin()} of {size}")


def _dense(operator: SymmetricOperator, num_blocks: int, size: int) -> Tensor:
    """(B, n, n) float64, row j of each the product with unit vector j."""
    shape = (num_blocks, size, size)
    dense = torch.empty(shape, dtype=torch.float64, device=operator.device)
    for numbers, products in unit_products(operator, num_blocks=num_blocks, rows=_ROWS):
        dense[:, numbers] = products.double()
    return dense


def _spectrum(matrix: Floats) -> Quadrature:
    """The eigenvalues of (A + A') / 2, and how far A is from symmetric."""
    size = len(matrix)
    largest = np.abs(matrix).max() or 1.0  # squares of tiny or huge entries leave float64's range
    norm = np.linalg.norm(matrix / largest)
    apart = np.linalg.norm((matrix - matrix.T) / largest)
    asymmetry = float(apart / norm) if norm > 0 else 0.0
    eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2).astype(np.float64)
    return Quadrature(
        nodes=eigenvalues[None],
        weights=np.full((1, size), 1 / size),
        residuals=np.zeros((1, size)),
        steps=np.array([size]),
        size=size,
        num_matvecs=size,
        status="exact",
        probes="none",
        reorthogonalize="none",
        asymmetry=asymmetry,
    )
