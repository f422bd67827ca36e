"""The theorems on gradient descent and Adam on quadratics, held against every step of every run.

With kappa of H, kappa_l of block l, and for Adam with beta1 = 0, beta2 = 1, eps = 0 (the preconditioner stays frozen at
the first gradient) C1_l = min_i |g_0,li| / lambda_max,l, C2_l = max_i |g_0,li| / lambda_max,l:

    GD, lower bound    for any eta the worse of two starts (eigenvectors of mu and of L) has
                       f+ >= (1 - 2 / (kappa + 1))^2 f at every step
    Adam, upper bound  with eta = min_l C1_l, from almost every start, f+ <= max_l (1 - 1 / (r kappa_l)) f
                       with r = max_l C2_l^2 / min_l C1_l^2

Sources: thesis arXiv 2608.16760, theorem 3.2 (lower bound); Zhang et al., NeurIPS 2024, arXiv 2402.16788, propositions
1 and 2. The lower bound's factor is max((1 - eta mu)^2, (1 - eta L)^2), which is least at eta = 2 / (mu + L), where it
is (1 - 2 / (kappa + 1))^2 exactly. The published slides have 1 - 2 / kappa, which is larger: false at that step, and
true for eta <= 1 / L, as (1 - 1 / kappa)^2 > 1 - 2 / kappa.

The upper bound also holds with r' = max_l C2_l / min_l C1_l, not squared, and with the whole factor squared: with
D = diag(|g_0|) the eigenvalues of eta D^-1/2 H D^-1/2 are at most eta max_l lambda_max,l / min_i |g_0,li| = 1 and at
least 1 / (r' kappa_l) in block l, and f contracts by the square of 1 minus the least of them.

Shapes: N problems, S starts, L blocks, d coordinates, E step sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hessian_tools.quadratic.methods import METHOD_DEFAULTS
from hessian_tools.quadratic.preconditioning import (
    extremes,
    first_gradient_ratios,
    linear_iterations,
)
from hessian_tools.quadratic.problems import Quadratic, draw_starts, from_blocks
from hessian_tools.quadratic.simulation import VANISHED
from hessian_tools.quadratic.sweeps import run
from hessian_tools.results import registered
from hessian_tools.spectra.probes import draw_probes

ADAM = METHOD_DEFAULTS["adam"]  # the theorem's
ROUNDING = (
    1e-12  # relative; a step's loss is known to about this, and a bound met exactly is no violation
)


@registered
@dataclass(frozen=True, eq=False)
class Constants:
    """What the theorems are about, for N problems and S starts of each."""

    kappa: np.ndarray  # (N,)
    block_kappas: np.ndarray  # (N, L)
    c1: np.ndarray  # (N, S, L)
    c2: np.ndarray  # (N, S, L)
    r: np.ndarray  # (N, S) max C2^2 / min C1^2
    tight_r: np.ndarray  # (N, S) max C2 / min C1
    gd_lower: np.ndarray  # (N,) (1 - 2 / (kappa + 1))^2
    gd_lower_slides: np.ndarray  # (N,) 1 - 2 / kappa
    adam_upper: np.ndarray  # (N, S) max_l (1 - 1 / (r kappa_l))
    adam_upper_tight: np.ndarray  # (N, S) max_l (1 - 1 / (r' kappa_l))^2

    @property
    def adam_kappas(self) -> np.ndarray:
        """(N, S, L) kappa_Adam,l = r kappa_l."""
        return self.r[..., None] * self.block_kappas[:, None]

    @property
    def adam_wins(self) -> np.ndarray:
        """(N, S) the prediction: r max_l kappa_l <= kappa."""
        return self.adam_kappas.max(-1) <= self.kappa[:, None]


@registered
@dataclass(frozen=True)
class BoundCheck:
    """A bound against practice; ``margin`` is the least of log(bound / f+) or log(f+ / bound), negative if violated."""

    name: str
    steps: int  # judged, over all runs
    violations: int
    margin: float


@registered
@dataclass(frozen=True)
class Scorecard:
    """How often "Adam beats GD when r max_l kappa_l <= kappa" was right over problems and starts."""

    name: str  # which constant the prediction used
    predicted_and_won: int
    predicted_and_lost: int
    not_predicted_and_won: int
    not_predicted_and_lost: int

    @property
    def precision(self) -> float:
        """Share of the predicted wins that were wins; nan when none was predicted."""
        predicted = self.predicted_and_won + self.predicted_and_lost
        return self.predicted_and_won / predicted if predicted else math.nan

    @property
    def recall(self) -> float:
        """Share of Adam's wins that were predicted; nan when it never won."""
        won = self.predicted_and_won + self.not_predicted_and_won
        return self.predicted_and_won / won if won else math.nan


