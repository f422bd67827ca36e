"""How different the Hessian spectra of a network's blocks are: four readings, the spread of scales, a verdict.

All readings average a distance over the B (B - 1) / 2 pairs of blocks. JS is the Jensen-Shannon *divergence* in nats,
    JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2,  m = (p + q) / 2,  0 <= JS <= ln 2        (Lin 1991)
not its square root: the literature calls it a distance, this package takes the divergence, whose bound is ln 2.

- "unnormalised": the literature's JS0 (Zhang et al. 2024, arXiv 2402.16788). Densities smoothed with a Gaussian of
  *absolute* variance 1e-5 on 50,000 points from (mean over probes of the smallest node) - 1 to (mean of the largest)
  + 1, normalised to integrate to 1, then p log p summed over grid points without the cell width. The recipe for single
  densities is published, the JS code is not. Inferred: the missing cell width (values above ln 2 allow nothing else),
  and one grid for all blocks, from the lowest low end to the highest high end.
- "bounded": the same with probabilities p dx, so unnormalised = bounded / dx.
- "log": JS of densities over the symlog axis of :mod:`hessian_tools.spectra.density`, kernel width in decades.
- "wasserstein": the 1-Wasserstein distance on that axis, in decades, exactly from nodes and weights, without a kernel.
The last two and the scale spread do not change when the loss is multiplied by a constant.

Standard errors and bias: jackknife over probes, a block at a time, see :mod:`hessian_tools.heterogeneity.comparison`. Few probes
make spectra look more different than they are, by O(1/k): that bias is told beside the error and not subtracted. What
too few Lanczos steps do is in neither (:mod:`hessian_tools.heterogeneity.adaptive` estimates it).

Shapes: B blocks, G grid points, k probes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hessian_tools.heterogeneity.comparison import (
    READINGS,
    Comparison,
    Matrices,
    jackknife,
    literature_grid,
    wasserstein_distances,
)
from hessian_tools.heterogeneity.verdict import SCALE_FREE_CASES, Contrast, Verdict, decide
from hessian_tools.results import registered
from hessian_tools.spectra.density import LINEAR_FRACTION, LOG_WIDTH, symlog_axis
from hessian_tools.spectra.quadrature import Quadrature

_UNITS_AND_WORDS = {
    "bounded": ("nats", "JS divergence of densities with an absolute kernel width, at most ln 2"),
    "unnormalised": ("nats / dx", "the literature's JS0: bounded divided by the grid's spacing dx"),
    "log": (
        "nats",
        "JS divergence of densities over a symmetric-log eigenvalue axis, at most ln 2",
    ),
    "wasserstein": (
        "decades",
        "1-Wasserstein distance of the spectra over a symmetric-log eigenvalue axis",
    ),
}


@registered
@dataclass(frozen=True, eq=False)
class Reading:
    """One reading of heterogeneity."""

    mean: float  # over pairs of blocks
    standard_error: float
    matrix: np.ndarray  # (B, B) symmetric, zero diagonal
    unit: str
    description: str
    bias: float = float(
        "nan"
    )  # of ``mean`` from finitely many probes, the jackknife's estimate; not subtracted


@registered
@dataclass(frozen=True, eq=False)
class ScaleSpread:
    """Standard deviation (over B, not B - 1) of log10 of the blocks' root mean square eigenvalue, in decades.

    Blocks whose Hessian is exactly zero have no scale: they are -inf in ``log10_rms`` and left out (nan if fewer than
    two remain).
    """

    value: float
    standard_error: float
    log10_rms: np.ndarray  # (B,)
    unit: str = "decades"
    description: str = "standard deviation over blocks of log10 of the root mean square eigenvalue"
    bias: float = float(
        "nan"
    )  # of ``value`` from finitely many probes, the jackknife's estimate; not subtracted

    @property
    def mean(self) -> float:
        """``value``, under the name that a Reading has for it."""
        return self.value


@registered
@dataclass(frozen=True, eq=False)
class JSHeterogeneity:
    """All readings of one set of block spectra; ``js0``, ``standard_error``, ``matrix`` are the literature's."""

    names: tuple[str, ...]  # (B,)
    readings: dict[str, Reading]
    scale_spread: ScaleSpread
    verdict: Verdict
    num_matvecs: int
    num_probes: int  # k of the jackknife, the fewest of any block; 0 when all blocks are exact
    spacing: float  # dx of the literature's grid, in eigenvalue units
    linthresh: float  # of the symlog axis, in eigenvalue units
    settings: dict[str, float]  # num_points, variance, margin, log_width, linear_fraction
    notes: tuple[str, ...]

    @property
    def js0(self) -> float:
        return self.readings["unnormalised"].mean

    @property
    def standard_error(self) -> float:
        return self.readings["unnormalised"].standard_error

    @property
    def matrix(self) -> np.ndarray:
        """(B, B)"""
        return self.readings["unnormalised"].matrix


