"""An estimate from random probes, its error, and an interval that covers 95 times in 100.

**The law of a probe.** A Gaussian vector divided by its length is uniform on the sphere, so that
its squared components in the eigenbasis are Dirichlet(1/2, ..., 1/2) distributed. For any function
f of the n eigenvalues, u'f(A)u then has the mean of f over the spectrum as its expectation, and
    Var[u'f(A)u] = Var_mu(f) / (n/2 + 1)
exactly, mu the spectrum. So k probes tell the error of each other through their *mean* spectrum: no
variance has to be taken from k numbers, and even one probe has an error. Rademacher probes have at
most this variance (2 (|F|^2 - sum F_ii^2) for a matrix F, Hutchinson 1990), and on the blocks of
networks no less (docs/evidence/coverage.md).

**A reading** is differentiated with respect to the spectrum of each block: its change, to first
order, is the mean of an *influence* over the block's nodes (Hampel 1974), to which the law applies.
Blocks have independent probes, so their variances add.

**Degrees of freedom.** The variance is itself estimated, from at most k (n/2 + 1) independent
pieces: 2 / (relative variance) degrees of freedom by its fourth moment, put together over blocks by
Satterthwaite (1946). It is large where the estimate itself is off, which makes the tails of their
ratio lighter than Student's t has them: twice the degrees of freedom cover best.

**Steps.** What finitely many Lanczos steps leave open is read from the change that the last third
of them made, or the last half, whichever is larger; fewer steps of a run cost no product. It widens
the interval. Where it exceeds both what the probes leave open and 5 % of the reading, the reading
is *not resolved*, and has no interval.

Shapes: B blocks, k probes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import norm, t

from hessian_tools.spectra.gauss import all_truncated
from hessian_tools.spectra.quadrature import Floats, Quadrature

COVERAGE = 0.95
Z = float(norm.ppf((1 + COVERAGE) / 2))
RESOLVED = 0.05  # of the reading: what the last steps may change, whatever the probes' error
LIGHT_TAILS = 2.0  # times the degrees of freedom, see the module's docstring


@dataclass(frozen=True, eq=False)
class Sample:
    """A reading of B blocks and what each block's probes leave uncertain of it.

    ``effect(b, quadrature)`` is the first-order change of the mean if block b had that quadrature.
    """

    values: Floats  # (B, B) over pairs of blocks, or (B,) over blocks
    mean: float
    variances: Floats  # (B,) of the mean, from the probes of each block
    freedoms: Floats  # (B,) degrees of freedom of each variance
    effect: Callable[[int, Quadrature], float]

    @property
    def standard_error(self) -> float:
        """Of the mean, from the probes."""
        return float(np.sqrt(self.variances.sum()))

    @property
    def quantile(self) -> float:
        """How many standard errors make an interval of COVERAGE: Student's t."""
        return quantile(self.variances, self.freedoms)

    def interval(self, change: float) -> tuple[float, float]:
        """Low and high end; ``change`` is what the steps may still make."""
        half = float(np.hypot(self.quantile * self.standard_error, change))
        return self.mean - half, self.mean + half


def quantile(variances: Floats, freedoms: Floats) -> float:
    """Student's t for a sum of independent variances of given degrees of freedom.

    Satterthwaite (1946), with LIGHT_TAILS times the degrees.
    """
    total = variances.sum()
    if not total > 0:
        return Z
    shares = variances / total
    doubt = float((shares**2 / freedoms).sum())
    if doubt == 0:
        return Z
    freedom = LIGHT_TAILS / doubt
    return float(t.ppf((1 + COVERAGE) / 2, max(freedom, 1.0)))


def probe_variance(quadrature: Quadrature, influence: Floats) -> tuple[float, float]:
    """Variance of a mean over the probes, and its degrees of freedom.

    ``influence`` has a value a pooled node, and mean 0 over their weights.
    """
    largest = float(np.abs(influence).max(initial=0.0))
    if quadrature.status == "exact" or largest == 0:
        return 0.0, np.inf
    _, weights = quadrature.pooled
    pieces = quadrature.num_probes * (quadrature.size / 2 + 1)
    squares = (influence / largest) ** 2
    second = float(weights @ squares)
    relative = float(weights @ squares**2) / second**2 - 1
    freedom = 2 * pieces / relative if relative > 0 else np.inf
    return largest**2 * second / pieces, freedom


def with_fewer_steps(blocks: Sequence[Quadrature]) -> list[list[Quadrature]]:
    """The blocks with two thirds and with half of their Lanczos steps; [] where one step is all."""
    if any(block.nodes.shape[1] == 1 and not _is_whole(block) for block in blocks):
        return []
    return all_truncated(blocks, [partial(_shorter, share) for share in (2 / 3, 1 / 2)])


def _is_whole(block: Quadrature) -> bool:
    return block.status == "exact" or block.size == 1


def _shorter(share: float, steps: int) -> int:
    return max(1, min(steps - 1, math.ceil(share * steps)))


def is_resolved(mean: float, within: float, change: float, least: float) -> bool:
    """Whether the steps suffice (see the module).

    ``within`` is what the probes leave open, ``least`` the smallest reading of interest.
    """
    return change <= max(within, RESOLVED * max(abs(mean), least))