@registered
@dataclass(frozen=True, eq=False)
class LimitCycle:
    """Where Adam with beta2 < 1 and a constant step ends: medians over starts, E step sizes."""

    beta2: float
    steps: np.ndarray  # (E,)
    lowest: np.ndarray = field(repr=False)  # (E, S) least f / f(w_0) over the tail
    highest: np.ndarray = field(repr=False)  # (E, S) largest
    radius: np.ndarray = field(repr=False)  # (E, S) largest |w_i| over the tail, in units of eta
    period: np.ndarray = field(
        repr=False
    )  # (E, S) steps after which iterates repeat to 1e-6 of the radius, 0: none found

    @property
    def exponent(self) -> float:
        """Slope of log of the median highest loss against log eta; 2 where the cycle's size is proportional to eta."""
        return float(np.polyfit(np.log(self.steps), np.log(np.median(self.highest, axis=1)), 1)[0])


def constants(
    problem: Quadratic, *, num_starts: int = 100, seed: int = 0, starts: Tensor | None = None
) -> Constants:
    """Constants and rates of both theorems; ``starts`` (N, S, d), or the first S that ``run`` draws from ``seed``."""
    w0 = draw_starts(problem, num_starts, seed) if starts is None else starts
    c1, c2 = first_gradient_ratios(problem, w0 @ problem.hessian)
    tight = c2.amax(-1) / c1.amin(-1)
    kappa, worst = problem.kappa, problem.block_kappas.amax(1)
    parts = (
        kappa, problem.block_kappas, c1, c2, tight**2, tight, (1 - 2 / (kappa + 1)) ** 2, 1 - 2 / kappa,
        1 - 1 / (tight**2 * worst[:, None]), (1 - 1 / (tight * worst[:, None])) ** 2,
    )  # fmt: skip
    return Constants(*(part.cpu().numpy() for part in parts))


def check_gd_bound(
    problem: Quadratic, *, num_steps: int = 300, relative_steps: Sequence[float] | None = None
) -> list[BoundCheck]:
    """The lower bound for gradient descent on every step, from the eigenvectors of mu and L, at many step sizes.

    Args:
        relative_steps: eta in units of 1 / L; 41 from 0.01 to 10 unless given. 2 / (mu + L) and 1 / L always join them.
    Returns:
        the thesis' form for every eta, and the slides' form for eta <= 1 / L and at eta = 2 / (mu + L).
    """
    grid = (
        np.geomspace(0.01, 10, 41)
        if relative_steps is None
        else np.asarray(relative_steps, dtype=np.float64)
    )
    vectors = torch.linalg.eigh(problem.hessian).eigenvectors
    found: dict[str, list[Tensor]] = {
        "thesis, any eta": [],
        "slides, eta <= 1/L": [],
        "slides, eta = 2/(mu+L)": [],
    }
    for i in range(problem.num_problems):
        one = problem.part(slice(i, i + 1))
        low, high, kappa = (float(x) for x in (one.smallest, one.largest, one.kappa))
        steps = np.array([2 / (low + high), 1 / high, *(grid / high)])
        factors = _factors(one, vectors[i, :, [0, -1]].T, steps, num_steps)  # (T, E, 2)
        worst = factors.amax(-1).log()
        thesis, slides = math.log((1 - 2 / (kappa + 1)) ** 2), math.log(1 - 2 / kappa)
        short = torch.as_tensor(steps <= (1 + 1e-15) / high)
        margins = worst - thesis, (worst - slides)[:, short], (worst - slides)[:, 0]
        for name, margin in zip(found, margins, strict=True):
            found[name].append(margin.flatten())
    return [_judged(name, torch.cat(margins)) for name, margins in found.items()]


def check_adam_bound(
    problem: Quadratic, *, num_starts: int = 100, num_steps: int = 1000, seed: int = 0
) -> list[BoundCheck]:  # fmt: skip
    """The upper bound for Adam on every step of runs with the theorem's step size, by r, by r', and by r' squared."""
    found = constants(problem, num_starts=num_starts, seed=seed)
    worst = found.block_kappas.max(1)[:, None]
    rates = {"r = max C2^2 / min C1^2": found.adam_upper, "r' = max C2 / min C1": 1 - 1 / (found.tight_r * worst),
             "r', factor squared": found.adam_upper_tight}  # fmt: skip
    bounds = {
        name: torch.as_tensor(rate, device=problem.hessian.device).log()
        for name, rate in rates.items()
    }
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
    return [_judged(name, torch.cat(parts)) for name, parts in margins.items()]


def random_problems(
    num_problems: int, *, block_sizes: Sequence[int] = (3, 3, 3), scale_decades: float = 4.0,
    inner_decades: float = 2.0, seed: int = 0,
) -> Quadratic:  # fmt: skip
    """N problems whose blocks' scales and own condition numbers are random: both uniform in the logarithm.

    Block l's eigenvalues are 10^(s + u x_i): s uniform on 0 .. ``scale_decades``, u on 0 .. ``inner_decades``, x_i on
    0 .. 1 with the ends met.
    """
    count, blocks = num_problems, []
    for index, n in enumerate(block_sizes):
        uniform = torch.special.ndtr(
            draw_probes(
                "gaussian", seed, f"random block {index}", count, n + 2, dtype=torch.float64
            )
        )
        inner = uniform[:, 2:].sort(dim=1).values
        if n > 1:
            inner[:, 0], inner[:, -1] = 0.0, 1.0
        blocks.append(
            10 ** (scale_decades * uniform[:, :1] + inner_decades * uniform[:, 1:2] * inner)
        )
    return from_blocks(blocks, seed=seed, name="random blocks", num_problems=count)


