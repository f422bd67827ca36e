"""JS0 to a tolerance: probes and Lanczos steps go where they are needed, instead of equally many to every block.

The estimate is the mean over pairs less the O(1/k) bias of few probes that the jackknife finds (Quenouille 1956). What
is not known of it is told in three parts, as fractions of the mean; the run stops when their sum meets the tolerance:
- the **standard error**, by the jackknife over the probes of each block (:mod:`hessian_tools.heterogeneity.comparison`), times a
  **doubt**: four probes of one decisive block may agree by chance. The factor makes it an upper bound in nine of ten
  cases, sqrt(nu / chi2_nu(0.1)) with Satterthwaite's degrees of freedom nu (1946): 2.3 where four probes of one block
  decide, near 1 where many blocks contribute;
- the square of the **bias**, for taking the O(1/k) part off leaves O(1/k^2);
- **steps**: the change over the last third of the Lanczos steps. The quadratures with fewer nodes come from the same T
  and cost no product. Of two measures the larger counts: all blocks changed together, and the root of the sum of
  squares of the changes that single blocks make, for changes that cancel are no convergence.
A block grows by what it adds. Steps (half as many again) go first, to the blocks that change the mean most, until the
rest change it by less than an eighth of the tolerance; then probes, at most doubled in a round: to the blocks of the
largest bias likewise, and by Neyman's allocation, k_b ~ sqrt(V_b / m_b), with V_b / k_b the block's part of SE^2 and
m_b the products that a probe costs (Neyman 1934; Cochran, Sampling Techniques, 5.5). A block that would take as many
further products as it has rows is computed exactly, and then adds nothing.

A tolerance is met in the estimate, not in the truth: where every spectrum is still unresolved (few steps, and a kernel
much narrower than the gaps between nodes), JS is high and stays there for a while, which looks like convergence. Blocks
at ``max_steps`` that still change are told in ``steps``: the tolerance is then not met, and probes are added only until
the other parts would meet it.

Shapes: B blocks, k_b probes, m_b steps, n_b rows of block b.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy.stats import chi2
from tqdm import tqdm

from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.comparison import Comparison, jackknife
from hessian_tools.heterogeneity.growing import GrowingSpectra
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.heterogeneity.readings import JS0, READINGS
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.settings import Settings
from hessian_tools.spectra.slq import names_and_cuts, notes_on, solved

FIRST_PROBES, FIRST_STEPS = (
    4,
    16,
)  # with fewer probes the errors are unknown, with fewer steps nothing is resolved
_CHANCE = 0.1  # that the true standard error is above what is counted
_SHARE = 0.25  # of the tolerance, above which steps or bias are worked on
_REST = 0.125  # of the tolerance, what the blocks that are left alone may add


@registered
@dataclass(frozen=True)
class Uncertainty:
    """What is not known of a mean, as fractions of it."""

    standard_error: float
    doubt: float  # factor for the standard error's own uncertainty, as it comes from few probes
    bias: float  # taken off in the estimate; positive where few probes make the reading too high
    steps: float  # change over the last third of the Lanczos steps

    @property
    def total(self) -> float:
        """What is compared with the tolerance."""
        return self.doubt * self.standard_error + self.bias**2 + self.steps


@registered
@dataclass(frozen=True)
class Round:
    """The state of a run before a decision."""

    num_matvecs: int  # products spent so far, by blocks that an earlier run finished as well
    means: dict[str, float]  # by reading, with their bias
    uncertainties: dict[str, Uncertainty]  # by reading
    grown: tuple[str, ...]  # the blocks that then got more probes or steps


@registered
@dataclass(frozen=True, eq=False)
class AdaptiveJS0:
    """Spectra, readings and how the run got there."""

    spectra: BlockSpectra
    heterogeneity: JSHeterogeneity
    history: tuple[Round, ...]
    tolerance: float
    reading: tuple[str, ...]
    met: bool  # whether the tolerance was; else every block that matters is at a limit

    @property
    def estimates(self) -> dict[str, float]:
        """The means less their bias, by reading: what the tolerance is about."""
        last = self.history[-1]
        return {
            name: mean - last.uncertainties[name].bias * abs(mean)
            for name, mean in last.means.items()
        }

    @property
    def uncertainties(self) -> dict[str, Uncertainty]:
        """Of the result, by reading."""
        return self.history[-1].uncertainties

    def __str__(self) -> str:
        told = []
        for name, u in self.uncertainties.items():
            parts = f"standard error {u.standard_error:.2g} times {u.doubt:.2g}, bias {u.bias:+.2g}, steps {u.steps:.2g}"
            told.append(f"{name} {self.estimates[name]:.4g}, uncertain by {u.total:.2g} ({parts})")
        reached = "met" if self.met else "not met within the limits"
        return f"tolerance {self.tolerance:g} {reached} after {self.spectra.num_matvecs} products: {'; '.join(told)}"


def adaptive_js0(
    curvature: Problem | CurvatureOperator, partition: Any, *, tolerance: float = 0.05,
    reading: str | Sequence[str] = JS0, max_matvecs: int = 1000, max_steps: int = 100, seed: int = 0,
    probes: str = "rademacher", reorthogonalize: str = "full", exact: bool | str = "auto",
    finished: Mapping[str, Quadrature] | None = None, on_block: Callable[[str, Quadrature], None] | None = None,
    progress: bool = True,
) -> AdaptiveJS0:  # fmt: skip
    """Block spectra and their heterogeneity, as exact as ``tolerance`` asks (see the module's docstring).

    Lanczos runs that grow go on from where they stood; their vectors are kept within ``hessian.krylov_bytes``. Where
    those of all blocks do not fit, the largest are dropped; a block whose vectors are gone and that needs more steps
    begins again, which its ``num_matvecs`` counts and ``notes`` tell. A seed gives the probes of :func:`blockwise_slq`.

    Args:
        curvature, partition: see :func:`hessian_tools.blockwise_slq`.
        tolerance: of the sum of standard error, bias and change over the last steps, relative to the mean.
        reading: one or several of "bounded", "unnormalised", "log", "wasserstein" and "scale" (the spread of block
            scales), all of which must meet the tolerance.
        max_matvecs, max_steps: the most products for a block, and the most steps of a probe; the defaults are what the
            literature spends on every block, 10 probes of 100 steps.
        exact: "auto": blocks of at most max_matvecs rows that need no fewer products are computed exactly; False: none.
        finished: quadratures of an earlier run with the same arguments, by name, to go on from. Their Lanczos vectors
            are gone: more probes cost only themselves, more steps begin again.
        on_block: called with name and Quadrature each time a block has grown.
        The others: see :func:`hessian_tools.slq`.
    Raises:
        ValueError: for an argument out of range, or fewer than two blocks.
        TypeError: for a ``partition`` that holds no Blocks.
        NumericalError: for a product with NaN or inf, naming the block and the Lanczos step where it appeared first.
    """
    asked = (reading,) if isinstance(reading, str) else tuple(reading)
    _check(tolerance, asked, max_matvecs, max_steps, exact)
    settings = Settings(max_matvecs, max_steps, seed, probes, reorthogonalize, exact)
    hessian = as_operator(curvature)
    names, cuts = names_and_cuts(partition)
    if len(names) < 2:
        raise ValueError(f"partition holds {len(names)} block; heterogeneity compares at least two")
    steps = min(FIRST_STEPS, max_steps, max_matvecs // 2)
    first = replace(settings, num_probes=min(FIRST_PROBES, max_matvecs // steps), num_steps=steps)
    history: list[Round] = []
    with tqdm(unit="HVP", disable=None if progress else True, dynamic_ncols=True) as bar:
        growing = GrowingSpectra(hessian, partition, settings, finished or {}, on_block, bar)
        tiny = [
            cut for cut in cuts if first.is_exact(cut.block_size)
        ]  # stacked, as many as there may be of them
        for name, quadrature in solved(
            hessian, tiny, growing.quadratures, replace(first, exact=True), bar
        ):
            growing.store(name, quadrature)
        wishes = {
            name: (first.num_probes, first.num_steps)
            for name in names
            if name not in growing.quadratures
        }
        while True:
            for name, wish in wishes.items():
                growing.grow(name, *wish)
            blocks = [growing.quadratures[name] for name in names]
            shares, means = _shares(blocks, asked)
            uncertainties = {name: share.uncertainty for name, share in shares.items()}
            met = all(uncertainty.total <= tolerance for uncertainty in uncertainties.values())
            wishes = (
                {}
                if met
                else _wishes(
                    names, blocks, shares, tolerance, max_matvecs, max_steps, exact == "auto"
                )
            )
            spent = sum(block.num_matvecs for block in blocks)
            history.append(Round(spent, means, uncertainties, tuple(wishes)))
            bar.set_description_str(
                f"uncertain by {max(u.total for u in uncertainties.values()):.2g} of {tolerance:g}"
            )
            if not wishes:
                break
    notes = (
        *(note for name in names for note in notes_on(name, growing.quadratures[name], settings)),
        *growing.notes,
    )
    most = max(block.num_probes for block in blocks)
    ordered = {name: growing.quadratures[name] for name in names}
    spectra = BlockSpectra(
        ordered, most, max_steps, seed, probes, reorthogonalize, hessian.route, notes
    )
    return AdaptiveJS0(spectra, js_heterogeneity(spectra), tuple(history), tolerance, asked, met)


@dataclass(frozen=True, eq=False)
class _Shares:
    """What each block adds to a reading's uncertainty; in units of the mean."""

    probes: np.ndarray  # (B,) k_b
    variances: np.ndarray  # (B,) of SE^2
    biases: np.ndarray  # (B,)
    steps: np.ndarray  # (B,) change of the mean when this block alone had a third fewer steps
    together: float  # the same, all blocks at once

    @property
    def uncertainty(self) -> Uncertainty:
        steps = max(abs(self.together), float(np.linalg.norm(self.steps)))
        total, spread = (
            self.variances.sum(),
            (self.variances**2 / np.maximum(self.probes - 1, 1)).sum(),
        )
        freedom = total**2 / spread if spread > 0 else np.inf
        doubt = (
            float(np.sqrt(freedom / chi2.ppf(_CHANCE, freedom))) if np.isfinite(freedom) else 1.0
        )
        return Uncertainty(float(np.sqrt(total)), doubt, float(self.biases.sum()), steps)


def _shares(
    blocks: Sequence[Quadrature], asked: Sequence[str]
) -> tuple[dict[str, _Shares], dict[str, float]]:
    """The shares of all blocks in the uncertainty of each reading asked for, and the means."""
    comparison = Comparison(blocks, asked, GridSettings())
    fewer = [truncated(block, -(-2 * block.nodes.shape[1] // 3)) for block in blocks]
    together = Comparison(fewer, asked, GridSettings()).means
    alone = [
        comparison.means if less is block else comparison.replacing(index, less)
        for index, (block, less) in enumerate(zip(blocks, fewer, strict=True))
    ]
    parts, shares = jackknife(comparison), {}
    probes = np.array([block.num_probes for block in blocks])
    for name in asked:
        mean, part = comparison.means[name], parts[name]
        unit = abs(mean) or 1.0  # blocks that are all alike differ by 0 +- 0
        changes = np.array([changed[name] for changed in alone]) - mean
        shares[name] = _Shares(
            probes,
            part.variances / unit**2,
            part.biases / unit,
            changes / unit,
            (together[name] - mean) / unit,
        )
    return shares, comparison.means


def _wishes(
    names: Sequence[str], blocks: Sequence[Quadrature], shares: Mapping[str, _Shares], tolerance: float,
    max_matvecs: int, max_steps: int, exact: bool,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """(probes, steps) for the blocks that shall grow; (0, 0) where one shall be exact."""
    probes, done = np.array([block.nodes.shape for block in blocks]).T
    sizes = np.array([block.size for block in blocks])
    open_ = np.array([block.status != "exact" for block in blocks])
    ended = np.array(
        [block.steps.max() < block.nodes.shape[1] for block in blocks]
    )  # all spaces are invariant
    longest = np.minimum(np.minimum(max_steps, sizes), max_matvecs // probes)
    can_be_exact = open_ & exact & (sizes <= max_matvecs)
    longer = open_ & ~ended & (done < longest)
    wider = open_ & (done * (probes + 1) <= max_matvecs)
    steps, wanted = done.copy(), probes.astype(float)
    for share in shares.values():
        found, steps_left = share.uncertainty, tolerance
        if found.total <= tolerance:
            continue
        if found.steps > _SHARE * tolerance:
            chosen = _largest(np.abs(share.steps), longer, _REST * tolerance)
            steps[chosen] = np.minimum(-(-3 * done[chosen] // 2), longest[chosen])
            if len(chosen):  # probes of too few steps tell nothing about those of more
                continue
        else:
            steps_left -= found.steps
        if found.bias**2 > _SHARE * tolerance:
            chosen = _largest(
                np.abs(share.biases), wider | can_be_exact, np.sqrt(_REST * tolerance)
            )
            wanted[chosen] = np.maximum(wanted[chosen], 2 * probes[chosen])
        room = max(steps_left - found.bias**2, tolerance / 2)
        if found.doubt * found.standard_error > room:
            deviations, costs = np.sqrt(share.variances * probes), np.sqrt(done)
            wanted = np.maximum(
                wanted, deviations / costs * (deviations @ costs) * (found.doubt / room) ** 2
            )
    whole = can_be_exact & (np.minimum(wanted * steps, max_matvecs) - probes * done >= sizes)
    whole |= can_be_exact & (wanted * steps > max_matvecs)
    more = np.minimum(np.minimum(np.ceil(wanted), 2 * probes), max_matvecs // steps).astype(int)
    grows = whole | (longer & (steps > done)) | (wider & (more > probes))
    more = np.where(whole, 0, np.maximum(more, probes))
    steps = np.where(whole, 0, steps)
    return {names[int(b)]: (int(more[b]), int(steps[b])) for b in np.flatnonzero(grows)}


def _largest(values: np.ndarray, allowed: np.ndarray, rest: float) -> np.ndarray:
    """The fewest of the ``allowed`` entries whose others sum to at most ``rest``."""
    candidates = np.flatnonzero(allowed & (values > 0))
    order = candidates[np.argsort(values[candidates], kind="stable")]
    return order[np.cumsum(values[order]) > rest]


def _check(
    tolerance: float, asked: Sequence[str], max_matvecs: int, max_steps: int, exact: bool | str
) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < np.inf:
        raise ValueError(
            f"tolerance is {tolerance!r}; choose a positive number, such as 0.05 for 5 % of the mean"
        )
    if not asked or not set(asked) <= set(READINGS):
        raise ValueError(f"reading is {asked!r}; choose from {', '.join(map(repr, READINGS))}")
    for name, value, least in (("max_matvecs", max_matvecs, 6), ("max_steps", max_steps, 3)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"{name} is {value!r}; an integer of at least {least} (2 probes of 3 steps) is needed"
            )
    if exact not in ("auto", False):
        raise ValueError(
            f"exact is {exact!r}; allowed are 'auto' and False, as exact blocks leave nothing to adapt"
        )
