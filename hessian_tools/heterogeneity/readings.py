"""All readings of heterogeneity, by name: the one place where a reading becomes known.

Readings over pairs of blocks are means of a distance:
:mod:`hessian_tools.heterogeneity.literature` ("bounded", "unnormalised") and
:mod:`hessian_tools.heterogeneity.log_axis` ("log", "wasserstein"). "scale" is a spread over single
blocks. To add a reading, write a class like those and give it a line below: tables, pictures, the
command line, saved results and the tolerance of an adaptive run then have it.

Shapes: B blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.literature import Bounded, Unnormalised
from hessian_tools.heterogeneity.log_axis import Log, Wasserstein
from hessian_tools.heterogeneity.measure import Measure, PairMeasure, Replacement, Workspace
from hessian_tools.spectra.quadrature import Floats, Quadrature


@dataclass(frozen=True)
class Scale(Measure):
    """Standard deviation (over B, not B - 1) of log10 of the blocks' rms eigenvalues."""

    name: str = "scale"
    label: str = "spread of block scales"
    title: str = "spread of block scales"
    unit: str = "decades"
    description: str = "standard deviation over blocks of log10 of the root mean square eigenvalue"
    scale_free: bool = True

    def values(self, workspace: Workspace) -> Floats:
        """(B,) log10 of the blocks' rms eigenvalues, -inf for a block that is exactly zero."""
        return _log10_rms(workspace.blocks)

    def mean(self, values: Floats) -> float:
        """Blocks that are exactly zero are left out; nan if fewer than two stay."""
        finite = values[np.isfinite(values)]
        return float(finite.std()) if len(finite) > 1 else float("nan")

    def mean_after(self, replacement: Replacement, values: Floats, mean: float) -> float:
        scales = values.copy()
        scales[replacement.index] = _log10_rms([replacement.block])[0]
        return self.mean(scales)


def _log10_rms(blocks: Sequence[Quadrature]) -> Floats:
    rms = np.array([block.rms.value for block in blocks])
    return np.log10(rms, out=np.full(len(rms), -np.inf), where=rms > 0)


JS0 = "unnormalised"  # the literature's reading at initialisation, which the verdict is about
SCALE = "scale"
# In display order; of readings over pairs, a later one tells more about the most different blocks.
READINGS: dict[str, Measure] = {
    measure.name: measure for measure in (Bounded(), Unnormalised(), Log(), Wasserstein(), Scale())
}


def pair_readings() -> tuple[str, ...]:
    """The names of the readings that are means over pairs of blocks, in display order."""
    return tuple(name for name, m in READINGS.items() if isinstance(m, PairMeasure))