def score_prediction(
    problem: Quadratic, *, num_starts: int = 4, tolerance: float = 1e-6, seed: int = 0
) -> list[Scorecard]:
    """The prediction against iterations to ``tolerance``, GD at 2 / (mu + L), Adam at 1 / a_max, for r and for r'.

    Iterations are those of :func:`linear_iterations`, so that no run ends too early. Adam wins when it needs fewer.
    """
    w0 = draw_starts(problem, num_starts, seed)
    found = constants(problem, starts=w0)
    gd = linear_iterations(
        problem, "gd", w0, (2 / (problem.smallest + problem.largest))[:, None], tolerance
    )
    adam = linear_iterations(
        problem, "adam", w0, 1 / extremes(problem, "adam", ADAM, w0)[1], tolerance, **ADAM
    )
    won, worst, cards = adam < gd, found.block_kappas.max(1)[:, None], []
    for name, r in (
        ("r max kappa_l <= kappa", found.r),
        ("r' max kappa_l <= kappa", found.tight_r),
    ):
        said = r * worst <= found.kappa[:, None]
        cards.append(
            Scorecard(
                name, *(int(x.sum()) for x in (said & won, said & ~won, ~said & won, ~said & ~won))
            )
        )
    return cards


def limit_cycle(
    problem: Quadratic, *, beta2: float, steps: Sequence[float] = (1e-3, 1e-2, 1e-1), num_starts: int = 16,
    num_steps: int = 20_000, tail: int = 256, seed: int = 0,
) -> LimitCycle:  # fmt: skip
    """Runs Adam (beta1 = 0) with constant steps and looks at the last ``tail`` iterates of each run.

    Raises:
        ValueError: for a beta2 of 1 (there is no cycle), a batched problem, or what :func:`run` refuses.
    """
    if not 0 <= beta2 < 1 or problem.batched:
        raise ValueError(
            f"beta2 is {beta2} and batched {problem.batched}; below 1, and one problem, are needed"
        )
    runs = run(problem, "adam", beta2=beta2, step=list(steps), num_starts=num_starts, num_steps=num_steps, seed=seed,
               tail=tail, progress=False)  # fmt: skip
    losses = (
        np.einsum("pesi,ij,pesj->pes", runs.tail, problem.hessian[0].cpu().numpy(), runs.tail)
        / 2
        / runs.first_losses
    )
    radius = np.abs(runs.tail).max(axis=(0, -1))
    period = np.zeros(radius.shape, dtype=int)
    for lag in range(len(runs.tail) // 2, 0, -1):  # the smallest is the last to be written
        apart = np.abs(runs.tail[lag:] - runs.tail[:-lag]).max(axis=(0, -1))
        period[apart <= 1e-6 * radius] = lag
    eta = np.asarray(steps, dtype=np.float64)
    return LimitCycle(beta2, eta, losses.min(0), losses.max(0), radius / eta[:, None], period)


def _factors(problem: Quadratic, starts: Tensor, steps: np.ndarray, num_steps: int) -> Tensor:
    """(T, E, S) f+ / f of gradient descent at every step, nan where not judged."""
    seen: dict[tuple[int, int], Tensor] = {}

    def observe(problems: slice, runs: slice, begin: int, relative: Tensor) -> None:
        seen[runs.start, begin] = _log_factors(relative)[:, 0].exp().cpu()

    given = starts if problem.batched is False else starts[None]
    run(
        problem,
        "gd",
        step=steps,
        starts=given,
        num_steps=num_steps,
        observe=observe,
        progress=False,
    )
    columns = [
        torch.cat([seen[key] for key in sorted(seen) if key[0] == first])
        for first in sorted({k[0] for k in seen})
    ]
    return torch.cat(columns, dim=1).view(num_steps, len(steps), len(starts))


def _log_factors(relative: Tensor) -> Tensor:
    """log(f+ / f) from a window of losses, nan where a run has ended."""
    judged = relative[1:].isfinite() & (relative[:-1] >= VANISHED) & (relative[1:] >= VANISHED)
    return torch.where(judged, (relative[1:] / relative[:-1]).log(), math.nan)


def _judged(name: str, margins: Tensor) -> BoundCheck:
    kept = margins[~margins.isnan()]
    return BoundCheck(
        name, len(kept), int((kept < -ROUNDING).sum()), float(kept.min()) if len(kept) else math.nan
    )
