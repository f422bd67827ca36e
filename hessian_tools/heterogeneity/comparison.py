"""Readings of the spectra of blocks, with what probes and Lanczos steps leave uncertain.

A :class:`Sampled` measure brings its error. For any other the jackknife leaves one probe of one
block out, which changes that block's row of a matrix of distances and, when the block held one of
its ends, the grid; what changes is computed again, nothing else. The probes of different blocks are
independent, so the blocks are strata:
    SE^2 = sum_b (k_b - 1) / k_b sum_i (theta_bi - theta_b.)^2
    bias = sum_b (k_b - 1) (theta_b. - theta)
with theta_bi the reading without probe i of block b and theta_b. its mean over i (Jones 1974,
"Jackknife estimation of functions of stratum means"; the bias is Quenouille's, 1956). Blocks may
have different numbers of probes, and each term is what its block contributes. An exact block
contributes 0; a block of one probe leaves both unknown.

Shapes: B blocks, k_b probes of block b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.estimate import (
    Sample,
    is_resolved,
    quantile,
    with_fewer_steps,
)
from hessian_tools.heterogeneity.measure import (
    GridSettings,
    Jackknifed,
    Measure,
    Replacement,
    Sampled,
    Workspace,
)
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.spectra.quadrature import Floats, Quadrature


@dataclass(frozen=True, eq=False)
class Found:
    """One reading of B blocks, and what each block leaves uncertain of it."""

    measure: Measure
    values: Floats  # (B, B) for pairs of blocks, (B,) for single ones
    mean: float
    variances: Floats  # (B,) terms of the squared standard error
    biases: Floats  # (B,) terms of the bias of few probes; zero where it is taken off
    freedoms: Floats  # (B,) degrees of freedom of each variance
    change: float  # that the last Lanczos steps made; inf after one step
    alone: Floats  # (B,) the part of each block in it, if it alone had a third fewer steps
    low: float  # ends of the interval that covers 95 times in 100; nan if there is none
    high: float
    floor: float  # of identical blocks: 0 where it is taken off, nan if unknown

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(self.variances.sum()))

    @property
    def bias(self) -> float:
        """Of the mean, from finitely many probes."""
        return float(self.biases.sum())

    @property
    def is_resolved(self) -> bool:
        """Whether there is an interval."""
        return not np.isnan(self.low)


def compared(
    blocks: Sequence[Quadrature],
    readings: Sequence[str],
    settings: GridSettings,
) -> tuple[dict[str, Found], Workspace]:
    """Every reading by name, and the workspace that they share."""
    workspace = Workspace(blocks, settings)
    shorter = [Workspace(less, settings, workspace.axis) for less in with_fewer_steps(blocks)]
    found = {}
    sampled = [name for name in readings if isinstance(READINGS[name], Sampled)]
    for name in sampled:
        found[name] = _sampled(READINGS[name], workspace, shorter)
    others = [name for name in readings if name not in sampled]
    if others:
        found |= _jackknifed(others, workspace, shorter)
    return {name: found[name] for name in readings}, workspace


def _sampled(measure: Measure, workspace: Workspace, shorter: Sequence[Workspace]) -> Found:
    assert isinstance(measure, Sampled)
    sample = measure.sample(workspace)
    change = 0.0
    alone = np.zeros(len(workspace.blocks))
    if measure.needs_steps:
        change = max((abs(measure.sample(less).mean - sample.mean) for less in shorter), default=0)
        if not shorter:
            change = np.inf
        else:
            parts = enumerate(shorter[0].blocks)
            alone = np.array([sample.effect(index, less) for index, less in parts])
    low, high = _interval(measure, sample, change)
    return Found(
        measure=measure,
        values=sample.values,
        mean=sample.mean,
        variances=sample.variances,
        biases=np.zeros(len(alone)),
        freedoms=sample.freedoms,
        change=change,
        alone=alone,
        low=low,
        high=high,
        floor=0.0,
    )


def _interval(measure: Measure, sample: Sample, change: float) -> tuple[float, float]:
    within = sample.quantile * sample.standard_error
    if not is_resolved(sample.mean, within, change, measure.least):
        return float("nan"), float("nan")
    return sample.interval(measure.step_doubt * change)


class Comparison:
    """Jackknifed readings of B blocks, and what they become when one block is another.

    Attributes: ``workspace`` with the blocks, their axis and grids; by the readings' names, in the
    order asked for, ``values``, (B, B) for pairs of blocks and (B,) for single ones, and ``means``.
    """

    def __init__(self, workspace: Workspace, measures: Mapping[str, Jackknifed]) -> None:
        self.workspace = workspace
        self.measures = measures
        self.values = {name: m.values(workspace) for name, m in measures.items()}
        self.means = {name: m.mean(self.values[name]) for name, m in measures.items()}

    def replacing(self, index: int, block: Quadrature) -> dict[str, float]:
        """``means`` with ``block`` in the place of block ``index``."""
        blocks = list(self.workspace.blocks)
        blocks[index] = block
        changed = Workspace(blocks, self.workspace.settings)
        # on another axis or grid all distances change, not only those of this block
        if not self.workspace.serves(changed):
            return Comparison(changed, self.measures).means
        replacement = Replacement(self.workspace, index, block)
        return {
            name: measure.mean_after(replacement, self.values[name], self.means[name])
            for name, measure in self.measures.items()
        }


@dataclass(frozen=True, eq=False)
class Jackknife:
    """What the blocks contribute to the uncertainty of one reading."""

    variances: Floats  # (B,) terms of SE^2
    biases: Floats  # (B,) terms of the bias


def jackknife(comparison: Comparison) -> dict[str, Jackknife]:
    """The jackknife of every reading of ``comparison``, by name (see the module's docstring)."""
    blocks = comparison.workspace.blocks
    parts = {
        name: Jackknife(np.zeros(len(blocks)), np.zeros(len(blocks))) for name in comparison.means
    }
    for index, block in enumerate(blocks):
        if block.status == "exact":
            continue
        replicates = _replicates(comparison, index, block)
        for name, part in parts.items():
            variance, bias = _terms([r[name] for r in replicates], comparison.means[name])
            part.variances[index] = variance
            part.biases[index] = bias
    return parts


def _replicates(comparison: Comparison, index: int, block: Quadrature) -> list[dict[str, float]]:
    """The means without one probe of the block each; none for a block of one probe."""
    k = block.num_probes
    if k == 1:
        return []
    return [comparison.replacing(index, block.without_probe(probe)) for probe in range(k)]


def _terms(replicates: Sequence[float], mean: float) -> tuple[float, float]:
    """A block's terms of SE^2 and of the bias, from the k means without one of its probes each."""
    k = len(replicates)
    if k == 0:
        return float("nan"), float("nan")
    theta = np.array(replicates)
    return (k - 1) * theta.var(), (k - 1) * (theta.mean() - mean)


def _jackknifed(
    names: Sequence[str],
    workspace: Workspace,
    shorter: Sequence[Workspace],
) -> dict[str, Found]:
    measures = {name: m for name, m in READINGS.items() if name in names}
    comparison = Comparison(workspace, measures)  # type: ignore[arg-type]
    parts = jackknife(comparison)
    changes = [Comparison(less, comparison.measures).means for less in shorter]
    alone = _changes_alone(comparison, shorter)
    found = {}
    for name, mean in comparison.means.items():
        change = max((abs(means[name] - mean) for means in changes), default=np.inf)
        each = np.array([means[name] - mean for means in alone])
        found[name] = _found(comparison, name, parts[name], change, each)
    return found


def _found(
    comparison: Comparison,
    name: str,
    part: Jackknife,
    change: float,
    alone: Floats,
) -> Found:
    measure = comparison.measures[name]
    mean = comparison.means[name]
    freedoms = np.array([_freedom(block) for block in comparison.workspace.blocks])
    error = float(np.sqrt(part.variances.sum()))
    within = quantile(part.variances, freedoms) * error
    half = np.nan
    if measure.tolerable and is_resolved(mean, within, change, measure.least):
        half = np.hypot(within, measure.step_doubt * change)
    return Found(
        measure=measure,
        values=comparison.values[name],
        mean=mean,
        variances=part.variances,
        biases=part.biases,
        freedoms=freedoms,
        change=change,
        alone=alone,
        low=float(mean - half),
        high=float(mean + half),
        floor=measure.floor(comparison.workspace),
    )


def _freedom(block: Quadrature) -> float:
    return np.inf if block.status == "exact" else max(block.num_probes - 1, 0.5)


def _changes_alone(comparison: Comparison, shorter: Sequence[Workspace]) -> list[dict[str, float]]:
    """The means if one block each had a third fewer steps."""
    blocks = comparison.workspace.blocks
    if not shorter:
        return [comparison.means] * len(blocks)
    pairs = enumerate(zip(blocks, shorter[0].blocks, strict=True))
    return [
        comparison.means if less is block else comparison.replacing(index, less)
        for index, (block, less) in pairs
    ]
