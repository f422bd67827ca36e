"""A dense Hessian made small enough to keep: log10 of magnitudes, for colours."""

import numpy as np

LEAST = -5.0  # relative to the largest; zeros and what is smaller


def heat_map(matrix: np.ndarray, pooled: int = 1) -> np.ndarray:
    """(rows / pooled, columns / pooled) float16: log10 of magnitudes relative to the largest.

    A magnitude is the root mean square of ``pooled`` x ``pooled`` entries. Values are rounded to an
    eighth of a decade, so that they compress well.
    """
    rows = matrix.shape[0] // pooled
    columns = matrix.shape[1] // pooled
    tiles = np.square(matrix).reshape(rows, pooled, columns, pooled)
    sizes = np.sqrt(tiles.mean((1, 3)))
    decades = np.log10(np.maximum(sizes / sizes.max(), 10**LEAST))
    return (np.round(8 * decades) / 8).astype(np.float16)
