"""From an operator to its eigenvalues.

Reading order: probes, lanczos, gauss, quadrature, slq, exact, density.
"""

from hessian_tools.spectra.density import Axis, SpectralDensity, SpectralGrid, spectral_density
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.lanczos import LanczosResult
from hessian_tools.spectra.probes import draw_probes, keyed_stream
from hessian_tools.spectra.quadrature import BlockSpectra, Estimate, Quadrature, RitzValue
from hessian_tools.spectra.slq import blockwise_slq

__all__ = [
    "Axis",
    "BlockSpectra",
    "Estimate",
    "LanczosResult",
    "Quadrature",
    "RitzValue",
    "SpectralDensity",
    "SpectralGrid",
    "blockwise_slq",
    "draw_probes",
    "keyed_stream",
    "spectral_density",
    "truncated",
]
