"""JS0 to a tolerance: probes and Lanczos steps go where they are needed, instead of equally many to
every block.

:mod:`hessian_tools.heterogeneity.uncertainty` says what remains uncertain about a reading (the sum
of three parts, as fractions of the mean); the run stops when it meets the tolerance, and until then
:mod:`hessian_tools.heterogeneity.allocation` says which blocks grow.

The literature's readings are refused: where every spectrum is still unresolved (few steps, and a
kernel much narrower than the gaps between nodes), JS is high and stays there for a while, which
looks like convergence. What blocks at ``max_steps`` still change is reported in ``steps``: the
tolerance is then not met, and probes are added only until the other parts would meet it.

Shapes: B blocks, k probes, m steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np

from hessian_tools.blocks.block import Block, Cut
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.heterogeneity.allocation import Limits, next_growth
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.readings import DEFAULT, READINGS, SCALE
from hessian_tools.heterogeneity.uncertainty import Shares, Uncertainty, shares_of
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.spectra.growing import GrowingSpectra, Growth
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.settings import Settings
from hessian_tools.spectra.slq import names_and_cuts, solved

FIRST_PROBES = 2


@registered
@dataclass(frozen=True)
class Round:
    """The state of a run before a decision."""

    num_matvecs: int  # products spent so far, by blocks that an earlier run finished as well
    means: dict[str, float]  # by reading, with their bias
    uncertainties: dict[str, Uncertainty]  # by reading
    grown: tuple[str, ...]  # the blocks that then got more probes or steps

    @property
    def totals(self) -> list[float]:
        """What is compared with the tolerance, one a reading."""
        return [uncertainty.total for uncertainty in self.uncertainties.values()]


@registered
@dataclass(frozen=True, eq=False)
class AdaptiveJS0(Tabular, Drawable):
    """Spectra, readings and how the run got there."""

    spectra: BlockSpectra
    heterogeneity: JSHeterogeneity
    history: tuple[Round, ...]
    tolerance: float
    reading: tuple[str, ...]
    met: bool  # whether the tolerance was; else every block that matters is at a limit

    def records(self) -> list[Record]:
        """Those of the readings it ended with."""
        return self.heterogeneity.records()

    @property
    def estimates(self) -> dict[str, float]:
        """The means less their bias, by reading: what the tolerance is about."""
        return {
            name: mean - self.uncertainties[name].bias * abs(mean)
            for name, mean in self.history[-1].means.items()
        }

    @property
    def uncertainties(self) -> dict[str, Uncertainty]:
        """Of the result, by reading."""
        return self.history[-1].uncertainties

    def __str__(self) -> str:
        statements = []
        for name, u in self.uncertainties.items():
            parts = (
                f"standard error {u.standard_error:.2g} times {u.doubt:.2g}, bias {u.bias:+.2g}, "
                f"steps {u.steps:.2g}"
            )
            estimate = self.estimates[name]
            statements.append(f"{name} {estimate:.4g}, uncertain by {u.total:.2g} ({parts})")
        reached = "met" if self.met else "not met within the limits"
        products = self.spectra.num_matvecs
        listed = "; ".join(statements)
        return f"tolerance {self.tolerance:g} {reached} after {products} products: {listed}"


def adaptive_js0(
    curvature: Problem | CurvatureOperator,
    partition: Partition | Iterable[Block],
    *,
    tolerance: float = 0.05,
    reading: str | Sequence[str] = DEFAULT,
    max_matvecs: int = 1000,
    max_steps: int = 100,
    seed: int = 0,
    probes: str = "rademacher",
    reorthogonalize: str = "full",
    exact: bool | str | int = "auto",
    finished: Mapping[str, Quadrature] | None = None,
    on_block: Callable[[str, Quadrature], None] | None = None,
    progress: bool = True,
) -> AdaptiveJS0:
    """Block spectra and their heterogeneity, as exact as ``tolerance`` asks (see the module).

    Lanczos runs that grow go on from where they stood; their vectors are kept within
    ``krylov_bytes`` of the operator. Where those of all blocks do not fit, the largest are dropped;
    a block whose vectors are gone and that needs more steps begins again, which its ``num_matvecs``
    counts and ``notes`` report. A seed gives the probes of :func:`hessian_tools.blockwise_slq`.

    Args:
        curvature, partition: see :func:`hessian_tools.blockwise_slq`.
        tolerance: the standard error of the mean, with what the last Lanczos steps changed in it,
            relative to the mean (or to a tenth of a decade, where that is more).
        reading: one or several of "scale", "curvature", "log" and "wasserstein", all of which must
            meet the tolerance. The literature's readings are refused, as their error is not known.
        max_matvecs, max_steps: the most products for a block, and the most steps of a probe; the
            defaults are what the literature spends on every block, 10 probes of 100 steps.
        exact: "auto": blocks of at most max_matvecs rows that need no fewer products are computed
            exactly; a number: so are all up to that size; False: none.
        finished: quadratures of an earlier run with the same arguments, by name, to go on from.
            Their Lanczos vectors are gone: more probes cost only themselves, more steps begin
            again.
        on_block: called with name and Quadrature each time a block has grown.
        The others: see :func:`hessian_tools.slq`.
    Raises:
        ValueError: for an argument out of range, or fewer than two blocks.
        TypeError: for a ``partition`` that holds no Blocks.
        NumericalError: for a product with NaN or inf, naming the block and the Lanczos step where
            it appeared first.
    """
    asked = (reading,) if isinstance(reading, str) else tuple(reading)
    _check(tolerance, asked, max_matvecs, max_steps, exact)
    limits = Limits(max_matvecs, max_steps, exact is not False)
    settings = Settings(max_matvecs, max_steps, seed, probes, reorthogonalize, exact)
    operator = as_operator(curvature)
    names, cuts = names_and_cuts(partition)
    if len(names) < 2:
        raise ValueError(f"partition holds {len(names)} block; heterogeneity compares at least two")

    with product_bar(None, shown=progress) as bar:
        growing = GrowingSpectra(operator, partition, settings, finished or {}, on_block, bar)
        steps = max(READINGS[name].first_steps for name in asked)
        growths = _begin(growing, cuts, limits, steps)
        history: list[Round] = []
        while growths or not history:
            for name, growth in growths.items():
                growing.grow(name, growth)
            shares, means = shares_of(list(growing.blocks.values()), asked)
            # the last round is of the result: nothing grows after it
            growths = next_growth(growing.blocks, shares, tolerance, limits)
            history.append(_round(growing, shares, means, growths))
            bar.set_description_str(f"uncertain by {max(history[-1].totals):.2g} of {tolerance:g}")

    spectra = growing.spectra()
    return AdaptiveJS0(
        spectra=spectra,
        heterogeneity=js_heterogeneity(spectra, readings=_over_pairs(asked)),
        history=tuple(history),
        tolerance=tolerance,
        reading=asked,
        met=all(total <= tolerance for total in history[-1].totals),
    )


def _round(
    growing: GrowingSpectra,
    shares: Mapping[str, Shares],
    means: dict[str, float],
    growths: Mapping[str, Growth],
) -> Round:
    return Round(
        num_matvecs=sum(block.num_matvecs for block in growing.blocks.values()),
        means=means,
        uncertainties={name: share.uncertainty for name, share in shares.items()},
        grown=tuple(growths),
    )


def _over_pairs(asked: Sequence[str]) -> list[str] | None:
    return [name for name in asked if name != SCALE] or None


def _begin(
    growing: GrowingSpectra,
    cuts: Iterable[Cut],
    limits: Limits,
    first_steps: int,
) -> dict[str, Growth]:
    """Computes the blocks that are so small that they are exact, and says how the others begin."""
    steps = min(first_steps, limits.max_steps, limits.max_matvecs // 2)
    probes = min(FIRST_PROBES, limits.max_matvecs // steps)
    first = replace(growing.settings, num_probes=probes, num_steps=steps)
    small = [cut for cut in cuts if first.is_exact(cut.block_size)]
    exactly = replace(first, exact=True)
    # there may be thousands of these: not one by one, but those of a cut together
    for name, quadrature in solved(
        growing.curvature, small, growing.quadratures, exactly, growing.bar
    ):
        growing.store(name, quadrature)
    return {name: Growth(probes, steps) for name in growing.cuts if name not in growing.quadratures}


def _check(
    tolerance: float,
    asked: Sequence[str],
    max_matvecs: int,
    max_steps: int,
    exact: bool | str | int,
) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < np.inf:
        raise ValueError(
            f"tolerance is {tolerance!r}; choose a positive number, such as 0.05 for 5 % of the "
            "mean"
        )
    tolerable = [name for name, measure in READINGS.items() if measure.tolerable]
    if not asked or not set(asked) <= set(tolerable):
        choices = ", ".join(map(repr, tolerable))
        literature = ", ".join(name for name in READINGS if name not in tolerable)
        raise ValueError(
            f"reading is {asked!r}; a tolerance can be had of {choices} (the error of {literature} "
            "is not known: take a fixed number of probes and steps for them)"
        )
    _check_limit("max_matvecs", max_matvecs, 6)
    _check_limit("max_steps", max_steps, 3)
    if exact is True:
        raise ValueError(
            "exact is True; allowed are 'auto', False and a size up to which blocks are exact, as "
            "exact blocks alone leave nothing to adapt"
        )


def _check_limit(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(
            f"{name} is {value!r}; an integer of at least {least} (2 probes of 3 steps) is needed"
        )
