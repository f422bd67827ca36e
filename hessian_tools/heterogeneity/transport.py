"""1-Wasserstein distances between the spectra of blocks, without the floor that few probes leave.

A block's distribution gives each eigenvalue the mass |x|^p over the sum of them: p = 0 counts
eigenvalues, p = 2 weighs them by their squared curvature. The distance of two blocks is the
integral of |F_b - F_c| over an axis, F the cumulative distributions.

**Floor.** |F_b - F_c| of two estimates is positive where the truth is zero. With d their difference
at a point and s its standard deviation (which the law of the probes tells,
:mod:`hessian_tools.heterogeneity.estimate`), the integrand here is
    |d| - s h(d / s),   h(z) = sqrt(2 / pi) sqrt(1 + 2 a) exp(-a z^2),
whose mean is 0 for a normal d of mean 0, and |d| where d is many s. a = 0.7 was chosen on planted
spectra (docs/evidence/coverage.md): a larger one leaves more noise where blocks are alike, a
smaller one takes off too much where they differ by about s.

Shapes: B blocks, N nodes of all blocks together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hessian_tools.heterogeneity.estimate import Sample, probe_variance
from hessian_tools.heterogeneity.measure import Sampled, Workspace
from hessian_tools.spectra.gauss import all_truncated
from hessian_tools.spectra.quadrature import Floats, Quadrature

Position = Callable[[Floats], Floats]  # from eigenvalues to the axis
_SHARPNESS = 0.7  # a
_HEIGHT = float(np.sqrt(2 / np.pi) * np.sqrt(1 + 2 * _SHARPNESS))
_SLOPE = 0.5  # share of the floor's own slope in the influence, see :func:`_without_floor`


class Distribution:
    """One block's mass over the axis.

    Attributes, one entry a pooled node with mass, in ascending order of ``positions``: ``masses``,
    which sum to 1, ``gains``, mass over weight, and ``chosen``, its index among the pooled nodes.
    """

    def __init__(self, quadrature: Quadrature, position: Position, power: int) -> None:
        nodes, weights = quadrature.pooled
        self.quadrature = quadrature
        largest = float(np.abs(nodes).max()) or 1.0  # squares of 1e-200 are beyond float64
        powers = np.abs(nodes / largest) ** power
        self.chosen = np.flatnonzero(weights * powers > 0)
        positions = position(nodes[self.chosen])
        order = np.argsort(positions, kind="stable")
        self.chosen = self.chosen[order]
        self.positions = positions[order]
        self.gains = powers[self.chosen] / (weights @ powers)
        self.masses = weights[self.chosen] * self.gains

    def cumulative(self, points: Floats) -> tuple[Floats, Floats]:
        """Mass up to each of ``points``, and its variance from the probes."""
        rank = np.searchsorted(self.positions, points, side="right")
        reached = _from_zero(self.masses)[rank]
        if self.quadrature.status == "exact":
            return reached, np.zeros_like(reached)
        below = _from_zero(self.masses * self.gains)
        pieces = self.quadrature.num_probes * (self.quadrature.size / 2 + 1)
        variance = below[rank] * (1 - 2 * reached) + below[-1] * reached**2
        return reached, np.maximum(variance, 0.0) / pieces

    def influence(self, potential: Floats) -> Floats:
        """That of a mean of ``potential`` (one value a mass) over the masses, by pooled node."""
        values = np.zeros(len(self.quadrature.pooled[0]))
        # a node without mass still counts in what the masses are divided by, with gain 0
        values[self.chosen] = self.gains * (potential - self.masses @ potential)
        return values


def _from_zero(masses: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(masses)])


def transport(blocks: Sequence[Quadrature], position: Position, power: int) -> Sample:
    """The mean distance over pairs of two blocks or more, in the axis' unit."""
    found = [Distribution(block, position, power) for block in blocks]
    points = np.sort(np.concatenate([one.positions for one in found]))
    gaps = np.diff(points)
    curves = [one.cumulative(points[:-1]) for one in found]
    reached = np.stack([curve for curve, _ in curves])
    variances = np.stack([variance for _, variance in curves])

    num_pairs = len(blocks) * (len(blocks) - 1) / 2
    matrix = np.zeros((len(blocks), len(blocks)))
    potentials = []
    for row in range(len(blocks)):
        deviations = np.sqrt(variances[row] + variances)
        heights, slopes = _without_floor(reached[row] - reached, deviations)
        matrix[row] = heights @ gaps
        matrix[row, row] = 0.0
        # mass at a point raises F from there on
        slope = slopes.sum(axis=0) * gaps / num_pairs
        potentials.append(_from_zero(slope[::-1])[::-1])

    def potential(index: int, positions: Floats) -> Floats:
        return np.interp(positions, points, potentials[index])

    def effect(index: int, quadrature: Quadrature) -> float:
        before = found[index]
        after = Distribution(quadrature, position, power)
        gained = after.masses @ potential(index, after.positions)
        return float(gained - before.masses @ potential(index, before.positions))

    terms = [
        probe_variance(one.quadrature, one.influence(potential(index, one.positions)))
        for index, one in enumerate(found)
    ]
    above = np.triu_indices(len(blocks), 1)
    return Sample(
        values=matrix,
        mean=float(matrix[above].mean()),
        variances=np.array([variance for variance, _ in terms]),
        freedoms=np.array([freedom for _, freedom in terms]),
        effect=effect,
    )


