"""Spectral densities: nodes and weights smeared with a Gaussian on one grid for all operators compared.

    density(t) = sum_i w_i exp(-(t - t_i)^2 / 2 s^2) / (s sqrt(2 pi)),   t_i = axis(x_i), mean over probes

Two axes. "linear": t = x, in units of the eigenvalues. "symlog", in decades: t = asinh(x / 2c) / ln 10, which is
sign(x) log10(|x| / c) for |x| >> c (to (c / x)^2 / ln 10), straight through zero for |x| << c, and smooth between. c,
``linthresh``, is a fraction of the largest |node| over all operators compared, so that scaling the loss changes
nothing. The default fraction 1e-6 is ten times float32's rounding (6e-8 to 1e-7 of the largest eigenvalue): what
rounding makes of zero stays inside the linear part and is not read as structure.

Shapes: B operators (blocks), G grid points, i runs over all nodes of all probes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Quadrature

LINEAR_FRACTION = 1e-6
LOG_WIDTH = 0.2  # decades
_LN10 = float(np.log(10))
_UNDERFLOW = 745.0  # exp(-745) is the smallest positive float64


@registered
@dataclass(frozen=True)
class Axis:
    """How eigenvalues are laid out: ``kind`` "linear" | "symlog", ``linthresh`` c > 0 for the latter (see the
    module)."""

    kind: str
    linthresh: float = float("nan")

    @property
    def unit(self) -> str:
        return "decades" if self.kind == "symlog" else "eigenvalue"

    def position(self, eigenvalues: np.ndarray) -> np.ndarray:
        """Where ``eigenvalues`` lie on the axis, elementwise."""
        x = np.asarray(eigenvalues, dtype=np.float64)
        return np.arcsinh(x / (2 * self.linthresh)) / _LN10 if self.kind == "symlog" else x

    def eigenvalue(self, positions: np.ndarray) -> np.ndarray:
        """The inverse of ``position``."""
        t = np.asarray(positions, dtype=np.float64)
        return 2 * self.linthresh * np.sinh(t * _LN10) if self.kind == "symlog" else t


@dataclass(frozen=True)
class SpectralGrid:
    """``num_points`` G >= 2 equally spaced positions from ``low`` to ``high`` on ``axis``."""

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
        return (self.high - self.low) / (self.num_points - 1)

    @property
    def points(self) -> np.ndarray:
        """(G,) positions on the axis."""
        return np.linspace(self.low, self.high, self.num_points)


@registered
@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Densities per unit of the axis; over the whole axis each integrates to 1, nothing is renormalised."""

    names: tuple[str, ...]  # (B,)
    grid: np.ndarray  # (G,) positions on the axis
    eigenvalues: np.ndarray  # (G,) the same points as eigenvalues
    values: np.ndarray  # (B, G) density per unit of the axis
    axis: Axis
    width: float  # standard deviation of the kernel, in the axis' unit
    lost_mass: np.ndarray  # (B,) mass of the density beyond the ends of the grid
    grid_mass: (
        np.ndarray
    )  # (B,) sum of values times spacing; not 1 - lost_mass on a grid too coarse for the kernel


def symlog_axis(
    quadratures: Iterable[Quadrature], linear_fraction: float = LINEAR_FRACTION
) -> Axis:
    """The symlog axis common to ``quadratures``: c = ``linear_fraction`` of their largest |node| (1 if all are
    zero)."""
    if not 0 < linear_fraction < 1:
        raise ValueError(
            f"linear_fraction is {linear_fraction}; choose it between 0 and 1, such as {LINEAR_FRACTION}"
        )
    largest = max(float(np.abs(quadrature.nodes).max()) for quadrature in quadratures)
    return Axis("symlog", linear_fraction * largest or 1.0)


def spanning_grid(
    quadratures: Iterable[Quadrature], axis: Axis, num_points: int, margin: float
) -> SpectralGrid:
    """A grid from ``margin`` (in the axis' unit) below the lowest node to as much above the highest."""
    low, high = axis.position(_extremes(quadratures)).tolist()
    return SpectralGrid(axis, low - margin, high + margin, num_points)


