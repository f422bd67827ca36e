"""The exact spectra of small blocks: their dense matrices, and all eigenvalues of these in float64.

Shapes: B blocks side by side, n size of each.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot

from hessian_tools.spectra.quadrature import Quadrature

_ROWS = 64  # unit vectors in one product, over all blocks


def dense_bytes(size: int) -> int:
    """What one dense block takes, in float64: itself, and once more on the host."""
    return 2 * 8 * size * size


def exact_quadratures(operator: Any, num_blocks: int, size: int) -> Iterator[Quadrature | str]:
    """All eigenvalues of each block from its dense matrix, or where its products first were not finite."""
    dense = torch.empty(num_blocks, size, size, dtype=torch.float64, device=operator.device)
    for columns in torch.arange(size, device=operator.device).split(max(1, _ROWS // num_blocks)):
        units = one_hot(columns, size).to(operator.dtype).repeat(num_blocks, 1)
        dense[:, columns] = operator.matmat(units).reshape(num_blocks, -1, size).double()
    weights, zeros = np.full((1, size), 1 / size), np.zeros((1, size))
    for matrix in dense.cpu().numpy():
        finite = np.isfinite(matrix).all(axis=1)
        if not finite.all():
            yield f"for unit vector {finite.argmin()} of {size}"
            continue
        norm = np.linalg.norm(matrix)
        asymmetry = float(np.linalg.norm(matrix - matrix.T) / norm) if norm > 0 else 0.0
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)[None]
        yield Quadrature(
            values, weights, zeros, np.array([size]), size, size, "exact", "none", "none", asymmetry
        )
