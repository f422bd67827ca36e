"""All readings of heterogeneity, by name: the one place where a reading becomes known.

- "scale": the spread of the blocks' scales;
- "curvature": the distance of their distributions of squared curvature
  (:mod:`hessian_tools.heterogeneity.transport`);
- "log", "wasserstein": distances of their whole spectra on a logarithmic axis, as far as Lanczos
  resolves them (:mod:`hessian_tools.heterogeneity.log_axis`);
- "bounded", "unnormalised": the literature's (:mod:`hessian_tools.heterogeneity.literature`).

To add a reading, write a class like those and give it a line below: tables, pictures, the command
line, saved results and the tolerance of an adaptive run then have it.

Shapes: B blocks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma

from hessian_tools.heterogeneity.estimate import Sample, quantile
from hessian_tools.heterogeneity.literature import Bounded, Unnormalised
from hessian_tools.heterogeneity.log_axis import Log, Wasserstein
from hessian_tools.heterogeneity.measure import Measure, Sampled, Workspace
from hessian_tools.heterogeneity.transport import Curvature
from hessian_tools.spectra.quadrature import Floats, Quadrature

_LN10 = float(np.log(10))


@dataclass(frozen=True, eq=False)
class Spread(Sample):
    """The standard deviation of uncertain numbers: its square is what is estimated without bias.

    ``mean`` is the root of the absolute square, with the square's sign: below zero where the
    numbers differ by less than their errors.
    """

    slope: float  # the square's variance is 4 slope (true square) + noise
    noise: float

    def interval(self, change: float) -> tuple[float, float]:
        """All spreads s with |square - s^2| <= t (4 slope s^2 + noise)^(1/2) (Wilson 1927).

        ``change`` is 0: two steps give a block's scale as well as many.
        """
        square = _signed_square(self.mean)
        reach = quantile(self.variances, self.freedoms) ** 2
        middle = square + 2 * self.slope * reach
        half = np.sqrt(max(middle**2 - square**2 + reach * self.noise, 0.0))
        return _root(middle - half), _root(middle + half)


def _signed_square(value: float) -> float:
    return float(np.copysign(value**2, value))


def _root(square: float) -> float:
    return float(np.sqrt(max(square, 0.0)))


@dataclass(frozen=True)
class Scale(Sampled):
    """Standard deviation (over B, not B - 1) of log10 of the blocks' rms eigenvalues.

    What the errors of the logarithms, V_b, add to it is taken off: the square is
        var(log10 rms) - (1 - 1/B) mean V_b.
    A block's squared rms is a mean over its probes, which follows a chi-squared law of nu degrees
    of freedom, with the relative variance 2 / nu of its first two moments (Box 1954); its logarithm
    has the mean ln true + psi(nu/2) - ln(nu/2) and the variance psi'(nu/2).
    """

    name: str = "scale"
    label: str = "spread of block scales"
    title: str = "spread of block scales"
    unit: str = "decades"
    description: str = "standard deviation over blocks of log10 of the root mean square eigenvalue"
    scale_free: bool = True
    over_pairs: bool = False
    first_steps: int = 2
    needs_steps: bool = False

    def sample(self, workspace: Workspace) -> Spread:
        logs = _log10_rms(workspace)
        kept = np.flatnonzero(~workspace.is_zero)
        laws = [_law(workspace.blocks[index]) for index in kept]
        return _spread(workspace, logs, kept, np.array(laws).reshape(-1, 2))


def _log10_rms(workspace: Workspace) -> Floats:
    """(B,), -inf for blocks that are zero."""
    rms = np.array([block.rms.value for block in workspace.blocks])
    return np.log10(rms, out=np.full(len(rms), -np.inf), where=~workspace.is_zero)


def _law(block: Quadrature) -> tuple[float, float]:
    """Degrees of freedom of the chi-squared law of a squared rms, and those of the former.

    inf for an exact block; nan where nothing tells, one probe of one step.
    """
    if block.status == "exact":
        return np.inf, np.inf
    if block.steps.min() > 1 or block.size == 1:
        # squared rms eigenvalues have the mean 1 and the mean square ``fourth``
        fourth = block.scaled(1 / block.rms.value).moment(4).value
        pieces = block.num_probes * (block.size / 2 + 1)
        relative = max(fourth - 1, 0.0) / pieces
        freedom = 2 / relative if relative > 0 else np.inf
        return freedom, freedom
    error = 2 * block.rms.standard_error / block.rms.value
    # nan, with one probe, stays nan
    return (np.inf if error == 0 else 2 / error**2), float(block.num_probes - 1)


def _of_log10_rms(freedoms: Floats) -> tuple[Floats, Floats]:
    """Bias and variance of log10 rms, where the squared rms has a chi-squared law."""
    is_exact = np.isinf(freedoms)
    halves = np.where(is_exact, 1.0, freedoms / 2)
    biases = (digamma(halves) - np.log(halves)) / (2 * _LN10)
    variances = polygamma(1, halves) / (2 * _LN10) ** 2
    return np.where(is_exact, 0.0, biases), np.where(is_exact, 0.0, variances)


def _spread(workspace: Workspace, logs: Floats, kept: NDArray[np.int_], laws: Floats) -> Spread:
    count = len(kept)
    variances = np.zeros(len(logs))
    freedoms = np.full(len(logs), np.inf)
    if count < 2:
        nothing = float("nan")
        return Spread(logs, nothing, variances, freedoms, lambda b, q: 0.0, nothing, nothing)
    offsets, errors = _of_log10_rms(laws[:, 0])
    centred = logs[kept] - offsets
    centred -= centred.mean()
    raw = float((centred**2).mean())
    square = raw - (1 - 1 / count) * float(errors.mean())
    noise = float((1 - 2 / count) * (errors**2).sum() + errors.sum() ** 2 / count**2)
    noise *= 2 / count**2
    slope = float(centred**2 @ errors) / (raw * count**2) if raw > 0 else 0.0
    mean = float(np.copysign(np.sqrt(abs(square)), square))
    # that of the square, brought to the root: 4 slope s^2 / (2 s)^2, and the noise where s is small
    total = slope + noise / (4 * max(abs(square), np.sqrt(noise) or 1.0))
    weights = centred**2 * errors
    shares = weights / weights.sum() if weights.any() else np.zeros(count)
    variances[kept] = total * shares
    freedoms[kept] = laws[:, 1]

    def effect(index: int, quadrature: Quadrature) -> float:
        blocks = list(workspace.blocks)
        blocks[index] = quadrature
        changed = Workspace(blocks, workspace.settings, workspace.axis)
        return Scale().sample(changed).mean - mean

    return Spread(logs, mean, variances, freedoms, effect, slope, noise)


JS0 = "unnormalised"  # the literature's reading at initialisation
SCALE = "scale"
CURVATURE = "curvature"
DEFAULT = (SCALE, CURVATURE)  # what a few products resolve
# In display order.
READINGS: dict[str, Measure] = {
    measure.name: measure
    for measure in (Scale(), Curvature(), Log(), Wasserstein(), Bounded(), Unnormalised())
}


def pair_readings() -> tuple[str, ...]:
    """The names of the readings that are means over pairs of blocks, in display order."""
    return tuple(name for name, measure in READINGS.items() if measure.over_pairs)
