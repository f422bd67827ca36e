"""A dense Hessian made small enough to keep: log10 of magnitudes, for colours."""

import numpy as np

LEAST = -5.0  # relative to the largest; zeros and what is smaller


def heat_map(matrix: np.ndarray, pooled: int = 1) -> np.ndarray:
    """(rows / pooled, columns / pooled) float16: log10 of root mean squares of ``pooled`` x ``pooled`` entries over the
    largest, to an eighth of a decade."""
    rows, columns = (size // pooled for size in matrix.shape)
    sizes = np.sqrt(np.square(matrix).reshape(rows, pooled, columns, pooled).mean((1, 3)))
    return (np.round(8 * np.log10(np.maximum(sizes / sizes.max(), 10**LEAST))) / 8).astype(
        np.float16
    )
