"""How different the Hessian spectra of a network's blocks are: readings, their errors, a verdict.

The readings are defined in :mod:`hessian_tools.heterogeneity.readings`. Standard errors and bias:
jackknife over probes, a block at a time, see :mod:`hessian_tools.heterogeneity.comparison`. Few
probes make spectra look more different than they are, by O(1/k): that bias is reported beside the
error and not subtracted. What too few Lanczos steps do is in neither
(:mod:`hessian_tools.heterogeneity.adaptive` estimates it).

Shapes: B blocks, k probes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hessian_tools.heterogeneity.comparison import Comparison, Jackknife, jackknife
from hessian_tools.heterogeneity.literature import LiteratureDensities
from hessian_tools.heterogeneity.log_axis import wasserstein_distances
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.heterogeneity.readings import JS0, READINGS, SCALE, pair_readings
from hessian_tools.heterogeneity.verdict import Contrast, Verdict, decide
from hessian_tools.results import registered
from hessian_tools.spectra.density import LINEAR_FRACTION, LOG_WIDTH, symlog_axis
from hessian_tools.spectra.quadrature import Floats, Quadrature


@registered
@dataclass(frozen=True, eq=False)
class Reading:
    """One reading over pairs of blocks."""

    mean: float  # over pairs of blocks
    standard_error: float
    matrix: Floats  # (B, B) symmetric, zero diagonal
    unit: str
    description: str
    # of ``mean`` from finitely many probes, by the jackknife; not subtracted
    bias: float = float("nan")


@registered
@dataclass(frozen=True, eq=False)
class ScaleSpread:
    """Standard deviation (over B, not B - 1) of log10 of the blocks' rms eigenvalues, in decades.

    Blocks whose Hessian is exactly zero have no scale: they are -inf in ``log10_rms`` and left out
    (nan if fewer than two remain).
    """

    value: float
    standard_error: float
    log10_rms: Floats  # (B,)
    unit: str = READINGS[SCALE].unit
    description: str = READINGS[SCALE].description
    # of ``value`` from finitely many probes, by the jackknife; not subtracted
    bias: float = float("nan")

    @property
    def mean(self) -> float:
        """``value``, under the name that a Reading has for it."""
        return self.value


@registered
@dataclass(frozen=True, eq=False)
class JSHeterogeneity:
    """All readings of one set of block spectra.

    ``js0``, ``standard_error`` and ``matrix`` are those of the literature's reading.
    """

    names: tuple[str, ...]  # (B,)
    readings: dict[str, Reading]  # over pairs, by name
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
        return self.readings[JS0].mean

    @property
    def standard_error(self) -> float:
        return self.readings[JS0].standard_error

    @property
    def matrix(self) -> Floats:
        """(B, B)"""
        return self.readings[JS0].matrix

    @property
    def every_reading(self) -> dict[str, Reading | ScaleSpread]:
        """The readings over pairs and the spread of scales, by name."""
        return {**self.readings, SCALE: self.scale_spread}


def js_heterogeneity(
    spectra: Mapping[str, Quadrature],
    *,
    readings: Sequence[str] | None = None,
    num_points: int = 50_000,
    variance: float = 1e-5,
    margin: float = 1.0,
    log_width: float = LOG_WIDTH,
    linear_fraction: float = LINEAR_FRACTION,
) -> JSHeterogeneity:
    """Heterogeneity of two or more blocks.

    Args:
        spectra: BlockSpectra, or any mapping of names to Quadratures; blocks may differ in probes
            and steps.
        readings: some of "bounded", "unnormalised", "log", "wasserstein"; None: all of them. The
            spread of scales is always computed. Without "unnormalised" there is no ``js0``
            (KeyError) and the verdict is "undecided".
        num_points, variance, margin: of the literature's grid and kernel, in eigenvalue units.
        log_width: kernel of the "log" reading, in decades.
        linear_fraction: see :func:`hessian_tools.spectra.density.symlog_axis`.
    Raises:
        ValueError: for fewer than two blocks, an unknown reading, or a setting out of range.
    """
    asked = pair_readings() if readings is None else tuple(readings)
    _check(spectra, asked)
    settings = GridSettings(num_points, variance, margin, log_width, linear_fraction)
    names = tuple(spectra)
    blocks = list(spectra.values())
    comparison = Comparison(blocks, [*asked, SCALE], settings)
    parts = jackknife(comparison)

    log10_rms = comparison.values[SCALE]
    scale = parts[SCALE]
    spread = ScaleSpread(
        comparison.means[SCALE],
        scale.standard_error,
        log10_rms,
        bias=scale.bias,
    )
    num_probes = min((block.num_probes for block in blocks if block.status != "exact"), default=0)
    literature = comparison.workspace.densities(LiteratureDensities)
    spacing = literature.grid.spacing
    return JSHeterogeneity(
        names=names,
        readings={name: _reading(name, comparison, parts[name]) for name in asked},
        scale_spread=spread,
        verdict=_verdict(names, comparison, parts),
        num_matvecs=sum(block.num_matvecs for block in blocks),
        num_probes=num_probes,
        spacing=spacing,
        linthresh=comparison.workspace.axis.linthresh,
        settings=asdict(settings),
        notes=tuple(_notes(names, log10_rms, num_probes, spacing, literature.width)),
    )


def _check(spectra: Mapping[str, Quadrature], asked: Sequence[str]) -> None:
    if len(spectra) < 2:
        raise ValueError(
            f"spectra holds {len(spectra)} block(s); heterogeneity compares at least two"
        )
    known = pair_readings()
    if not asked or not set(asked) <= set(known):
        choices = ", ".join(map(repr, known))
        raise ValueError(f"readings is {asked!r}; choose at least one of {choices}")


def _reading(name: str, comparison: Comparison, part: Jackknife) -> Reading:
    measure = READINGS[name]
    return Reading(
        comparison.means[name],
        part.standard_error,
        comparison.values[name],
        measure.unit,
        measure.description,
        part.bias,
    )


def _verdict(
    names: Sequence[str],
    comparison: Comparison,
    parts: Mapping[str, Jackknife],
) -> Verdict:
    contrast = _contrast(names, comparison)
    witnesses = {
        name: mean
        for name, mean in comparison.means.items()
        if READINGS[name].reference_cases is not None
    }
    if JS0 not in parts:
        return decide(np.nan, np.nan, contrast, witnesses, bias=np.nan)
    part = parts[JS0]
    return decide(
        comparison.means[JS0],
        part.standard_error,
        contrast,
        witnesses,
        bias=part.bias,
        unseen=_unseen(comparison),
    )


def _unseen(comparison: Comparison) -> str:
    """Why the literature's densities could not differ; "" where they could."""
    blocks = comparison.workspace.blocks
    largest = max(float(np.abs(block.nodes).max()) for block in blocks)
    width = comparison.workspace.densities(LiteratureDensities).width
    if largest == 0:
        return "the Hessian of every block is exactly zero, of which nothing can be told"
    if largest < width:
        return (
            f"no eigenvalue exceeds {largest:.2g}, less than the width {width:.2g} of its kernel, "
            "so that blocks look alike whatever they are; its scale-free companions remain"
        )
    return ""


