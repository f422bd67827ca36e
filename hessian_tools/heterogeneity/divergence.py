"""Jensen-Shannon divergences of smoothed spectra.

The JS *divergence* in nats,
    JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2,  m = (p + q) / 2,  0 <= JS <= ln 2        (Lin 1991)
not its square root: the literature calls it a distance, this package takes the divergence, whose
bound is ln 2.

Shapes: B blocks, G grid points.
"""

from collections.abc import Sequence

import numpy as np

from hessian_tools.spectra.density import SpectralGrid, kernel_sum
from hessian_tools.spectra.quadrature import Floats, Quadrature

_DEPTH = 60.0  # terms below exp(-60) of a density's largest are left out: below 1e-20 of any JS
_NEGLIGIBLE = 1e-25  # a probability that cannot change a JS in float64
_SLAB = 1 << 20  # numbers in one temporary


def probabilities(grid: SpectralGrid, blocks: Sequence[Quadrature], width: float) -> Floats:
    """Smoothed spectra as probabilities of grid points, (B, G); every row sums to 1.

    Computed in log space: where dx is much larger than the kernel, no grid point may lie within
    reach of any node, and plain arithmetic would find 0 / 0. The formula's exact value puts the
    mass on the grid points nearest to a node, and so does this.
    """
    rows = np.empty((len(blocks), grid.num_points))
    for row, block in enumerate(blocks):
        nodes, weights = block.pooled
        values, _ = kernel_sum(grid, grid.axis.position(nodes), weights, width, _DEPTH)
        rows[row] = values / values.sum()
    return rows


def js_divergences(rows: Floats) -> Floats:
    """JS divergence in nats of all pairs of the (B, G) probability ``rows``, (B, B)."""
    # js_to visits the points where its first argument has mass: of each pair, the narrower one.
    order = np.argsort((rows > _NEGLIGIBLE).sum(axis=1), kind="stable")
    matrix = np.zeros((len(rows), len(rows)))
    for rank, narrow in enumerate(order[:-1]):
        wider = order[rank + 1 :]
        matrix[narrow, wider] = js_to(rows[narrow], rows[wider])
    return matrix + matrix.T


def js_to(row: Floats, rows: Floats) -> Floats:
    """JS divergence in nats of ``row`` (G,) and each of ``rows`` (B, G), (B,).

    Only points where ``row`` has mass are visited; elsewhere the other contributes q ln(2) / 2.
    """
    has_mass = row > _NEGLIGIBLE
    support = np.flatnonzero(has_mass)
    p = row[support]
    p_log_p = p * np.log(p)
    divergences = np.log(2) / 2 * (rows @ (~has_mass).astype(rows.dtype))
    num_slabs = max(1, -(-len(rows) * len(support) // _SLAB))
    for slab in np.array_split(np.arange(len(rows)), num_slabs):
        q = rows[np.ix_(slab, support)]
        total = p + q
        q_log_q = q * np.log(np.where(q > 0, q, 1.0))
        terms = p_log_p + q_log_q - total * np.log(total / 2)
        divergences[slab] += terms.sum(axis=1) / 2
    return divergences
