"""Spectra of blocks compared by all readings asked for, and how sure the means are.

The jackknife leaves one probe of one block out, which changes that block's row of a matrix of
distances and, when the block held one of its ends, the grid; what changes is computed again,
nothing else. The probes of different blocks are independent, so the blocks are strata:
    SE^2 = sum_b (k_b - 1) / k_b sum_i (theta_bi - theta_b.)^2
    bias = sum_b (k_b - 1) (theta_b. - theta)
with theta_bi the reading without probe i of block b and theta_b. its mean over i (Jones 1974,
"Jackknife estimation of functions of stratum means"; the bias is Quenouille's, 1956). Blocks may
have different numbers of probes, and each term is what its block contributes. An exact block
contributes 0; a block of one probe leaves both unknown.

Shapes: B blocks, k_b probes of block b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.measure import GridSettings, Replacement, Workspace
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.spectra.quadrature import Floats, Quadrature


class Comparison:
    """Readings of B blocks, and what they become when one block is another.

    Attributes: ``workspace`` with the blocks, their axis and grids; by the readings' names, in the
    order asked for, ``values``, (B, B) for pairs of blocks and (B,) for single ones, and ``means``.
    """

    def __init__(
        self,
        blocks: Sequence[Quadrature],
        readings: Sequence[str],
        settings: GridSettings,
    ) -> None:
        self.workspace = Workspace(blocks, settings)
        self.measures = {name: READINGS[name] for name in readings}
        self.values = {name: m.values(self.workspace) for name, m in self.measures.items()}
        self.means = {name: m.mean(self.values[name]) for name, m in self.measures.items()}

    def replacing(self, index: int, block: Quadrature) -> dict[str, float]:
        """``means`` with ``block`` in the place of block ``index``."""
        blocks = list(self.workspace.blocks)
        blocks[index] = block
        settings = self.workspace.settings
        # on another axis or grid all distances change, not only those of this block
        if not self.workspace.serves(Workspace(blocks, settings)):
            return Comparison(blocks, list(self.measures), settings).means
        replacement = Replacement(self.workspace, index, block)
        return {
            name: measure.mean_after(replacement, self.values[name], self.means[name])
            for name, measure in self.measures.items()
        }


@dataclass(frozen=True, eq=False)
class Jackknife:
    """What the blocks contribute to the uncertainty of one reading."""

    variances: Floats  # (B,) terms of SE^2
    biases: Floats  # (B,) terms of the bias

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(self.variances.sum()))

    @property
    def bias(self) -> float:
        """Of the mean, from finitely many probes."""
        return float(self.biases.sum())


def jackknife(comparison: Comparison) -> dict[str, Jackknife]:
    """The jackknife of every reading of ``comparison``, by name (see the module's docstring)."""
    blocks = comparison.workspace.blocks
    parts = {
        name: Jackknife(np.zeros(len(blocks)), np.zeros(len(blocks))) for name in comparison.means
    }
    for index, block in enumerate(blocks):
        if block.status == "exact":
            continue
        replicates = _replicates(comparison, index, block)
        for name, part in parts.items():
            variance, bias = _terms([r[name] for r in replicates], comparison.means[name])
            part.variances[index] = variance
            part.biases[index] = bias
    return parts


def _replicates(comparison: Comparison, index: int, block: Quadrature) -> list[dict[str, float]]:
    """The means without one probe of the block each; none for a block of one probe."""
    k = block.num_probes
    if k == 1:
        return []
    return [comparison.replacing(index, block.without_probe(probe)) for probe in range(k)]


def _terms(replicates: Sequence[float], mean: float) -> tuple[float, float]:
    """A block's terms of SE^2 and of the bias, from the k means without one of its probes each."""
    k = len(replicates)
    if k == 0:
        return float("nan"), float("nan")
    theta = np.array(replicates)
    return (k - 1) * theta.var(), (k - 1) * (theta.mean() - mean)
