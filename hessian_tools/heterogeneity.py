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
- "log": JS of densities over the symlog axis of :mod:`hessian_tools.density`, kernel width in decades.
- "wasserstein": the 1-Wasserstein distance on that axis, in decades, exactly from nodes and weights, without a kernel.
The last two and the scale spread do not change when the loss is multiplied by a constant.

Standard errors: jackknife over probes. Probe i is left out of all blocks at once (exact blocks stay), everything, grids
and axis included, is computed again, and SE^2 = (k - 1) / k sum_i (theta_i - mean)^2. 0 if all blocks are exact, nan
with one probe. Few probes also make spectra look more different than they are, by O(1/k): the same replicates estimate
that bias (Quenouille 1956), told beside the error and not subtracted. What too few Lanczos steps do is in neither.

Shapes: B blocks, G grid points, k probes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.distance import pdist, squareform

from hessian_tools.density import LINEAR_FRACTION, LOG_WIDTH, Axis, SpectralGrid, kernel_sum, spanning_grid, symlog_axis
from hessian_tools.quadrature import Quadrature
from hessian_tools.verdict import SCALE_FREE_CASES, Contrast, Verdict, decide

_UNITS_AND_WORDS = {
    "bounded": ("nats", "JS divergence of densities with an absolute kernel width, at most ln 2"),
    "unnormalised": ("nats / dx", "the literature's JS0: bounded divided by the grid's spacing dx"),
    "log": ("nats", "JS divergence of densities over a symmetric-log eigenvalue axis, at most ln 2"),
    "wasserstein": ("decades", "1-Wasserstein distance of the spectra over a symmetric-log eigenvalue axis"),
}
READINGS = tuple(_UNITS_AND_WORDS)
_DEPTH = 60.0  # terms below exp(-60) of a density's largest are left out: below 1e-20 of any JS
_NEGLIGIBLE = 1e-25  # a probability that cannot change a JS in float64
_SLAB = 1 << 20  # numbers in one temporary
_Matrices = dict[str, np.ndarray]  # by reading, each (B, B)


@dataclass(frozen=True, eq=False)
class Reading:
    """One reading of heterogeneity."""

    mean: float  # over pairs of blocks
    standard_error: float
    matrix: np.ndarray  # (B, B) symmetric, zero diagonal
    unit: str
    description: str
    bias: float = float("nan")  # of ``mean`` from finitely many probes, the jackknife's estimate; not subtracted


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

    @property
    def mean(self) -> float:
        """``value``, under the name that a Reading has for it."""
        return self.value


