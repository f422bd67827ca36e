"""Readings over the symlog axis of :mod:`hessian_tools.spectra.density`, in decades.

"log" is the JS divergence of densities smoothed on that axis. "wasserstein" is the 1-Wasserstein
distance on it, exactly from nodes and weights, without a kernel. Neither changes when the loss is
multiplied by a constant.

Shapes: B blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist, squareform

from hessian_tools.heterogeneity.measure import (
    Densities,
    GridSettings,
    PairMeasure,
    Replacement,
    Workspace,
)
from hessian_tools.spectra.density import Axis, SpectralGrid, spanning_grid
from hessian_tools.spectra.quadrature import Floats, Quadrature

_MARGIN = 8  # kernel widths beyond the extreme nodes: 1e-15 of the mass is lost at most
_POINTS_A_WIDTH = 16  # the sum over grid points is then the integral, to rounding
_SLAB = 1 << 23  # numbers in one temporary


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

    def serves(self, needed: SpectralGrid) -> bool:
        """A grid that reaches further gives the same integral."""
        return self.grid.low <= needed.low and needed.high <= self.grid.high


@dataclass(frozen=True)
class Log(PairMeasure):
    """JS of densities with a kernel of constant width in decades."""

    name: str = "log"
    label: str = "JS log"
    title: str = "JS divergence on a log axis"
    unit: str = "nats"
    description: str = (
        "JS divergence of densities over a symmetric-log eigenvalue axis, at most ln 2"
    )
    scale_free: bool = True
    reference_cases: tuple[float, float] | None = (0.081, 0.693)

    def values(self, workspace: Workspace) -> Floats:
        return workspace.densities(LogDensities).divergences

    def row(self, replacement: Replacement) -> Floats:
        return replacement.divergences(LogDensities)


@dataclass(frozen=True)
class Wasserstein(PairMeasure):
    """1-Wasserstein distance in decades; unlike JS it has no ceiling."""

    name: str = "wasserstein"
    label: str = "Wasserstein"
    title: str = "Wasserstein distance on a log axis"
    unit: str = "decades"
    description: str = "1-Wasserstein distance of the spectra over a symmetric-log eigenvalue axis"
    scale_free: bool = True
    drawn: bool = True
    reference_cases: tuple[float, float] | None = (0.11, 2.03)

    def values(self, workspace: Workspace) -> Floats:
        return wasserstein_distances(workspace.blocks, workspace.axis)

    def row(self, replacement: Replacement) -> Floats:
        blocks = replacement.workspace.blocks
        axis = replacement.workspace.axis
        others = [blocks[index] for index in np.flatnonzero(replacement.others)]
        return np.array([_wasserstein(replacement.block, other, axis) for other in others])


def wasserstein_distances(blocks: Sequence[Quadrature], axis: Axis) -> Floats:
    """1-Wasserstein distances of all pairs, (B, B), in the axis' unit.

    They are the exact integrals of |F_p - F_q| over the axis, F the cumulative distributions, which
    are constant between neighbouring nodes of any block.
    """
    pooled = [block.pooled for block in blocks]
    positions = axis.position(np.concatenate([nodes for nodes, _ in pooled]))
    weights = np.concatenate([weights for _, weights in pooled])
    owners = np.repeat(np.arange(len(blocks)), [len(nodes) for nodes, _ in pooled])
    order = np.argsort(positions, kind="stable")
    gaps = np.diff(positions[order])
    owners = owners[order][:-1]
    weights = weights[order][:-1]

    distances = np.zeros(len(blocks) * (len(blocks) - 1) // 2)
    reached = np.zeros((len(blocks), 1))  # F of every block at the end of the slab before
    columns = max(1, _SLAB // len(blocks))
    for slab in np.split(np.arange(len(gaps)), range(columns, len(gaps), columns)):
        jumps = np.zeros((len(blocks), len(slab)))
        jumps[owners[slab], np.arange(len(slab))] = weights[slab]
        cumulative = reached + np.cumsum(jumps, axis=1)
        reached = cumulative[:, -1:]
        distances += pdist(cumulative * gaps[slab], "cityblock")
    return squareform(distances)


def _wasserstein(left: Quadrature, right: Quadrature, axis: Axis) -> float:
    """One entry of :func:`wasserstein_distances`."""
    left_nodes, left_weights = left.pooled
    right_nodes, right_weights = right.pooled
    positions = axis.position(np.concatenate([left_nodes, right_nodes]))
    order = np.argsort(positions, kind="stable")
    jumps = np.concatenate([left_weights, -right_weights])[order]
    difference = np.cumsum(jumps)[:-1]
    return float(np.abs(difference) @ np.diff(positions[order]))
