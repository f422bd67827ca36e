"""Spectra of blocks held against each other: the distances of every reading, and how sure their means are.

The readings are defined in :mod:`hessian_tools.heterogeneity.js`. The jackknife leaves one probe of one block out, which
changes that block's row of a matrix of distances and, when the block held one of its ends, the grid; everything that
changes is computed again, nothing else. The probes of different blocks are independent, so the blocks are strata:
    SE^2 = sum_b (k_b - 1) / k_b sum_i (theta_bi - theta_b.)^2,   bias = sum_b (k_b - 1) (theta_b. - theta)
with theta_bi the mean over pairs without probe i of block b and theta_b. its mean over i (Jones 1974, "Jackknife
estimation of functions of stratum means"; the bias is Quenouille's, 1956). Blocks may have different numbers of probes,
and each term tells what its block contributes. An exact block contributes 0; a block of one probe leaves both unknown.

Shapes: B blocks, G grid points, k_b probes of block b.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.distance import pdist, squareform

from hessian_tools.spectra.density import (
    LINEAR_FRACTION,
    LOG_WIDTH,
    Axis,
    SpectralGrid,
    kernel_sum,
    spanning_grid,
    symlog_axis,
)
from hessian_tools.spectra.quadrature import Quadrature

READINGS = ("bounded", "unnormalised", "log", "wasserstein")
DEFAULTS: dict[str, float] = {  # the literature's grid and kernel in eigenvalue units; this package's log axis
    "num_points": 50_000, "variance": 1e-5, "margin": 1.0, "log_width": LOG_WIDTH, "linear_fraction": LINEAR_FRACTION,
}  # fmt: skip
_DEPTH = 60.0  # terms below exp(-60) of a density's largest are left out: below 1e-20 of any JS
_NEGLIGIBLE = 1e-25  # a probability that cannot change a JS in float64
_SLAB = 1 << 20  # numbers in one temporary
Matrices = dict[str, np.ndarray]  # by reading, each (B, B)


class Comparison:
    """All readings of B blocks, and what their means become when one block is another.

    Attributes: ``matrices`` (B, B) by reading, ``log10_rms`` (B,), ``means`` over pairs by reading, with "scale" the
    standard deviation of ``log10_rms``.
    """

    def __init__(
        self, blocks: Sequence[Quadrature], readings: Sequence[str], settings: Mapping[str, float]
    ) -> None:
        self.blocks, self.readings, self.settings = list(blocks), tuple(readings), dict(settings)
        self.width = {
            "literature": float(np.sqrt(settings["variance"])),
            "log": settings["log_width"],
        }
        self.axis = symlog_axis(self.blocks, settings["linear_fraction"])
        self.grids = self._grids(self.blocks, self.axis)
        self.rows = {
            kind: probabilities(grid, self.blocks, self.width[kind])
            for kind, grid in self.grids.items()
        }
        self.matrices = self._matrices()
        self.log10_rms = log10_rms(self.blocks)
        means = {
            name: float(m[np.triu_indices(len(m), 1)].mean()) for name, m in self.matrices.items()
        }
        self.means = means | {"scale": _spread(self.log10_rms)}

    def replacing(self, index: int, block: Quadrature) -> dict[str, float]:
        """``means`` with ``block`` in the place of block ``index``."""
        blocks = [*self.blocks[:index], block, *self.blocks[index + 1 :]]
        axis = symlog_axis(blocks, self.settings["linear_fraction"])
        if axis != self.axis or not self._grids_serve(blocks, axis):
            return Comparison(blocks, self.readings, self.settings).means
        others, found = np.arange(len(blocks)) != index, {}
        distances = {}
        for kind, grid in self.grids.items():
            row = probabilities(grid, [block], self.width[kind])[0]
            distances["bounded" if kind == "literature" else kind] = js_to(
                row, self.rows[kind][others]
            )
        if "unnormalised" in self.readings:
            distances["unnormalised"] = distances["bounded"] / self.grids["literature"].spacing
        if "wasserstein" in self.readings:
            rest = [b for b, other in zip(self.blocks, others, strict=True) if other]
            distances["wasserstein"] = np.array(
                [_wasserstein(block, other, axis) for other in rest]
            )
        pairs = len(blocks) * (len(blocks) - 1) / 2
        for name, matrix in self.matrices.items():
            change = distances[name] - matrix[index, others]
            found[name] = self.means[name] + float(change.sum()) / pairs
        scales = self.log10_rms.copy()
        scales[index] = log10_rms([block])[0]
        return found | {"scale": _spread(scales)}

    def _grids(self, blocks: Sequence[Quadrature], axis: Axis) -> dict[str, SpectralGrid]:
        grids, settings = {}, self.settings
        if "bounded" in self.readings or "unnormalised" in self.readings:
            grids["literature"] = literature_grid(
                blocks, int(settings["num_points"]), settings["margin"]
            )
        if "log" in self.readings:
            width = settings["log_width"]
            span = spanning_grid(
                blocks, axis, 2, 8 * width
            )  # 8 widths: 1e-15 of the mass is lost at most
            num_points = 2 + int(
                (span.high - span.low) / (width / 16)
            )  # 16 a width: the sum is the integral
            grids["log"] = SpectralGrid(axis, span.low, span.high, num_points)
        return grids

    def _grids_serve(self, blocks: Sequence[Quadrature], axis: Axis) -> bool:
        """Whether the grids are also those of ``blocks``; a log grid that reaches further does as well."""
        grids = self._grids(blocks, axis)
        new, old = grids.get("log"), self.grids.get("log")
        reaches = new is None or old is None or (old.low <= new.low and new.high <= old.high)
        return reaches and grids.get("literature") == self.grids.get("literature")

    def _matrices(self) -> Matrices:
        """In the order of ``readings``."""
        found = {
            "bounded" if kind == "literature" else kind: js_divergences(rows)
            for kind, rows in self.rows.items()
        }
        if "unnormalised" in self.readings:
            found["unnormalised"] = found["bounded"] / self.grids["literature"].spacing
        if "wasserstein" in self.readings:
            found["wasserstein"] = wasserstein_distances(self.blocks, self.axis)
        return {name: found[name] for name in self.readings}


def jackknife(comparison: Comparison) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each block adds to SE^2 and to the bias of ``comparison.means``, by reading and for "scale": (B,), (B,)."""
    means, size = comparison.means, len(comparison.blocks)
    found = {name: (np.zeros(size), np.zeros(size)) for name in means}
    for index, block in enumerate(comparison.blocks):
        if block.status == "exact":
            continue
        k = block.num_probes
        left_out = range(k if k > 1 else 0)
        replicates = [comparison.replacing(index, block.without_probe(i)) for i in left_out]
        for name, (variances, biases) in found.items():
            theta = np.array([means[name], *(replicate[name] for replicate in replicates)])[1:]
            variances[index] = (k - 1) * theta.var() if k > 1 else np.nan
            biases[index] = (k - 1) * (theta.mean() - means[name]) if k > 1 else np.nan
    return found