@dataclass(frozen=True, eq=False)
class JSHeterogeneity:
    """All readings of one set of block spectra; ``js0``, ``standard_error``, ``matrix`` are the literature's."""

    names: tuple[str, ...]  # (B,)
    readings: dict[str, Reading]
    scale_spread: ScaleSpread
    verdict: Verdict
    num_matvecs: int
    num_probes: int  # k of the jackknife; 0 when all blocks are exact
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
        spectra: BlockSpectra, or any mapping of names to Quadratures of equally many probes (exact ones aside).
        readings: which of "bounded", "unnormalised", "log", "wasserstein". Without "unnormalised" there is no ``js0``
            (KeyError) and the verdict is "undecided".
        num_points, variance, margin: of the literature's grid and kernel, in eigenvalue units.
        log_width: kernel of the "log" reading, in decades.
        linear_fraction: see :func:`hessian_tools.density.symlog_axis`.
    Raises:
        ValueError: for fewer than two blocks, an unknown reading, unequal numbers of probes, or a setting out of range.
    """
    settings = {"num_points": num_points, "variance": variance, "margin": margin, "log_width": log_width}
    settings["linear_fraction"] = linear_fraction
    _check(spectra, readings, settings)
    names, blocks = tuple(spectra), list(spectra.values())
    num_probes = max((block.num_probes for block in blocks if block.status != "exact"), default=0)
    matrices, log10_rms = _matrices(blocks, readings, settings), _log10_rms(blocks)
    means, replicates = _means(matrices, log10_rms), []
    for index in range(num_probes if num_probes > 1 else 0):
        rest = [block.without_probe(index) for block in blocks]
        replicates.append(_means(_matrices(rest, readings, settings), _log10_rms(rest)))
    jackknife = {name: _jackknife(mean, [r[name] for r in replicates], num_probes) for name, mean in means.items()}
    found = {}
    for name, matrix in matrices.items():
        error, bias = jackknife[name]
        found[name] = Reading(means[name], error, matrix, *_UNITS_AND_WORDS[name], bias)
    spread = ScaleSpread(means["scale"], jackknife["scale"][0], log10_rms)
    error, bias = jackknife.get("unnormalised", (np.nan, np.nan))
    pair = _contrast(names, blocks, matrices, log10_rms, linear_fraction)
    scale_free = {name: means[name] for name in matrices if name in SCALE_FREE_CASES}
    verdict = decide(means.get("unnormalised", np.nan), error, pair, scale_free, bias=bias)
    num_matvecs = sum(block.num_matvecs for block in blocks)
    spacing = literature_grid(blocks, num_points, margin).spacing
    linthresh = symlog_axis(blocks, linear_fraction).linthresh
    notes = tuple(_notes(names, log10_rms, num_probes, spacing, float(np.sqrt(variance))))
    return JSHeterogeneity(names, found, spread, verdict, num_matvecs, num_probes, spacing, linthresh, settings, notes)


def literature_grid(blocks: Sequence[Quadrature], num_points: int = 50_000, margin: float = 1.0) -> SpectralGrid:
    """The literature's grid, one for all ``blocks`` (see the module's docstring)."""
    low = min(float(block.nodes.min(axis=1).mean()) for block in blocks) - margin
    high = max(float(block.nodes.max(axis=1).mean()) for block in blocks) + margin
    return SpectralGrid(Axis("linear"), low, high, num_points)


def probabilities(grid: SpectralGrid, blocks: Sequence[Quadrature], width: float) -> np.ndarray:
    """Smoothed spectra as probabilities of grid points, (B, G), rows sum to 1.

    Computed in log space: where dx is much larger than the kernel no grid point may lie within reach of any node, and
    plain arithmetic would find 0 / 0. The formula's exact value puts the mass on the grid points nearest to a node,
    and so does this.
    """
    rows = np.empty((len(blocks), grid.num_points))
    for row, block in enumerate(blocks):
        nodes, weights = block.pooled
        values, _ = kernel_sum(grid, grid.axis.position(nodes), weights, width, _DEPTH)
        rows[row] = values / values.sum()
    return rows


def js_divergences(rows: np.ndarray) -> np.ndarray:
    """JS divergence in nats of all pairs of the (B, G) probability ``rows``, (B, B).

    Only points where the first of a pair has mass are visited; elsewhere the second contributes q ln(2) / 2.
    """
    num_blocks = len(rows)
    held = rows > _NEGLIGIBLE
    outside = rows @ (~held).T.astype(rows.dtype)  # (B, B): mass of the row's block where the column's has none
    order = np.argsort(held.sum(axis=1), kind="stable")
    matrix = np.zeros((num_blocks, num_blocks))
    for rank, i in enumerate(order[:-1]):
        support = np.flatnonzero(held[i])
        p = rows[i, support]
        p_entropy = p * np.log(p)
        for others in np.array_split(order[rank + 1 :], max(1, -(-len(order) * len(support) // _SLAB))):
            q = rows[np.ix_(others, support)]
            total = p + q
            terms = p_entropy + q * np.log(np.where(q > 0, q, 1.0)) - total * np.log(total / 2)
            matrix[i, others] = terms.sum(axis=1) / 2 + np.log(2) / 2 * outside[others, i]
    return matrix + matrix.T


def wasserstein_distances(blocks: Sequence[Quadrature], axis: Axis) -> np.ndarray:
    """1-Wasserstein distances of all pairs, (B, B), in the axis' unit: exact integrals of |F_p - F_q|."""
    pooled = [block.pooled for block in blocks]
    positions = axis.position(np.concatenate([nodes for nodes, _ in pooled]))
    weights = np.concatenate([w for _, w in pooled])
    owners = np.repeat(np.arange(len(blocks)), [len(w) for _, w in pooled])
    order = np.argsort(positions, kind="stable")
    gaps = np.diff(positions[order])
    owners, weights = owners[order][:-1], weights[order][:-1]
    distances, reached = np.zeros(len(blocks) * (len(blocks) - 1) // 2), np.zeros((len(blocks), 1))
    columns = max(1, 8 * _SLAB // len(blocks))
    for part in np.split(np.arange(len(gaps)), range(columns, len(gaps), columns)):
        jumps = np.zeros((len(blocks), len(part)))
        jumps[owners[part], np.arange(len(part))] = weights[part]
        cumulative = reached + np.cumsum(jumps, axis=1)
        reached = cumulative[:, -1:]
        distances += pdist(cumulative * gaps[part], "cityblock")
    return squareform(distances)


def _check(spectra: Mapping[str, Quadrature], readings: Sequence[str], settings: Mapping[str, float]) -> None:
    if len(spectra) < 2:
        raise ValueError(f"spectra holds {len(spectra)} block(s); heterogeneity compares at least two")
    if not readings or not set(readings) <= set(READINGS):
        raise ValueError(f"readings is {tuple(readings)!r}; choose at least one of {', '.join(map(repr, READINGS))}")
    counts = sorted({block.num_probes for block in spectra.values() if block.status != "exact"})
    if len(counts) > 1:
        raise ValueError(f"spectra have {counts} probes; the jackknife needs one number, from one blockwise_slq")
    for name, value in settings.items():
        if not value > 0 or not np.isfinite(value):
            raise ValueError(f"{name} is {value}; a positive finite number is needed")


def _matrices(blocks: Sequence[Quadrature], readings: Sequence[str], settings: Mapping[str, float]) -> _Matrices:
    """In the order of ``readings``."""
    found: _Matrices = {}
    if "bounded" in readings or "unnormalised" in readings:
        grid = literature_grid(blocks, int(settings["num_points"]), settings["margin"])
        found["bounded"] = js_divergences(probabilities(grid, blocks, float(np.sqrt(settings["variance"]))))
        found["unnormalised"] = found["bounded"] / grid.spacing
    axis = symlog_axis(blocks, settings["linear_fraction"])
    if "log" in readings:
        width = settings["log_width"]
        span = spanning_grid(blocks, axis, 2, 8 * width)  # 8 widths: 1e-15 of the mass is lost at most
        num_points = 2 + int((span.high - span.low) / (width / 16))  # 16 a width: the sum is the integral to rounding
        grid = SpectralGrid(axis, span.low, span.high, num_points)
        found["log"] = js_divergences(probabilities(grid, blocks, width))
    if "wasserstein" in readings:
        found["wasserstein"] = wasserstein_distances(blocks, axis)
    return {name: found[name] for name in readings}


def _log10_rms(blocks: Sequence[Quadrature]) -> np.ndarray:
    rms = np.array([block.rms.value for block in blocks])
    return np.log10(rms, out=np.full(len(rms), -np.inf), where=rms > 0)


def _means(matrices: _Matrices, log10_rms: np.ndarray) -> dict[str, float]:
    """The mean of each reading over pairs, and "scale", the spread of scales."""
    means = {name: float(matrix[np.triu_indices(len(matrix), 1)].mean()) for name, matrix in matrices.items()}
    scales = log10_rms[np.isfinite(log10_rms)]
    return means | {"scale": float(scales.std()) if len(scales) > 1 else float("nan")}


def _jackknife(mean: float, replicates: Sequence[float], num_probes: int) -> tuple[float, float]:
    """Standard error, and Quenouille's estimate of the O(1 / k) bias of ``mean``: 0 when exact, nan with one probe."""
    if num_probes < 2:
        return (float("nan"), float("nan")) if num_probes else (0.0, 0.0)
    error, bias = np.sqrt((num_probes - 1) * np.var(replicates)), (num_probes - 1) * (np.mean(replicates) - mean)
    return float(error), float(bias)


def _contrast(
    names: Sequence[str], blocks: Sequence[Quadrature], matrices: _Matrices, log10_rms: np.ndarray, fraction: float
) -> Contrast:
    """The most distant pair by the most telling reading there is ("wasserstein" does not saturate, JS does)."""
    matrix = next(matrices[name] for name in ("wasserstein", "log", "unnormalised", "bounded") if name in matrices)
    above = np.triu_indices(len(matrix), 1)
    farthest = np.transpose(above)[np.argmax(matrix[above])].tolist()
    large, small = sorted(farthest, key=lambda i: -log10_rms[i])
    if not np.isfinite(log10_rms[small]):
        factor = float("inf") if np.isfinite(log10_rms[large]) else 1.0
        return Contrast(names[large], names[small], factor, float("nan"))
    shapes = [replace(blocks[i], nodes=blocks[i].nodes / 10.0 ** log10_rms[i]) for i in (large, small)]
    shape = float(wasserstein_distances(shapes, symlog_axis(shapes, fraction))[0, 1])
    return Contrast(names[large], names[small], float(10.0 ** (log10_rms[large] - log10_rms[small])), shape)


def _notes(names: Sequence[str], log10_rms: np.ndarray, num_probes: int, spacing: float, width: float) -> Iterator[str]:
    zero = [name for name, scale in zip(names, log10_rms, strict=True) if not np.isfinite(scale)]
    if zero:
        yield f"{len(zero)} block(s) with an exactly zero Hessian are left out of the scale spread: {', '.join(zero)}"
    if num_probes == 1:
        yield "one probe: standard errors are unknown (nan); take at least two"
    if spacing > width:
        underflow = " (densities may underflow there; computed in log space)" if spacing > 2 * 38 * width else ""
        yield (
            f"the literature's grid spacing {spacing:.3g} exceeds its kernel width {width:.3g}: bounded and "
            f"unnormalised JS depend on which nodes happen to lie near a grid point{underflow}"
        )
