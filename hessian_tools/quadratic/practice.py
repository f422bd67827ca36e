"""What runs do: the theorems' bounds held against every step, and where Adam with memory ends.

The bounds are those of :mod:`hessian_tools.quadratic.theory`.

Shapes: N problems, S starts, E step sizes, T steps, P last iterates, d coordinates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import run
from hessian_tools.quadratic.theory import constants
from hessian_tools.quadratic.watch import VANISHED
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Floats

# relative; a step's loss is known to about this, and a bound met exactly is no violation
ROUNDING = 1e-12
# of GD's lower bound, as :func:`check_gd_bound` names them
GD_FORMS = ("thesis, any eta", "slides, eta <= 1/L", "slides, eta = 2/(mu+L)")
_SAME_ITERATE = 1e-6  # of a limit cycle, relative to its radius


@registered
@dataclass(frozen=True)
class BoundCheck:
    """A bound against practice.

    ``margin`` is the least of log(bound / f+) or log(f+ / bound), negative where it is violated.
    """

    name: str
    steps: int  # judged, over all runs
    violations: int
    margin: float


def check_gd_bound(
    problem: Quadratic,
    *,
    num_steps: int = 300,
    relative_steps: Sequence[float] | None = None,
) -> list[BoundCheck]:
    """The lower bound for gradient descent on every step, from the eigenvectors of mu and L.

    Args:
        relative_steps: eta in units of 1 / L; 41 from 0.01 to 10 unless given. 2 / (mu + L) and
            1 / L always join them.
    Returns:
        the thesis' form for every eta, and the slides' form for eta <= 1 / L and at
        eta = 2 / (mu + L).
    """
    if relative_steps is None:
        relative_steps = np.geomspace(0.01, 10, 41).tolist()
    margins: dict[str, list[Tensor]] = {form: [] for form in GD_FORMS}
    vectors = torch.linalg.eigh(problem.hessian).eigenvectors
    for i in range(problem.num_problems):
        one = problem.part(slice(i, i + 1))
        mu, largest, kappa = float(one.smallest), float(one.largest), float(one.kappa)
        steps = np.array([2 / (mu + largest), 1 / largest, *(s / largest for s in relative_steps)])
        factors = _gd_factors(one, vectors[i, :, [0, -1]].T, steps, num_steps)
        worst = factors.amax(-1).log()  # (T, E)
        thesis = worst - _log_bound((1 - 2 / (kappa + 1)) ** 2)
        slides = worst - _log_bound(1 - 2 / kappa)
        # 1 / L itself is short, whichever way it was rounded
        short = torch.as_tensor(steps <= (1 + 1e-15) / largest)
        by_form = (thesis, slides[:, short], slides[:, 0])
        for form, margin in zip(GD_FORMS, by_form, strict=True):
            margins[form].append(margin.flatten())
    return _judged(margins)


def _log_bound(factor: float) -> float:
    """The logarithm of a least factor a step; one that is not positive, of kappa <= 2, says
    nothing, and lies below every step's."""
    return math.log(factor) if factor > 0 else -math.inf


def check_adam_bound(
    problem: Quadratic,
    *,
    num_starts: int = 100,
    num_steps: int = 1000,
    seed: int = 0,
) -> list[BoundCheck]:
    """The upper bound for Adam on every step of runs with the theorem's step size.

    Returns:
        its forms with r, with r', and with r' and the whole factor squared.
    """
    exact = constants(problem, num_starts=num_starts, seed=seed)
    worst = exact.block_kappas.max(1)[:, None]
    rates = {
        "r = max C2^2 / min C1^2": exact.adam_upper,
        "r' = max C2 / min C1": 1 - 1 / (exact.tight_r * worst),
        "r', factor squared": exact.adam_upper_tight,
    }
    device = problem.hessian.device
    bounds = {name: torch.as_tensor(rate, device=device).log() for name, rate in rates.items()}
    # of a single eigenvalue: a factor of 0, which rounding alone keeps from being met
    bounds = {name: bound.nan_to_num(neginf=math.nan) for name, bound in bounds.items()}
    margins: dict[str, list[Tensor]] = {name: [] for name in bounds}

    def observe(problems: slice, runs: slice, begin: int, relative: Tensor) -> None:
        factors = _log_factors(relative)
        for name, bound in bounds.items():
            margins[name].append((bound[problems, runs] - factors).flatten().cpu())

    run(
        problem,
        "adam",
        step="theorem",
        num_starts=num_starts,
        num_steps=num_steps,
        seed=seed,
        observe=observe,
        progress=False,
    )
    return _judged(margins)


