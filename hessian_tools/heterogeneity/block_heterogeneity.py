"""How different the Hessian spectra of a network's blocks are: readings, their errors, a verdict.

The readings are defined in :mod:`hessian_tools.heterogeneity.readings`. Errors:
:mod:`hessian_tools.heterogeneity.estimate`. ``low`` and ``high`` are the ends of an interval that
covers the exact value 95 times in 100, Lanczos steps included; both are nan where the steps do not
resolve the reading, and for the literature's readings, which instead have a ``floor``: what blocks
with one and the same spectrum read.

Shapes: B blocks, k probes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from hessian_tools.heterogeneity.comparison import Found, compared
from hessian_tools.heterogeneity.literature import LiteratureDensities
from hessian_tools.heterogeneity.measure import Densities, GridSettings, Workspace
from hessian_tools.heterogeneity.readings import (
    CURVATURE,
    DEFAULT,
    JS0,
    READINGS,
    SCALE,
    pair_readings,
)
from hessian_tools.heterogeneity.transport import shape_distance
from hessian_tools.heterogeneity.verdict import Contrast, Evidence, Verdict, decide
from hessian_tools.results import registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.spectra.density import LINEAR_FRACTION, LOG_WIDTH, unresolved_below
from hessian_tools.spectra.quadrature import BlockSpectra, Floats, Quadrature
from hessian_tools.tables import interval


@registered
@dataclass(frozen=True, eq=False)
class Reading:
    """One reading over pairs of blocks."""

    mean: float  # over pairs of blocks, without what few probes add to it where that is known
    standard_error: float  # from the probes
    matrix: Floats  # (B, B) symmetric, zero diagonal; nan for blocks that are zero
    unit: str
    description: str
    # of ``mean`` from finitely many probes, by the jackknife; not subtracted
    bias: float = float("nan")
    low: float = float("nan")  # of an interval that covers 95 times in 100, nan if not resolved
    high: float = float("nan")
    change: float = float("nan")  # that the last Lanczos steps made
    floor: float = float("nan")  # of identical blocks, at these probes and steps


@registered
@dataclass(frozen=True, eq=False)
class ScaleSpread:
    """Standard deviation (over B, not B - 1) of log10 of the blocks' rms eigenvalues, in decades.

    ``value`` is without what the errors of the logarithms add, and negative where the blocks differ
    by less than that (:class:`hessian_tools.heterogeneity.readings.Scale`). Blocks whose Hessian is
    zero have no scale: they are -inf in ``log10_rms`` and left out (nan if fewer than two remain).
    """

    value: float
    standard_error: float
    log10_rms: Floats  # (B,) as measured
    unit: str = READINGS[SCALE].unit
    description: str = READINGS[SCALE].description
    bias: float = 0.0  # taken off
    low: float = float("nan")
    high: float = float("nan")
    change: float = 0.0
    floor: float = 0.0

    @property
    def mean(self) -> float:
        """``value``, under the name that a Reading has for it."""
        return self.value


@registered
@dataclass(frozen=True, eq=False)
class JSHeterogeneity(Tabular, Drawable):
    """All readings of one set of block spectra.

    ``js0``, ``standard_error`` and ``matrix`` are those of the literature's reading, where it was
    asked for.
    """

    names: tuple[str, ...]  # (B,)
    readings: dict[str, Reading]  # over pairs, by name
    scale_spread: ScaleSpread
    verdict: Verdict
    num_matvecs: int
    num_probes: int  # k, the fewest of any block; 0 when all blocks are exact
    spacing: float  # dx of the literature's grid, in eigenvalue units; nan without its readings
    linthresh: float  # of the symlog axis, in eigenvalue units
    settings: dict[str, float]  # num_points, variance, margin, log_width, linear_fraction
    notes: tuple[str, ...]
    num_steps: int = 0  # m, the most of any block; 0 when all blocks are exact

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
        """The spread of scales and the readings over pairs, by name."""
        return {SCALE: self.scale_spread, **self.readings}

    def records(self) -> list[Record]:
        """A row a reading; without an interval it is not resolved, or has a floor instead."""
        return [
            {
                "reading": name,
                "value": reading.mean,
                "low": reading.low,
                "high": reading.high,
                "floor": reading.floor,
                "unit": reading.unit,
            }
            for name, reading in self.every_reading.items()
        ]

    def told(self, name: str) -> str:
        """A reading in words: with its interval or its floor, or why it has none."""
        reading = self.every_reading[name]
        if self.verdict.decision == "nothing to compare" and math.isnan(reading.mean):
            return self.verdict.decision
        if not READINGS[name].tolerable:
            return f"{reading.mean:.3g} (floor {reading.floor:.2g})"
        if math.isnan(reading.low):
            return f"not resolved at {self.num_probes} x {self.num_steps}"
        return interval(reading.mean, reading.low, reading.high)


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
        readings: some of "curvature", "log", "wasserstein", and the literature's "bounded" and
            "unnormalised"; None: "curvature". The spread of scales is always computed.
        num_points, variance, margin: of the literature's grid and kernel, in eigenvalue units.
        log_width: kernel of the "log" reading, in decades.
        linear_fraction: see :func:`hessian_tools.spectra.density.symlog_axis`.
    Raises:
        ValueError: for fewer than two blocks, an unknown reading, or a setting out of range.
    """
    asked = [name for name in DEFAULT if name != SCALE] if readings is None else list(readings)
    _check(spectra, asked)
    settings = GridSettings(num_points, variance, margin, log_width, linear_fraction)
    names = tuple(spectra)
    blocks = list(spectra.values())
    # the verdict hears both of these
    needed = list(dict.fromkeys([SCALE, CURVATURE, *asked]))
    found, workspace = compared(blocks, needed, settings)
    stochastic = [block for block in blocks if block.status != "exact"]
    literature = _literature(workspace, asked)
    notes = [
        *_notes(names, blocks, workspace, asked),
        *_literature_notes(literature),
        *_matrix_notes(spectra),
    ]
    return JSHeterogeneity(
        names=names,
        readings={name: _reading(found[name]) for name in asked},
        scale_spread=_scale_spread(found[SCALE]),
        verdict=_verdict(names, workspace, found),
        num_matvecs=sum(block.num_matvecs for block in blocks),
        num_probes=min((block.num_probes for block in stochastic), default=0),
        spacing=literature.grid.spacing if literature else float("nan"),
        linthresh=workspace.axis.linthresh,
        settings=asdict(settings),
        notes=tuple(notes),
        num_steps=max((block.nodes.shape[1] for block in stochastic), default=0),
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


def _reading(found: Found) -> Reading:
    return Reading(
        found.mean,
        found.standard_error,
        found.values,
        found.measure.unit,
        found.measure.description,
        found.bias,
        found.low,
        found.high,
        found.change,
        found.floor,
    )


def _scale_spread(found: Found) -> ScaleSpread:
    return ScaleSpread(
        found.mean,
        found.standard_error,
        found.values,
        low=found.low,
        high=found.high,
    )


def _verdict(
    names: Sequence[str],
    workspace: Workspace,
    found: Mapping[str, Found],
) -> Verdict:
    evidence = {
        name: Evidence(found[name].mean, found[name].low, found[name].high)
        for name in (SCALE, CURVATURE)
    }
    literature = None
    if JS0 in found:
        literature = (found[JS0].mean, found[JS0].floor)
    if workspace.is_zero.sum() > len(names) - 2:
        return decide(evidence, None, literature)
    contrast = _contrast(names, workspace, found[CURVATURE].values, found[SCALE].values)
    return decide(evidence, contrast, literature)


def _contrast(
    names: Sequence[str],
    workspace: Workspace,
    distances: Floats,
    log10_rms: Floats,
) -> Contrast:
    """The most distant pair of blocks in their curvature."""
    above = np.triu_indices(len(names), 1)
    farthest = np.transpose(above)[np.nanargmax(distances[above])].tolist()
    large, small = sorted(farthest, key=lambda block: -log10_rms[block])
    factor = float(10.0 ** (log10_rms[large] - log10_rms[small]))
    one, other = (workspace.blocks[index] for index in (large, small))
    shape = shape_distance(one, other)
    return Contrast(names[large], names[small], factor, shape)


def _notes(
    names: Sequence[str],
    blocks: Sequence[Quadrature],
    workspace: Workspace,
    asked: Sequence[str],
) -> Iterator[str]:
    zero = [name for name, is_zero in zip(names, workspace.is_zero, strict=True) if is_zero]
    if zero:
        yield (
            f"{len(zero)} block(s) whose Hessian is zero, or rounding of zero, have neither scale "
            f"nor curvature and are left out: {', '.join(zero)}"
        )
    bounds = [unresolved_below(block) for block in blocks]
    if {"log", "wasserstein"} & set(asked) and max(bounds) >= workspace.axis.linthresh > 0:
        coarsest = names[int(np.argmax(bounds))]
        yield (
            f"log and wasserstein do not tell eigenvalues below {workspace.axis.linthresh:.2g} "
            f"apart, which {coarsest} does not resolve at its steps; values at other steps are "
            "on another axis"
        )


def _matrix_notes(spectra: Mapping[str, Quadrature]) -> Iterator[str]:
    curvature = spectra.curvature if isinstance(spectra, BlockSpectra) else "Hessian"
    if curvature != "Hessian":
        yield f"these are readings of the {curvature}; the verdict's limits were set on Hessians"


def _literature(workspace: Workspace, asked: Sequence[str]) -> Densities | None:
    """The literature's densities, where one of its readings was asked for."""
    if all(READINGS[name].tolerable for name in asked):
        return None
    return workspace.densities(LiteratureDensities)


def _literature_notes(densities: Densities | None) -> Iterator[str]:
    if densities is None:
        return
    yield (
        "bounded and unnormalised are the literature's: they move with the loss' scale and with "
        "the number of Lanczos steps, and have a floor instead of an error"
    )
    spacing = densities.grid.spacing
    width = densities.width
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