def js_heterogeneity(
    spectra: Mapping[str, Quadrature], *, readings: Sequence[str] = READINGS, num_points: int = 50_000,
    variance: float = 1e-5, margin: float = 1.0, log_width: float = LOG_WIDTH, linear_fraction: float = LINEAR_FRACTION,
) -> JSHeterogeneity:  # fmt: skip
    """Heterogeneity of two or more blocks; definitions in the module's docstring.

    Args:
        spectra: BlockSpectra, or any mapping of names to Quadratures; blocks may differ in probes and steps.
        readings: which of "bounded", "unnormalised", "log", "wasserstein". Without "unnormalised" there is no ``js0``
            (KeyError) and the verdict is "undecided".
        num_points, variance, margin: of the literature's grid and kernel, in eigenvalue units.
        log_width: kernel of the "log" reading, in decades.
        linear_fraction: see :func:`hessian_tools.spectra.density.symlog_axis`.
    Raises:
        ValueError: for fewer than two blocks, an unknown reading, or a setting out of range.
    """
    settings = {
        "num_points": num_points,
        "variance": variance,
        "margin": margin,
        "log_width": log_width,
    }
    settings["linear_fraction"] = linear_fraction
    _check(spectra, readings, settings)
    names, blocks = tuple(spectra), list(spectra.values())
    num_probes = min((block.num_probes for block in blocks if block.status != "exact"), default=0)
    comparison = Comparison(blocks, readings, settings)
    matrices, means, log10_rms = comparison.matrices, comparison.means, comparison.log10_rms
    parts = jackknife(comparison)
    errors = {name: float(np.sqrt(variances.sum())) for name, (variances, _) in parts.items()}
    biases = {name: float(shares.sum()) for name, (_, shares) in parts.items()}
    found = {}
    for name, matrix in matrices.items():
        found[name] = Reading(
            means[name], errors[name], matrix, *_UNITS_AND_WORDS[name], biases[name]
        )
    spread = ScaleSpread(means["scale"], errors["scale"], log10_rms, bias=biases["scale"])
    error, bias = errors.get("unnormalised", np.nan), biases.get("unnormalised", np.nan)
    pair = _contrast(names, blocks, matrices, log10_rms, linear_fraction)
    scale_free = {name: means[name] for name in matrices if name in SCALE_FREE_CASES}
    verdict = decide(means.get("unnormalised", np.nan), error, pair, scale_free, bias=bias)
    num_matvecs = sum(block.num_matvecs for block in blocks)
    spacing = literature_grid(blocks, num_points, margin).spacing
    linthresh = symlog_axis(blocks, linear_fraction).linthresh
    notes = tuple(_notes(names, log10_rms, num_probes, spacing, float(np.sqrt(variance))))
    return JSHeterogeneity(
        names, found, spread, verdict, num_matvecs, num_probes, spacing, linthresh, settings, notes
    )


def _check(
    spectra: Mapping[str, Quadrature], readings: Sequence[str], settings: Mapping[str, float]
) -> None:
    if len(spectra) < 2:
        raise ValueError(
            f"spectra holds {len(spectra)} block(s); heterogeneity compares at least two"
        )
    if not readings or not set(readings) <= set(READINGS):
        raise ValueError(
            f"readings is {tuple(readings)!r}; choose at least one of {', '.join(map(repr, READINGS))}"
        )
    for name, value in settings.items():
        if not value > 0 or not np.isfinite(value):
            raise ValueError(f"{name} is {value}; a positive finite number is needed")


def _contrast(
    names: Sequence[str],
    blocks: Sequence[Quadrature],
    matrices: Matrices,
    log10_rms: np.ndarray,
    fraction: float,
) -> Contrast:
    """The most distant pair by the most telling reading there is ("wasserstein" does not saturate, JS does)."""
    matrix = next(
        matrices[name]
        for name in ("wasserstein", "log", "unnormalised", "bounded")
        if name in matrices
    )
    above = np.triu_indices(len(matrix), 1)
    farthest = np.transpose(above)[np.argmax(matrix[above])].tolist()
    large, small = sorted(farthest, key=lambda i: -log10_rms[i])
    if not np.isfinite(log10_rms[small]):
        factor = float("inf") if np.isfinite(log10_rms[large]) else 1.0
        return Contrast(names[large], names[small], factor, float("nan"))
    shapes = [
        replace(blocks[i], nodes=blocks[i].nodes / 10.0 ** log10_rms[i]) for i in (large, small)
    ]
    shape = float(wasserstein_distances(shapes, symlog_axis(shapes, fraction))[0, 1])
    return Contrast(
        names[large], names[small], float(10.0 ** (log10_rms[large] - log10_rms[small])), shape
    )


def _notes(
    names: Sequence[str], log10_rms: np.ndarray, num_probes: int, spacing: float, width: float
) -> Iterator[str]:
    zero = [name for name, scale in zip(names, log10_rms, strict=True) if not np.isfinite(scale)]
    if zero:
        yield f"{len(zero)} block(s) with an exactly zero Hessian are left out of the scale spread: {', '.join(zero)}"
    if num_probes == 1:
        yield "one probe: standard errors are unknown (nan); take at least two"
    if spacing > width:
        underflow = (
            " (densities may underflow there; computed in log space)"
            if spacing > 2 * 38 * width
            else ""
        )
        yield (
            f"the literature's grid spacing {spacing:.3g} exceeds its kernel width {width:.3g}: bounded and "
            f"unnormalised JS depend on which nodes happen to lie near a grid point{underflow}"
        )