def log10_rms(blocks: Sequence[Quadrature]) -> np.ndarray:
    """(B,) log10 of the blocks' root mean square eigenvalues, -inf for a block that is exactly zero."""
    rms = np.array([block.rms.value for block in blocks])
    return np.log10(rms, out=np.full(len(rms), -np.inf), where=rms > 0)


def _spread(scales: np.ndarray) -> float:
    finite = scales[np.isfinite(scales)]
    return float(finite.std()) if len(finite) > 1 else float("nan")


def literature_grid(
    blocks: Sequence[Quadrature], num_points: int = 50_000, margin: float = 1.0
) -> SpectralGrid:
    """The literature's grid, one for all ``blocks`` (see the module's docstring)."""
    low = min(float(block.nodes.min(axis=1).mean()) for block in blocks) - margin
    high = max(float(block.nodes.max(axis=1).mean()) for block in blocks) + margin
    return SpectralGrid(Axis("linear"), low, high, num_points)


def probabilities(grid: SpectralGrid, blocks: Sequence[Quadrature], width: float) -> np.ndarray:
    """Smoothed spectra as probabilities of grid points, (B, G), rows sum to 1.

    Computed in log space: where dx is much larger than the kernel no grid point may lie within reach of any node, and
    plain arithmetic would find 0 / 0. The formula's exact value puts the mass on the grid points nearest to a node,
    and so does this.
    """
    rows = np.empty((len(blocks), grid.num_points))
    for row, block in enumerate(blocks):
        nodes, weights = block.pooled
        values, _ = kernel_sum(grid, grid.axis.position(nodes), weights, width, _DEPTH)
        rows[row] = values / values.sum()
    return rows