def _without_floor(differences: Floats, deviations: Floats) -> tuple[Floats, Floats]:
    """The integrand of the distance and its derivative, elementwise (see the module).

    Where blocks are alike the derivative of the term that is taken off adds to the error; half of
    it gives intervals that cover.
    """
    signs = np.sign(differences)
    z = np.divide(
        differences,
        deviations,
        out=np.full(differences.shape, np.inf),
        where=deviations > 0,
    )
    floor = _HEIGHT * np.exp(-_SHARPNESS * z**2)
    bend = np.where(np.isfinite(z), 2 * _SHARPNESS * z, 0.0) * floor
    return np.abs(differences) - deviations * floor, signs + _SLOPE * bend


@dataclass(frozen=True)
class Curvature(Sampled):
    """1-Wasserstein distance in decades between the blocks' distributions of squared curvature.

    A block's distribution has mass proportional to (weight) x (eigenvalue)^2 at log10 |eigenvalue|:
    where in size the Frobenius norm of the block lies. The unresolved bulk near zero has next to
    none of it, so that a few Lanczos steps suffice.

    The distributions are means of those that m and m - 1 steps give. Of eigenvalues on both sides
    of zero, Gauss quadratures of odd and of even order err in opposite directions (one has a node
    near zero, the other has not), as Gauss and anti-Gauss rules do (Laurie 1996). The average moves
    less over the last steps than it is off, which ``step_doubt`` makes up for
    (docs/evidence/coverage.md).

    Signs do not enter: x and -x are the same curvature. What an optimizer's step must be small for
    is the size of an eigenvalue, whichever its sign, and a second-moment estimate sees squares
    alone. Two blocks of which one is the other's negative therefore read 0.
    """

    name: str = "curvature"
    label: str = "curvature"
    title: str = "Distance of squared curvature"
    unit: str = "decades"
    description: str = (
        "1-Wasserstein distance of the distributions of squared curvature over log10 |eigenvalue|"
    )
    scale_free: bool = True
    drawn: bool = True
    first_steps: int = 4
    step_doubt: float = 2.0

    def sample(self, workspace: Workspace) -> Sample:
        return among(workspace, _averaged_transport)


def _averaged_transport(blocks: Sequence[Quadrature]) -> Sample:
    found = transport(_averaged(blocks), _decades, 2)

    def effect(index: int, quadrature: Quadrature) -> float:
        return found.effect(index, _averaged([quadrature])[0])

    return replace(found, effect=effect)


def _averaged(blocks: Sequence[Quadrature]) -> list[Quadrature]:
    """Each block's spectrum as the mean of what all its steps and all but the last give."""
    (shorter,) = all_truncated(blocks, [lambda steps: max(steps - 1, 1)])
    return [_mean(block, less) for block, less in zip(blocks, shorter, strict=True)]


def _mean(one: Quadrature, other: Quadrature) -> Quadrature:
    if one.status == "exact":
        return one
    return replace(
        one,
        nodes=np.concatenate([one.nodes, other.nodes], axis=1),
        weights=np.concatenate([one.weights, other.weights], axis=1) / 2,
        residuals=np.concatenate([one.residuals, other.residuals], axis=1),
    )


def shape_distance(one: Quadrature, other: Quadrature) -> float:
    """The distance of curvatures of two blocks, each divided by its own scale.

    nan where a scale is unknown, as of one step whose residual is.
    """
    scales = [block.rms.value for block in (one, other)]
    if not np.all(np.isfinite(scales)):
        return float("nan")
    pairs = zip((one, other), scales, strict=True)
    shapes = [block.scaled(1 / scale) for block, scale in pairs]
    return _averaged_transport(shapes).mean


def _decades(eigenvalues: Floats) -> Floats:
    return np.log10(np.abs(eigenvalues))


def among(workspace: Workspace, sampled: Callable[[Sequence[Quadrature]], Sample]) -> Sample:
    """What ``sampled`` finds among the blocks that are not zero; the others have nan and no effect.

    The mean of fewer than two such blocks is nan.
    """
    size = len(workspace.blocks)
    kept = np.flatnonzero(~workspace.is_zero)
    values = np.full((size, size), np.nan)
    variances = np.zeros(size)
    freedoms = np.full(size, np.inf)
    if len(kept) < 2:
        return Sample(values, float("nan"), variances, freedoms, lambda index, quadrature: 0.0)
    found = sampled([workspace.blocks[index] for index in kept])
    values[np.ix_(kept, kept)] = found.values
    variances[kept] = found.variances
    freedoms[kept] = found.freedoms

    def effect(index: int, quadrature: Quadrature) -> float:
        if workspace.is_zero[index]:
            return 0.0
        return found.effect(int(np.searchsorted(kept, index)), quadrature)

    return Sample(values, found.mean, variances, freedoms, effect)
