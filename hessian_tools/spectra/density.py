"""Spectral densities: nodes and weights smeared with a Gaussian on one grid for all operators.

    density(t) = sum_i w_i exp(-(t - t_i)^2 / 2 s^2) / (s sqrt(2 pi)),   t_i = axis(x_i),
mean over probes.

Two axes. "linear": t = x, in units of the eigenvalues. "symlog", in decades:
    t = asinh(x / 2c) / ln 10,
which is sign(x) log10(|x| / c) for |x| >> c (to (c / x)^2 / ln 10), straight through zero for
|x| << c, and smooth between. c, ``linthresh``, is a fraction of the largest |node| over all
operators compared, so that scaling the loss changes nothing. The default fraction 1e-6 is ten times
float32's rounding (6e-8 to 1e-7 of the largest eigenvalue): what rounding makes of zero stays
inside the linear part and is not read as structure.

A Ritz value x_i with residual bound r_i has an eigenvalue within r_i, and speaks for the
eigenvalues about as far around it. Where r_i is more than a kernel's width on the axis (small ones
beside a large bulk, on a symlog axis), a kernel at t_i shows lobes and gaps that no spectrum has.
With ``spread_unresolved`` the weight of such a node lies as a Gaussian of 0.5 r_i in eigenvalue
units, cut off at the ends of all nodes, before it is smeared. r_i is about the gap to the next
nodes there (0.7 to 2 times in the median on planted bulks), so that this is no narrower than the
gaps are. Prescribed bulks and outliers have the peaks of their exact densities then
(tests/spectra/test_density.py), but deep valleys between bulks fill.

Shapes: B operators (blocks), G grid points, i runs over all nodes of all probes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import ndtr

from hessian_tools.results import registered
from hessian_tools.shown import Drawable
from hessian_tools.spectra.quadrature import Floats, Quadrature

LINEAR_FRACTION = 1e-6
LOG_WIDTH = 0.2  # decades
KERNEL_REACH = 8.0  # widths; beyond, less than 1e-13 of a node's density
SPREAD = 0.5  # standard deviation of an unresolved node's weight, of its residual bound
NUM_POINTS = 2_000
_WIDTHS_IN_RANGE = 200  # of the nodes, on a linear axis
_ROUNDING = 1e-12  # of the largest |node|: eigenvalues closer to each other are equal
_LN10 = float(np.log(10))
_UNDERFLOW = 745.0  # exp(-745) is the smallest positive float64


@registered
@dataclass(frozen=True)
class Axis:
    """How eigenvalues are laid out: ``kind`` "linear" | "symlog".

    The latter has ``linthresh`` c > 0, see :mod:`hessian_tools.spectra.density`.
    """

    kind: str
    linthresh: float = float("nan")

    @property
    def unit(self) -> str:
        """What a step of 1 along the axis is."""
        return "decades" if self.kind == "symlog" else "eigenvalue"

    def position(self, eigenvalues: ArrayLike) -> Floats:
        """Where ``eigenvalues`` lie on the axis, elementwise."""
        x = np.asarray(eigenvalues, dtype=np.float64)
        if self.kind == "linear":
            return x
        return np.arcsinh(x / (2 * self.linthresh)) / _LN10

    def eigenvalue(self, positions: ArrayLike) -> Floats:
        """The inverse of ``position``."""
        t = np.asarray(positions, dtype=np.float64)
        if self.kind == "linear":
            return t
        return 2 * self.linthresh * np.sinh(t * _LN10)


@dataclass(frozen=True)
class SpectralGrid:
    """``num_points`` G >= 2 equally spaced positions from ``low`` to ``high`` on ``axis``.

    Raises:
        ValueError: for fewer points, or ``low`` >= ``high``.
    """

    axis: Axis
    low: float
    high: float
    num_points: int

    def __post_init__(self) -> None:
        if self.num_points < 2 or not self.low < self.high:
            given = f"{self.num_points} points from {self.low} to {self.high}"
            raise ValueError(f"grid has {given}; at least 2 points and low < high are needed")

    @property
    def spacing(self) -> float:
        """Distance of neighbouring points."""
        return (self.high - self.low) / (self.num_points - 1)

    @property
    def points(self) -> Floats:
        """(G,) positions on the axis."""
        return np.linspace(self.low, self.high, self.num_points)


@registered
@dataclass(frozen=True, eq=False)
class SpectralDensity(Drawable):
    """Densities per unit of the axis.

    Over the whole axis each integrates to 1; what lies beyond the grid is reported, and nothing is
    renormalised.
    """

    names: tuple[str, ...]  # (B,)
    grid: Floats  # (G,) positions on the axis
    eigenvalues: Floats  # (G,) the same points as eigenvalues
    values: Floats  # (B, G) density per unit of the axis
    axis: Axis
    width: float  # standard deviation of the kernel, in the axis' unit
    lost_mass: Floats  # (B,) mass of the density beyond the ends of the grid
    # (B,) sum of values times spacing; not 1 - lost_mass on a grid too coarse for the kernel
    grid_mass: Floats


def symlog_axis(
    quadratures: Iterable[Quadrature],
    linear_fraction: float = LINEAR_FRACTION,
) -> Axis:
    """The symlog axis common to ``quadratures``.

    c is ``linear_fraction`` of their largest |node|; 1 if all are zero.

    Raises:
        ValueError: for a ``linear_fraction`` that is not between 0 and 1.
    """
    if not 0 < linear_fraction < 1:
        advice = f"choose it between 0 and 1, such as {LINEAR_FRACTION}"
        raise ValueError(f"linear_fraction is {linear_fraction}; {advice}")
    largest = max(float(np.abs(quadrature.nodes).max()) for quadrature in quadratures)
    return Axis("symlog", linear_fraction * largest or 1.0)


def unresolved_below(quadrature: Quadrature) -> float:
    """The size below which Ritz values say no more than that eigenvalues are small; 0 if none is.

    A node whose residual bound exceeds its size may stand for an eigenvalue of either sign: it has
    no logarithm. Such nodes and their bounds reach up to here.
    """
    nodes, _ = quadrature.pooled
    sizes = np.abs(nodes)
    bounds = quadrature.pooled_residuals
    return float(np.max(sizes + bounds, where=bounds > sizes, initial=0.0))


def spanning_grid(
    quadratures: Iterable[Quadrature],
    axis: Axis,
    num_points: int,
    margin: float,
) -> SpectralGrid:
    """A grid that reaches ``margin`` (in the axis' unit) beyond the lowest and the highest node.

    Raises:
        ValueError: for ``num_points`` < 2.
    """
    low, high = axis.position(_extremes(quadratures)).tolist()
    return SpectralGrid(axis, low - margin, high + margin, num_points)


def spectral_density(
    spectra: Mapping[str, Quadrature] | Quadrature,
    *,
    grid: str | SpectralGrid = "linear",
    num_points: int | None = None,
    width: float | None = None,
    linear_fraction: float = LINEAR_FRACTION,
    spread_unresolved: bool = False,
) -> SpectralDensity:
    """Densities of one or many operators on a common grid.

    Args:
        spectra: blocks by name (B of them), or one Quadrature (B = 1, named "").
        grid: "linear", "symlog", or a SpectralGrid. The first two reach 5 widths beyond the extreme
            nodes.
        num_points: G; 2,000 unless given. A SpectralGrid has its own.
        width: the kernel's standard deviation, in the axis' unit: unless given, 0.2 decades on a
            symlog axis, 1/200 of the range of the nodes on a linear one (the literature's, arXiv
            2402.16788, is sqrt(1e-5) eigenvalue units whatever the spectrum).
        linear_fraction: see :func:`symlog_axis`.
        spread_unresolved: nodes whose residual bound exceeds a kernel's width are spread over it,
            for pictures without lobes that are artefacts; otherwise they count as points.
    Raises:
        ValueError: for an argument out of range, or no operator.
    """
    blocks = {"": spectra} if isinstance(spectra, Quadrature) else dict(spectra)
    if not blocks:
        raise ValueError("spectra is empty; pass at least one Quadrature")
    if isinstance(grid, SpectralGrid):
        if width is None or num_points is not None:
            given = f"width is {width} and num_points {num_points}"
            raise ValueError(f"{given}; a SpectralGrid brings its points and needs a width")
        return _densities(blocks, grid, _checked(width), spread_unresolved)
    quadratures = blocks.values()
    axis = _axis(grid, quadratures, linear_fraction)
    width = _checked(_default_width(axis, quadratures) if width is None else width)
    if num_points is None:
        num_points = NUM_POINTS
    spanning = spanning_grid(quadratures, axis, num_points, 5 * width)
    return _densities(blocks, spanning, width, spread_unresolved)


def _axis(kind: str, quadratures: Iterable[Quadrature], linear_fraction: float) -> Axis:
    if kind == "linear":
        return Axis("linear")
    if kind == "symlog":
        return symlog_axis(quadratures, linear_fraction)
    raise ValueError(f"grid is {kind!r}; allowed are 'linear', 'symlog' or a SpectralGrid")


def _default_width(axis: Axis, quadratures: Iterable[Quadrature]) -> float:
    if axis.kind == "symlog":
        return LOG_WIDTH
    extremes = _extremes(quadratures)
    largest = float(np.abs(extremes).max())
    spread = float(np.ptp(extremes))
    if spread <= _ROUNDING * largest:
        spread = largest  # all are equal: any width shows it that is no rounding beside them
    return spread / _WIDTHS_IN_RANGE or 1.0


def _checked(width: float) -> float:
    if not 0 < width < np.inf:
        raise ValueError(f"width is {width}; a positive standard deviation of the kernel is needed")
    return width


def _densities(
    blocks: Mapping[str, Quadrature],
    grid: SpectralGrid,
    width: float,
    spread_unresolved: bool,
) -> SpectralDensity:
    rows = []
    lost_mass = []
    for quadrature in blocks.values():
        nodes, weights = quadrature.pooled
        is_point = np.full(len(nodes), True)
        if spread_unresolved and np.ptp(nodes) > 0:
            is_point = _uncertainties(quadrature, grid.axis) <= width
        positions = grid.axis.position(nodes[is_point])
        points = kernel_sum(grid, positions, weights[is_point], width)[0]
        spread = _spread(grid, quadrature, ~is_point, width)
        rows.append(points / (width * np.sqrt(2 * np.pi)) + spread)
        below = ndtr((grid.low - positions) / width)
        above = ndtr((positions - grid.high) / width)
        spread_beyond = weights[~is_point].sum() - spread.sum() * grid.spacing
        lost_mass.append(weights[is_point] @ (below + above) + spread_beyond)
    values = np.stack(rows)
    return SpectralDensity(
        names=tuple(blocks),
        grid=grid.points,
        eigenvalues=grid.axis.eigenvalue(grid.points),
        values=values,
        axis=grid.axis,
        width=width,
        lost_mass=np.array(lost_mass),
        grid_mass=values.sum(axis=1) * grid.spacing,
    )


def _uncertainties(quadrature: Quadrature, axis: Axis) -> Floats:
    """How far each pooled node's residual bound reaches on the axis, on the side where further."""
    nodes, _ = quadrature.pooled
    residuals = quadrature.pooled_residuals
    middle = axis.position(nodes)
    right = axis.position(nodes + residuals) - middle
    left = middle - axis.position(nodes - residuals)
    return np.maximum(left, right)


def _spread(
    grid: SpectralGrid,
    quadrature: Quadrature,
    is_spread: NDArray[np.bool_],
    width: float,
) -> Floats:
    """(G,) density of the pooled nodes in ``is_spread``, each as wide as its residual bound."""
    if not is_spread.any():
        return np.zeros(grid.num_points)
    nodes, weights = quadrature.pooled
    middles = nodes[is_spread][:, None]
    reach = np.minimum(quadrature.pooled_residuals[is_spread], np.ptp(nodes))
    deviations = SPREAD * reach[:, None]

    def below(eigenvalues: Floats) -> Floats:
        # no eigenvalue is known to lie beyond the nodes
        bounded = np.clip(eigenvalues, nodes.min(), nodes.max())
        return ndtr((bounded - middles) / deviations)

    # what lies beyond the grid reaches into it by the kernel
    margin = math.ceil(KERNEL_REACH * width / grid.spacing)
    cells = grid.num_points + 2 * margin
    edges = grid.low + grid.spacing * (np.arange(cells + 1) - margin - 0.5)
    whole = np.diff(below(np.array([-np.inf, np.inf])), axis=1)
    shares = np.diff(below(grid.axis.eigenvalue(edges)), axis=1) / whole
    mass = weights[is_spread] @ shares
    smeared = gaussian_filter1d(
        mass / grid.spacing,
        width / grid.spacing,
        mode="constant",
        truncate=KERNEL_REACH,
    )
    return smeared[margin:-margin]


def kernel_sum(
    grid: SpectralGrid,
    positions: Floats,
    weights: Floats,
    width: float,
    depth: float | None = None,
) -> tuple[Floats, float]:
    """(G,) values of sum_i w_i exp(-(t - t_i)^2 / 2 width^2).

    Each node is evaluated at the grid points where its term matters, which makes the cost local.

    Args:
        depth: None takes all terms that float64 can represent (38 widths). A number takes terms
            down to exp(-depth) of the largest.
    Returns:
        (values, shift), the sum being values * exp(shift). ``shift`` is 0 unless ``depth`` is
        given; then it makes the largest term about 1 (log-sum-exp), so that the result is right up
        to a factor also where every term underflows.
    """
    spacing = grid.spacing
    points = grid.points
    logs = np.log(weights)
    nearest = _clipped(np.rint((positions - grid.low) / spacing), grid.num_points - 1)
    largest_terms = logs - ((points[nearest] - positions) / width) ** 2 / 2
    shift = 0.0
    nearest_too = depth is not None
    if depth is None:
        depth = _UNDERFLOW
    else:
        shift = float(largest_terms.max())
    reach = width * np.sqrt(2 * np.maximum(depth + logs - shift, 0.0))
    first = _clipped(np.ceil((positions - reach - grid.low) / spacing), grid.num_points)
    last = _clipped(np.floor((positions + reach - grid.low) / spacing) + 1, grid.num_points)
    if nearest_too:  # rounding may have put it out of reach where the kernel is narrow
        first = np.minimum(first, nearest)
        last = np.maximum(last, nearest + 1)
    values = np.zeros(grid.num_points)
    columns = [column.tolist() for column in (positions, logs - shift, first, last)]
    for position, log_weight, start, stop in zip(*columns, strict=True):
        if start < stop:
            z = (points[start:stop] - position) / width
            values[start:stop] += np.exp(log_weight - z * z / 2)
    return values, shift


def _clipped(indices: Floats, last: int) -> NDArray[np.int_]:
    return np.clip(indices, 0, last).astype(int)


def _extremes(quadratures: Iterable[Quadrature]) -> Floats:
    """(2,) lowest and highest node of all."""
    nodes = np.concatenate([quadrature.nodes.ravel() for quadrature in quadratures])
    return np.array([nodes.min(), nodes.max()])