def js_divergences(rows: np.ndarray) -> np.ndarray:
    """JS divergence in nats of all pairs of the (B, G) probability ``rows``, (B, B)."""
    order = np.argsort(
        (rows > _NEGLIGIBLE).sum(axis=1), kind="stable"
    )  # the narrower of a pair is the one visited
    matrix = np.zeros((len(rows), len(rows)))
    for rank, i in enumerate(order[:-1]):
        matrix[i, order[rank + 1 :]] = js_to(rows[i], rows[order[rank + 1 :]])
    return matrix + matrix.T


def js_to(row: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """JS divergence in nats of ``row`` (G,) and each of ``rows`` (B, G), (B,).

    Only points where ``row`` has mass are visited; elsewhere the other contributes q ln(2) / 2.
    """
    held = row > _NEGLIGIBLE
    support = np.flatnonzero(held)
    p = row[support]
    p_entropy = p * np.log(p)
    found = np.log(2) / 2 * (rows @ (~held).astype(rows.dtype))
    for others in np.array_split(
        np.arange(len(rows)), max(1, -(-len(rows) * len(support) // _SLAB))
    ):
        q = rows[np.ix_(others, support)]
        total = p + q
        terms = p_entropy + q * np.log(np.where(q > 0, q, 1.0)) - total * np.log(total / 2)
        found[others] += terms.sum(axis=1) / 2
    return found


def wasserstein_distances(blocks: Sequence[Quadrature], axis: Axis) -> np.ndarray:
    """1-Wasserstein distances of all pairs, (B, B), in the axis' unit: exact integrals of |F_p - F_q|."""
    pooled = [block.pooled for block in blocks]
    positions = axis.position(np.concatenate([nodes for nodes, _ in pooled]))
    weights = np.concatenate([w for _, w in pooled])
    owners = np.repeat(np.arange(len(blocks)), [len(w) for _, w in pooled])
    order = np.argsort(positions, kind="stable")
    gaps = np.diff(positions[order])
    owners, weights = owners[order][:-1], weights[order][:-1]
    distances, reached = np.zeros(len(blocks) * (len(blocks) - 1) // 2), np.zeros((len(blocks), 1))
    columns = max(1, 8 * _SLAB // len(blocks))
    for part in np.split(np.arange(len(gaps)), range(columns, len(gaps), columns)):
        jumps = np.zeros((len(blocks), len(part)))
        jumps[owners[part], np.arange(len(part))] = weights[part]
        cumulative = reached + np.cumsum(jumps, axis=1)
        reached = cumulative[:, -1:]
        distances += pdist(cumulative * gaps[part], "cityblock")
    return squareform(distances)


def _wasserstein(left: Quadrature, right: Quadrature, axis: Axis) -> float:
    """One entry of :func:`wasserstein_distances`."""
    (nodes, weights), (others, minus) = left.pooled, right.pooled
    positions = axis.position(np.concatenate([nodes, others]))
    order = np.argsort(positions, kind="stable")
    reached = np.cumsum(np.concatenate([weights, -minus])[order])[:-1]
    return float(np.abs(reached) @ np.diff(positions[order]))