@registered
@dataclass(frozen=True, eq=False)
class LimitCycle:
    """Where Adam with beta2 < 1 and a constant step ends."""

    beta2: float
    steps: Floats  # (E,)
    lowest: Floats = field(repr=False)  # (E, S) least f / f(w_0) over the tail
    highest: Floats = field(repr=False)  # (E, S) largest
    radius: Floats = field(repr=False)  # (E, S) largest |w_i| over the tail, in units of eta
    # (E, S) steps after which iterates repeat to 1e-6 of the radius; 0 where they do not
    period: NDArray[np.int_] = field(repr=False)

    @property
    def exponent(self) -> float:
        """Slope of log of the median highest loss against log eta.

        It is 2 where the cycle's size is proportional to eta.
        """
        losses = np.median(self.highest, axis=1)
        return float(np.polyfit(np.log(self.steps), np.log(losses), 1)[0])


def limit_cycle(
    problem: Quadratic,
    *,
    beta2: float,
    steps: Sequence[float] = (1e-3, 1e-2, 1e-1),
    num_starts: int = 16,
    num_steps: int = 20_000,
    tail: int = 256,
    seed: int = 0,
) -> LimitCycle:
    """Runs Adam (beta1 = 0) with constant steps and looks at the last ``tail`` iterates.

    Raises:
        ValueError: for a beta2 of 1 (there is no cycle), a batched problem, or what
            :func:`hessian_tools.quadratic.run` refuses.
    """
    if not 0 <= beta2 < 1 or problem.batched:
        raise ValueError(
            f"beta2 is {beta2} and batched {problem.batched}; below 1, and one problem, are needed"
        )
    runs = run(
        problem,
        "adam",
        beta2=beta2,
        step=list(steps),
        num_starts=num_starts,
        num_steps=num_steps,
        seed=seed,
        tail=tail,
        progress=False,
    )
    hessian = problem.hessian[0].cpu().numpy()
    losses = np.einsum("pesi,ij,pesj->pes", runs.tail, hessian, runs.tail) / 2 / runs.first_losses
    radius = np.abs(runs.tail).max(axis=(0, -1))
    eta = np.asarray(steps, dtype=np.float64)
    return LimitCycle(
        beta2,
        eta,
        lowest=losses.min(0),
        highest=losses.max(0),
        radius=radius / eta[:, None],
        period=_periods(runs.tail, radius),
    )


def _periods(tail: Floats, radius: Floats) -> NDArray[np.int_]:
    """(E, S) the least lag at which iterates (P, E, S, d) repeat, 0 for none."""
    periods = np.zeros(radius.shape, dtype=int)
    for lag in range(len(tail) // 2, 0, -1):  # the least is the last to be written
        apart = np.abs(tail[lag:] - tail[:-lag]).max(axis=(0, -1))
        periods[apart <= _SAME_ITERATE * radius] = lag
    return periods


def _gd_factors(problem: Quadratic, starts: Tensor, steps: Floats, num_steps: int) -> Tensor:
    """(T, E, S) f+ / f of gradient descent at every step, nan where not judged."""
    factors: dict[int, list[Tensor]] = {}  # by the piece's first run, in order of steps

    def observe(problems: slice, runs: slice, begin: int, relative: Tensor) -> None:
        window = _log_factors(relative)[:, 0].exp().cpu()
        factors.setdefault(runs.start, []).append(window)

    run(
        problem,
        "gd",
        step=steps,
        starts=starts[None] if problem.batched else starts,
        num_steps=num_steps,
        observe=observe,
        progress=False,
    )
    columns = [torch.cat(factors[first]) for first in sorted(factors)]
    return torch.cat(columns, dim=1).view(num_steps, len(steps), len(starts))


def _log_factors(relative: Tensor) -> Tensor:
    """log(f+ / f) from a window of losses, nan where a run has ended."""
    before, after = relative[:-1], relative[1:]
    judged = after.isfinite() & (before >= VANISHED) & (after >= VANISHED)
    return torch.where(judged, (after / before).log(), math.nan)


def _judged(margins: dict[str, list[Tensor]]) -> list[BoundCheck]:
    """A check for every bound, by name, from its margins on every step."""
    return [_check(name, torch.cat(parts)) for name, parts in margins.items()]


def _check(name: str, margins: Tensor) -> BoundCheck:
    kept = margins[~margins.isnan()]
    least = float(kept.min()) if len(kept) else math.nan
    return BoundCheck(name, len(kept), int((kept < -ROUNDING).sum()), least)


def check_rows(checks: Sequence[BoundCheck]) -> tuple[tuple[str, ...], list[list[str]]]:
    """A table, header and rows: steps that each bound was held against, and violations."""
    header = ("bound", "steps judged", "violations", "least margin (log)")
    rows = []
    for check in checks:
        bound = "GD lower bound" if check.name in GD_FORMS else "Adam upper bound"
        row = [
            f"{bound}: {check.name}",
            f"{check.steps:,}",
            f"{check.violations:,}",
            f"{check.margin:.2g}",
        ]
        rows.append(row)
    return header, rows