def _contrast(names: Sequence[str], comparison: Comparison) -> Contrast:
    """The most distant pair of blocks, by the most telling reading that was computed."""
    most_telling = [name for name in pair_readings() if name in comparison.values][-1]
    matrix = comparison.values[most_telling]
    above = np.triu_indices(len(matrix), 1)
    farthest = np.transpose(above)[np.argmax(matrix[above])].tolist()
    log10_rms = comparison.values[SCALE]
    large, small = sorted(farthest, key=lambda block: -log10_rms[block])
    if not np.isfinite(log10_rms[small]):
        factor = float("inf") if np.isfinite(log10_rms[large]) else 1.0
        return Contrast(names[large], names[small], factor, float("nan"))

    # what is left of the difference when each spectrum is divided by its own scale
    blocks = comparison.workspace.blocks
    shapes = [blocks[index].scaled(10.0 ** -log10_rms[index]) for index in (large, small)]
    axis = symlog_axis(shapes, comparison.workspace.settings.linear_fraction)
    shape = float(wasserstein_distances(shapes, axis)[0, 1])
    factor = float(10.0 ** (log10_rms[large] - log10_rms[small]))
    return Contrast(names[large], names[small], factor, shape)


def _notes(
    names: Sequence[str],
    log10_rms: Floats,
    num_probes: int,
    spacing: float,
    width: float,
) -> Iterator[str]:
    zero = [name for name, scale in zip(names, log10_rms, strict=True) if not np.isfinite(scale)]
    if zero:
        yield (
            f"{len(zero)} block(s) with an exactly zero Hessian are left out of the scale spread: "
            f"{', '.join(zero)}"
        )
    if num_probes == 1:
        yield "one probe: standard errors are unknown (nan); take at least two"
    if spacing > width:
        # between two grid points a node may be half a spacing from the nearer one, and exp(-38^2/2)
        # is where float64 ends
        underflows = spacing > 2 * 38 * width
        remark = " (densities may underflow there; computed in log space)" if underflows else ""
        yield (
            f"the literature's grid spacing {spacing:.3g} exceeds its kernel width {width:.3g}: "
            "bounded and unnormalised JS depend on which nodes happen to lie near a grid point"
            f"{remark}"
        )
