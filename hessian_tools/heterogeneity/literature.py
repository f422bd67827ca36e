"""The literature's readings: JS of densities with an absolute kernel width on a linear grid.

Zhang et al. 2024 (arXiv 2402.16788): densities smoothed with a Gaussian of *absolute* variance 1e-5
on 50,000 points from (mean over probes of the smallest node) - 1 to (mean of the largest) + 1,
normalised to integrate to 1, then p log p summed over grid points without the cell width. The
recipe for single densities is published, the JS code is not. Inferred: the missing cell width
(values above ln 2 allow nothing else), and one grid for all blocks, from the lowest low end to the
highest high end. With probabilities p dx the same sum is "bounded", so unnormalised = bounded / dx.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.divergence import js_divergences, probabilities
from hessian_tools.heterogeneity.measure import (
    Densities,
    GridSettings,
    PairMeasure,
    Replacement,
    Workspace,
)
from hessian_tools.spectra.density import Axis, SpectralGrid
from hessian_tools.spectra.quadrature import Floats, Quadrature


def literature_grid(
    blocks: Sequence[Quadrature],
    num_points: int = 50_000,
    margin: float = 1.0,
) -> SpectralGrid:
    """The literature's grid, one for all ``blocks`` (see the module's docstring)."""
    low = min(float(block.nodes.min(axis=1).mean()) for block in blocks) - margin
    high = max(float(block.nodes.max(axis=1).mean()) for block in blocks) + margin
    # beyond 1e10 neighbouring points may be one float64 number, where a margin of 1 is none
    largest = max(abs(low), abs(high))
    least = float(np.finfo(np.float64).eps) * num_points * largest
    if high - low < least:
        low -= least
        high += least
    return SpectralGrid(Axis("linear"), low, high, num_points)


class LiteratureDensities(Densities):
    """The literature's grid and kernel, both in eigenvalue units."""

    def grid_for(self, workspace: Workspace) -> SpectralGrid:
        settings = workspace.settings
        return literature_grid(workspace.blocks, int(settings.num_points), settings.margin)

    def width_for(self, settings: GridSettings) -> float:
        return math.sqrt(settings.variance)


@dataclass(frozen=True)
class Bounded(PairMeasure):
    """JS of the literature's densities as probabilities."""

    name: str = "bounded"
    label: str = "JS bounded (literature)"
    title: str = "JS divergence, bounded (the literature's)"
    unit: str = "nats"
    description: str = "JS divergence of densities with an absolute kernel width, at most ln 2"
    scale_free: bool = False
    tolerable: bool = False

    def values(self, workspace: Workspace) -> Floats:
        return workspace.densities(LiteratureDensities).divergences

    def row(self, replacement: Replacement) -> Floats:
        return replacement.divergences(LiteratureDensities)

    def floor(self, workspace: Workspace) -> float:
        """What disjoint groups of a block's own probes differ by, brought to groups of all k.

        The mean over blocks. Between groups of k/4 and of k/2 probes the divergence falls as a
        power of their number, by which the latter is continued to k (with the power 1/2 for fewer
        than four probes). nan where a block has one probe.
        """
        densities = workspace.densities(LiteratureDensities)
        found = [_own_divergence(block, densities) for block in workspace.blocks]
        return float(np.mean(found))


@dataclass(frozen=True)
class Unnormalised(Bounded):
    """The literature's JS0: "bounded" divided by the grid's spacing dx."""

    name: str = "unnormalised"
    label: str = "JS0 (literature, unnormalised)"
    title: str = "JS0 (the literature's, unnormalised)"
    unit: str = "nats / dx"
    description: str = "the literature's JS0: bounded divided by the grid's spacing dx"
    drawn: bool = True

    def values(self, workspace: Workspace) -> Floats:
        return super().values(workspace) / workspace.densities(LiteratureDensities).grid.spacing

    def row(self, replacement: Replacement) -> Floats:
        spacing = replacement.workspace.densities(LiteratureDensities).grid.spacing
        return super().row(replacement) / spacing

    def floor(self, workspace: Workspace) -> float:
        return super().floor(workspace) / workspace.densities(LiteratureDensities).grid.spacing


def _own_divergence(block: Quadrature, densities: Densities) -> float:
    """Of two sets of ``block.num_probes`` probes each; see ``Bounded.floor``."""
    if block.status == "exact":
        return 0.0
    k = block.num_probes
    if k == 1:
        return float("nan")
    half = _between_groups(block, k // 2, densities)
    power = 0.5
    if k >= 4 and half > 0:
        quarter = _between_groups(block, k // 4, densities)
        power = math.log(quarter / half) / math.log((k // 2) / (k // 4))
    return half * ((k // 2) / k) ** min(max(power, 0.0), 1.0)


def _between_groups(block: Quadrature, size: int, densities: Densities) -> float:
    """The mean divergence between disjoint groups of ``size`` probes."""
    starts = range(0, block.num_probes - size + 1, size)
    groups = [block.of_probes(slice(start, start + size)) for start in starts]
    matrix = js_divergences(probabilities(densities.grid, groups, densities.width))
    return float(matrix[np.triu_indices(len(groups), 1)].mean())
