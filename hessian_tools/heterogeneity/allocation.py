"""Which blocks of an adaptive run get more Lanczos steps, more probes, or their exact spectrum.

A block grows by what it contributes to the uncertainty. Steps (half as many again) go first, to the
blocks that change the mean most, until the rest change it by less than 0.3 of the tolerance;
then probes, at most doubled in a round: to the blocks of the largest bias likewise, and by Neyman's
allocation, k_b ~ sqrt(V_b / m_b), with V_b / k_b the block's part of SE^2 and m_b the products that
a probe costs (Neyman 1934; Cochran, Sampling Techniques, 5.5). A block that would take as many
further products as it has rows is computed exactly, and then contributes nothing.

Shapes: B blocks, k_b probes, m_b steps, n_b rows of block b.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessian_tools.heterogeneity.uncertainty import Shares, Uncertainty
from hessian_tools.spectra.growing import Growth
from hessian_tools.spectra.quadrature import Floats, Quadrature

Integers = NDArray[np.int_]
Mask = NDArray[np.bool_]

_STEPS = 0.6  # of the tolerance, above which the change over the last steps is worked on
_BIAS = 0.25  # of the tolerance, above which the square of the bias is
_REST = 0.5  # of these, what the blocks that are left alone may contribute


@dataclass(frozen=True)
class Limits:
    """How far a block may grow."""

    max_matvecs: int  # products for one block, unless it is exact
    max_steps: int
    exact: bool  # whether blocks of at most max_matvecs rows may be computed exactly


class Standing:
    """Where B blocks stand, and how each of them can still grow."""

    def __init__(self, blocks: Iterable[Quadrature], limits: Limits) -> None:
        blocks = list(blocks)
        self.limits = limits
        self.probes: Integers = np.array([block.nodes.shape[0] for block in blocks])
        self.steps: Integers = np.array([block.nodes.shape[1] for block in blocks])
        self.sizes: Integers = np.array([block.size for block in blocks])
        unfinished = np.array([block.status != "exact" for block in blocks])
        # all probes have met invariant subspaces: their nodes are eigenvalues
        invariant = np.array([block.steps.max() < block.nodes.shape[1] for block in blocks])
        shortest = np.minimum(limits.max_steps, self.sizes)
        self.most_steps: Integers = np.minimum(shortest, limits.max_matvecs // self.probes)
        self.can_lengthen: Mask = unfinished & ~invariant & (self.steps < self.most_steps)
        one_more = self.steps * (self.probes + 1)
        self.can_widen: Mask = unfinished & (one_more <= limits.max_matvecs)
        self.can_be_exact: Mask = unfinished & limits.exact & (self.sizes <= limits.max_matvecs)

    @property
    def longer(self) -> Integers:
        """(B,) half as many steps again, within the limits."""
        return np.minimum(-(-3 * self.steps // 2), self.most_steps)


def next_growth(
    blocks: Mapping[str, Quadrature],
    shares: Mapping[str, Shares],
    tolerance: float,
    limits: Limits,
) -> dict[str, Growth]:
    """The blocks that shall grow, so that every reading in ``shares`` comes to the tolerance.

    Empty when all readings are there, or every block that matters is at a limit.
    """
    # "not <=": what is nan, for want of probes, is not met
    unmet = [share for share in shares.values() if not share.uncertainty.total <= tolerance]
    if not unmet:
        return {}
    standing = Standing(blocks.values(), limits)
    steps = standing.steps.copy()
    wanted = standing.probes.astype(np.float64)
    for share in unmet:
        too_short = _need_steps(share, standing, tolerance)
        if len(too_short):
            # probes of too few steps say nothing about those of more
            steps[too_short] = standing.longer[too_short]
        else:
            wanted = np.maximum(wanted, _wanted_probes(share, standing, tolerance))

    exactly = _cheaper_exactly(standing, wanted, steps)
    affordable = limits.max_matvecs // steps
    # variances from few probes are rough: look again before there are more than twice as many
    most = np.minimum(2 * standing.probes, affordable)
    probes = np.minimum(np.ceil(wanted), most).astype(int)
    widened = standing.can_widen & (probes > standing.probes)
    probes = np.maximum(probes, standing.probes)
    grows = exactly | widened | (steps > standing.steps)
    names = list(blocks)
    return {
        names[b]: Growth(exact=True) if exactly[b] else Growth(int(probes[b]), int(steps[b]))
        for b in np.flatnonzero(grows)
    }


def _need_steps(share: Shares, standing: Standing, tolerance: float) -> Integers:
    """The blocks that shall get more steps for this reading."""
    if not _steps_matter(share.uncertainty, tolerance):
        return np.array([], dtype=int)
    changes = np.abs(share.steps)
    # blocks that change the mean little each, but much together, must grow as well
    rest = min(_REST * _STEPS * tolerance, changes.sum() / 2)
    return _largest(changes, standing.can_lengthen, rest)


def _steps_matter(uncertainty: Uncertainty, tolerance: float) -> bool:
    return uncertainty.steps > _STEPS * tolerance


def _wanted_probes(share: Shares, standing: Standing, tolerance: float) -> Floats:
    """(B,) how many probes each block should have for this reading, without regard to limits."""
    uncertainty = share.uncertainty
    wanted = standing.probes.astype(np.float64)
    if uncertainty.bias**2 > _BIAS * tolerance:
        can_help = standing.can_widen | standing.can_be_exact
        biased = _largest(np.abs(share.biases), can_help, np.sqrt(_REST * _BIAS * tolerance))
        wanted[biased] = 2 * standing.probes[biased]
    # what steps and bias leave; steps that no block can add are not held against the probes
    steps = 0.0 if _steps_matter(uncertainty, tolerance) else uncertainty.steps
    left = max(tolerance - uncertainty.bias**2, 0.0) ** 2 - steps**2
    room = max(float(np.sqrt(max(left, 0.0))), tolerance / 2)
    if uncertainty.doubt * uncertainty.standard_error > room:
        wanted = np.maximum(wanted, _neyman(share, standing, room))
    return wanted


def _neyman(share: Shares, standing: Standing, room: float) -> Floats:
    """(B,) probes at which the doubted standard error is ``room``, for the fewest products."""
    deviations = np.sqrt(share.variances * standing.probes)
    costs = np.sqrt(standing.steps)
    return deviations / costs * (deviations @ costs) * (share.uncertainty.doubt / room) ** 2


def _cheaper_exactly(standing: Standing, wanted: Floats, steps: Integers) -> Mask:
    """(B,) blocks whose growth would cost as many products as they have rows, or exceed a limit."""
    products = wanted * steps
    affordable = np.minimum(products, standing.limits.max_matvecs)
    spent = standing.probes * standing.steps
    no_dearer = affordable - spent >= standing.sizes
    return standing.can_be_exact & (no_dearer | (products > standing.limits.max_matvecs))


def _largest(values: Floats, allowed: Mask, rest: float) -> Integers:
    """The fewest of the ``allowed`` entries whose others sum to at most ``rest``."""
    candidates = np.flatnonzero(allowed & (values > 0))
    ascending = candidates[np.argsort(values[candidates], kind="stable")]
    return ascending[np.cumsum(values[ascending]) > rest]
