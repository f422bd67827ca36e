"""From an operator to its eigenvalues.

Reading order: probes, lanczos, gauss, quadrature, slq, exact, density; then krylov,
eigenpairs; traces.
"""

from hessian_tools.spectra.density import Axis, SpectralDensity, SpectralGrid, spectral_density
from hessian_tools.spectra.eigenpairs import Eigenpairs, top_eigenpairs
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.lanczos import LanczosResult
from hessian_tools.spectra.probes import draw_probes, keyed_stream
from hessian_tools.spectra.quadrature import BlockSpectra, Estimate, Quadrature, RitzValue
from hessian_tools.spectra.slq import blockwise_slq
from hessian_tools.spectra.traces import DiagonalEstimate, TraceEstimate, diagonal, trace

__all__ = [
    "Axis",
    "BlockSpectra",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "LanczosResult",
    "Quadrature",
    "RitzValue",
    "SpectralDensity",
    "SpectralGrid",
    "TraceEstimate",
    "blockwise_slq",
    "diagonal",
    "draw_probes",
    "keyed_stream",
    "spectral_density",
    "top_eigenpairs",
    "trace",
    "truncated",
]
