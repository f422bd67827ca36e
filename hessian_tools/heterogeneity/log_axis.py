"""Readings over the symlog axis of :mod:`hessian_tools.spectra.density`, in decades.

"log" is the JS divergence of densities smoothed on that axis. "wasserstein" is the 1-Wasserstein
distance on it, from nodes and weights, without a kernel. Neither changes when the loss is
multiplied by a constant.

The axis, one for all blocks compared, knows what the spectra resolve: it is linear below the size
at which a Ritz value's residual bound exceeds it
(:func:`hessian_tools.spectra.density.unresolved_below`), and eigenvalues smaller than that count as
small and no more. More Lanczos steps make it reach further down, so readings are compared only at
like ``linthresh``.

Both are estimates from probes. What these make too high on average, to second order, is taken off:
for "wasserstein" as in :mod:`hessian_tools.heterogeneity.transport`; for "log", with p and q the
densities of two blocks and f the integrand of the divergence, it is (f_pp Var p + f_qq Var q) / 2,
where f_pp = q / (2 p (p + q)).

Shapes: B blocks, G grid points.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from hessian_tools.heterogeneity.divergence import js_divergences
from hessian_tools.heterogeneity.estimate import Sample, probe_variance
from hessian_tools.heterogeneity.measure import Densities, GridSettings, Sampled, Workspace
from hessian_tools.heterogeneity.transport import transport
from hessian_tools.spectra.density import KERNEL_REACH, SpectralGrid, kernel_sum, spanning_grid
from hessian_tools.spectra.quadrature import Floats, Quadrature

_MARGIN = 8  # kernel widths beyond the extreme nodes: 1e-15 of the mass is lost at most
_POINTS_A_WIDTH = 16  # the sum over grid points is then the integral, to rounding
_NEGLIGIBLE = 1e-25  # a probability that cannot change a JS in float64


class LogDensities(Densities):
    """A grid over the symlog axis, fine enough that the sum over its points is the integral."""

    def grid_for(self, workspace: Workspace) -> SpectralGrid:
        axis = workspace.axis
        width = self.width_for(workspace.settings)
        ends = spanning_grid(workspace.blocks, axis, 2, _MARGIN * width)
        num_points = 2 + int((ends.high - ends.low) / (width / _POINTS_A_WIDTH))
        return SpectralGrid(axis, ends.low, ends.high, num_points)

    def width_for(self, settings: GridSettings) -> float:
        return settings.log_width

    def variances(self) -> Floats:
        """(B, G) of the rows, from the law of the probes."""
        # the square of a Gaussian is one of 1 / sqrt(2) of its width
        square = (self.grid.spacing / (self.width * np.sqrt(2 * np.pi))) ** 2
        found = np.zeros_like(self.rows)
        for index, block in enumerate(self.blocks):
            if block.status == "exact":
                continue
            nodes, weights = block.pooled
            positions = self.grid.axis.position(nodes)
            sums, _ = kernel_sum(self.grid, positions, weights, self.width / np.sqrt(2))
            pieces = block.num_probes * (block.size / 2 + 1)
            found[index] = np.maximum(square * sums - self.rows[index] ** 2, 0.0) / pieces
        return found

    def means(self, values: Floats, block: Quadrature) -> Floats:
        """What the kernel at each pooled node of ``block`` averages of (G,) ``values``."""
        smooth = gaussian_filter1d(
            values, self.width / self.grid.spacing, mode="nearest", truncate=KERNEL_REACH
        )
        return np.interp(self.grid.axis.position(block.pooled[0]), self.grid.points, smooth)


@dataclass(frozen=True)
class Log(Sampled):
    """JS of densities with a kernel of constant width in decades."""

    name: str = "log"
    label: str = "JS log"
    title: str = "JS divergence on a log axis"
    unit: str = "nats"
    description: str = (
        "JS divergence of densities over a symmetric-log eigenvalue axis, at most ln 2"
    )
    scale_free: bool = True
    least: float = 0.05

    def sample(self, workspace: Workspace) -> Sample:
        densities = LogDensities(workspace)
        blocks = workspace.blocks
        matrix = js_divergences(densities.rows) - _excess(densities)
        np.fill_diagonal(matrix, 0.0)
        slopes = _slopes(densities.rows)

        def average(index: int, block: Quadrature) -> tuple[Floats, float]:
            values = densities.means(slopes[index], block)
            return values, float(block.pooled[1] @ values)

        def effect(index: int, quadrature: Quadrature) -> float:
            return average(index, quadrature)[1] - average(index, blocks[index])[1]

        terms = []
        for index, block in enumerate(blocks):
            values, mean = average(index, block)
            terms.append(probe_variance(block, values - mean))
        return Sample(
            values=matrix,
            mean=float(matrix[np.triu_indices(len(matrix), 1)].mean()),
            variances=np.array([variance for variance, _ in terms]),
            freedoms=np.array([freedom for _, freedom in terms]),
            effect=effect,
        )


def _excess(densities: LogDensities) -> Floats:
    """(B, B) what the probes make the divergences too high (see the module's docstring)."""
    rows = densities.rows
    relative = np.divide(
        densities.variances(), rows, out=np.zeros_like(rows), where=rows > _NEGLIGIBLE
    )
    excess = np.empty((len(rows), len(rows)))
    for index, row in enumerate(rows):
        sums = np.maximum(row + rows, _NEGLIGIBLE)
        excess[index] = ((rows / sums) * relative[index]).sum(axis=1) / 4
    return excess + excess.T


def _slopes(rows: Floats) -> Floats:
    """(B, G) derivative of the mean divergence with respect to each block's probabilities."""
    num_pairs = len(rows) * (len(rows) - 1) / 2
    bounded = np.maximum(rows, _NEGLIGIBLE)
    slopes = np.empty_like(rows)
    for index, row in enumerate(bounded):
        slopes[index] = np.log(2 * row / (row + bounded)).sum(axis=0) / 2 / num_pairs
    return slopes


@dataclass(frozen=True)
class Wasserstein(Sampled):
    """1-Wasserstein distance in decades; unlike JS it has no ceiling."""

    name: str = "wasserstein"
    label: str = "Wasserstein"
    title: str = "Wasserstein distance on a log axis"
    unit: str = "decades"
    description: str = "1-Wasserstein distance of the spectra over a symmetric-log eigenvalue axis"
    scale_free: bool = True
    drawn: bool = True

    def sample(self, workspace: Workspace) -> Sample:
        return transport(workspace.blocks, workspace.axis.position, 0)
