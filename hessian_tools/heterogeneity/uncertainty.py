"""What remains uncertain about a reading, and which blocks it comes from.

The remaining uncertainty is a standard error, as a fraction of the reading:

- the **standard error** from the probes, times a **doubt**: Student's t over 1.96, for the error is
  itself known from few probes (:mod:`hessian_tools.heterogeneity.estimate`);
- the change that the last Lanczos **steps** made, added in squares. Of two measures the
  larger counts: all blocks changed together, and the root of the sum of squares of the changes that
  single blocks make, for changes that cancel are no convergence;
- for readings that are jackknifed, the square of the **bias**: what taking the O(1/k) part off
  leaves (Quenouille 1956).

Readings are never wanted to a fraction of nothing: below ``measure.least`` (a tenth of a decade for
most) they are wanted to a fraction of that.

Shapes: B blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.comparison import Found, compared
from hessian_tools.heterogeneity.estimate import Z, quantile
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Floats, Quadrature


@registered
@dataclass(frozen=True)
class Uncertainty:
    """What remains uncertain about a mean, as fractions of it."""

    standard_error: float
    doubt: float  # factor for the standard error's own uncertainty, as it comes from few probes
    bias: float  # taken off in the estimate; positive where few probes make the reading too high
    steps: float  # change over the last Lanczos steps

    @property
    def total(self) -> float:
        """What is compared with the tolerance."""
        error = float(np.hypot(self.doubt * self.standard_error, self.steps))
        return error + self.bias**2


@dataclass(frozen=True, eq=False)
class Shares:
    """What each block contributes to the uncertainty of one reading, as fractions of its mean."""

    variances: Floats  # (B,) terms of SE^2
    freedoms: Floats  # (B,) degrees of freedom of each
    biases: Floats  # (B,)
    steps: Floats  # (B,) change of the mean if this block alone had a third fewer steps
    together: float  # the same, all blocks at once

    @property
    def uncertainty(self) -> Uncertainty:
        return Uncertainty(
            standard_error=float(np.sqrt(self.variances.sum())),
            doubt=quantile(self.variances, self.freedoms) / Z,
            bias=float(self.biases.sum()),
            steps=max(abs(self.together), float(np.linalg.norm(self.steps))),
        )


def shares_of(
    blocks: Sequence[Quadrature],
    readings: Sequence[str],
) -> tuple[dict[str, Shares], dict[str, float]]:
    """The shares of all blocks in the uncertainty of each reading, and the readings themselves."""
    found, _ = compared(blocks, readings, GridSettings())
    shares = {name: _shares(one) for name, one in found.items()}
    return shares, {name: one.mean for name, one in found.items()}


def _shares(found: Found) -> Shares:
    # 1 where nothing is compared: blocks that are all zero differ by 0 +- 0
    unit = float(np.nanmax([abs(found.mean), found.measure.least])) or 1.0
    return Shares(
        variances=found.variances / unit**2,
        freedoms=found.freedoms,
        biases=found.biases / unit,
        steps=found.alone / unit,
        together=found.change / unit,
    )
