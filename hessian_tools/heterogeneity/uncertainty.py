"""What remains uncertain about a reading, and which blocks it comes from.

The estimate is the mean over pairs less the O(1/k) bias of few probes that the jackknife finds
(Quenouille 1956). The remaining uncertainty is the sum of three parts, as fractions of the mean:

- the **standard error**, by the jackknife over the probes of each block
  (:mod:`hessian_tools.heterogeneity.comparison`), times a **doubt**: four probes of one decisive
  block may agree by chance. The factor makes it an upper bound in nine of ten cases,
  sqrt(nu / chi2_nu(0.1)) with Satterthwaite's degrees of freedom nu (1946): 2.3 where four probes
  of one block decide, near 1 where many blocks contribute;
- the square of the **bias**, for taking the O(1/k) part off leaves O(1/k^2);
- **steps**: the change over the last third of the Lanczos steps. The quadratures with fewer nodes
  come from the same T and cost no product. Of two measures the larger counts: all blocks changed
  together, and the root of the sum of squares of the changes that single blocks make, for changes
  that cancel are no convergence.

Shapes: B blocks, k_b probes of block b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from hessian_tools.heterogeneity.comparison import Comparison, jackknife
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.results import registered
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.quadrature import Floats, Quadrature

_CHANCE = 0.1  # that the true standard error is above the one counted


@registered
@dataclass(frozen=True)
class Uncertainty:
    """What remains uncertain about a mean, as fractions of it."""

    standard_error: float
    doubt: float  # factor for the standard error's own uncertainty, as it comes from few probes
    bias: float  # taken off in the estimate; positive where few probes make the reading too high
    steps: float  # change over the last third of the Lanczos steps

    @property
    def total(self) -> float:
        """What is compared with the tolerance."""
        return self.doubt * self.standard_error + self.bias**2 + self.steps


@dataclass(frozen=True, eq=False)
class Shares:
    """What each block contributes to the uncertainty of one reading, as fractions of its mean."""

    probes: NDArray[np.int_]  # (B,) k_b
    variances: Floats  # (B,) terms of SE^2
    biases: Floats  # (B,)
    steps: Floats  # (B,) change of the mean if this block alone had a third fewer steps
    together: float  # the same, all blocks at once

    @property
    def uncertainty(self) -> Uncertainty:
        return Uncertainty(
            standard_error=float(np.sqrt(self.variances.sum())),
            doubt=self._doubt(),
            bias=float(self.biases.sum()),
            steps=max(abs(self.together), float(np.linalg.norm(self.steps))),
        )

    def _doubt(self) -> float:
        """An upper bound of the true standard error over the jackknife's (see the module)."""
        spread = (self.variances**2 / np.maximum(self.probes - 1, 1)).sum()
        freedom = self.variances.sum() ** 2 / spread if spread > 0 else np.inf
        if not np.isfinite(freedom):
            return 1.0
        return float(np.sqrt(freedom / chi2.ppf(_CHANCE, freedom)))


def shares_of(
    blocks: Sequence[Quadrature],
    readings: Sequence[str],
) -> tuple[dict[str, Shares], dict[str, float]]:
    """The shares of all blocks in the uncertainty of each reading, and the readings themselves."""
    comparison = Comparison(blocks, readings, GridSettings())
    # two thirds of the steps, rounded up
    fewer = [truncated(block, -(-2 * block.nodes.shape[1] // 3)) for block in blocks]
    together = Comparison(fewer, readings, GridSettings()).means
    alone = [
        comparison.means if less is block else comparison.replacing(index, less)
        for index, (block, less) in enumerate(zip(blocks, fewer, strict=True))
    ]
    parts = jackknife(comparison)
    probes = np.array([block.num_probes for block in blocks])
    shares = {}
    for name, mean in comparison.means.items():
        unit = abs(mean) or 1.0  # blocks that are all alike differ by 0 +- 0
        changes = np.array([means[name] for means in alone]) - mean
        shares[name] = Shares(
            probes=probes,
            variances=parts[name].variances / unit**2,
            biases=parts[name].biases / unit,
            steps=changes / unit,
            together=(together[name] - mean) / unit,
        )
    return shares, comparison.means