def spectral_density(
    spectra: Mapping[str, Quadrature] | Quadrature,
    *,
    grid: str | SpectralGrid = "linear",
    num_points: int | None = None,
    width: float | None = None,
    linear_fraction: float = LINEAR_FRACTION,
) -> SpectralDensity:
    """Densities of one or many operators on a common grid.

    Args:
        spectra: blocks by name (B of them), or one Quadrature (B = 1, named "").
        grid: "linear", "symlog", or a SpectralGrid. The first two reach 5 widths beyond the extreme nodes.
        num_points: G; 2,000 unless given. Taken from a SpectralGrid.
        width: the kernel's standard deviation, in the axis' unit: 0.2 decades on a symlog axis, 1/200 of the range of
            the nodes on a linear one unless given (the literature's, arXiv 2402.16788, is sqrt(1e-5) eigenvalue units
            whatever the spectrum).
        linear_fraction: see :func:`symlog_axis`.
    Raises:
        ValueError: for an argument out of range, or no operator.
    """
    blocks = {"": spectra} if isinstance(spectra, Quadrature) else dict(spectra)
    if not blocks:
        raise ValueError("spectra is empty; pass at least one Quadrature")
    if isinstance(grid, SpectralGrid):
        axis = grid.axis
        if width is None or num_points is not None:
            given = f"width is {width} and num_points {num_points}"
            raise ValueError(f"{given}; a SpectralGrid brings its points and needs a width")
    elif grid in ("linear", "symlog"):
        axis = symlog_axis(blocks.values(), linear_fraction) if grid == "symlog" else Axis("linear")
    else:
        raise ValueError(f"grid is {grid!r}; allowed are 'linear', 'symlog' or a SpectralGrid")
    if width is None:  # where all eigenvalues are equal, any width shows it
        width = (
            LOG_WIDTH
            if grid == "symlog"
            else float(np.ptp(_extremes(blocks.values()))) / 200 or 1.0
        )
    if not 0 < width < np.inf:
        raise ValueError(f"width is {width}; a positive standard deviation of the kernel is needed")
    if not isinstance(grid, SpectralGrid):
        grid = spanning_grid(
            blocks.values(), axis, 2_000 if num_points is None else num_points, 5 * width
        )
    placed = [
        (axis.position(nodes), weights) for nodes, weights in (q.pooled for q in blocks.values())
    ]
    values = np.stack([kernel_sum(grid, t, w, width)[0] for t, w in placed]) / (
        width * np.sqrt(2 * np.pi)
    )
    lost = np.array(
        [w @ (ndtr((grid.low - t) / width) + ndtr((t - grid.high) / width)) for t, w in placed]
    )
    points = grid.points
    mass = values.sum(axis=1) * grid.spacing
    return SpectralDensity(
        tuple(blocks), points, axis.eigenvalue(points), values, axis, width, lost, mass
    )


def kernel_sum(
    grid: SpectralGrid,
    positions: np.ndarray,
    weights: np.ndarray,
    width: float,
    depth: float | None = None,
) -> tuple[np.ndarray, float]:
    """(G,) values of sum_i w_i exp(-(t - t_i)^2 / 2 width^2), as (values, shift) with sum = values * exp(shift).

    Each node is evaluated at the grid points where its term matters, which makes the cost local. ``depth`` None: all
    terms that float64 can represent (38 widths), shift 0. A number: terms down to exp(-depth) of the largest, which
    becomes about 1 by the choice of shift (log-sum-exp), so the result is right up to a factor also where every term
    underflows.
    """
    spacing, points = grid.spacing, grid.points
    logs = np.log(weights)
    nearest = np.clip(np.rint((positions - grid.low) / spacing), 0, grid.num_points - 1).astype(int)
    peaks = logs - ((points[nearest] - positions) / width) ** 2 / 2  # each node's largest term
    shift = 0.0 if depth is None else float(peaks.max())
    reach = width * np.sqrt(
        2 * np.maximum((_UNDERFLOW if depth is None else depth) + logs - shift, 0.0)
    )
    first = np.clip(np.ceil((positions - reach - grid.low) / spacing), 0, grid.num_points).astype(
        int
    )
    last = np.clip(
        np.floor((positions + reach - grid.low) / spacing) + 1, 0, grid.num_points
    ).astype(int)
    values = np.zeros(grid.num_points)
    for t, log, a, b in zip(
        positions.tolist(), (logs - shift).tolist(), first.tolist(), last.tolist(), strict=True
    ):
        if a < b:
            z = (points[a:b] - t) / width
            values[a:b] += np.exp(log - z * z / 2)
    return values, shift


def _extremes(quadratures: Iterable[Quadrature]) -> np.ndarray:
    """(2,) lowest and highest node of all."""
    nodes = np.concatenate([quadrature.nodes.ravel() for quadrature in quadratures])
    return np.array([nodes.min(), nodes.max()])
