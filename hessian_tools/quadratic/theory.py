"""The theorems on gradient descent and Adam on quadratics: their constants, and what they predict.

With kappa of H and kappa_l of block l, and for Adam with beta1 = 0, beta2 = 1, eps = 0 (its
preconditioner stays frozen at the first gradient) C1_l = min_i |g_0,li| / lambda_max,l and
C2_l = max_i |g_0,li| / lambda_max,l:

    GD, lower bound    for any eta the worse of two starts (eigenvectors of mu and of L) has
                       f+ >= (1 - 2 / (kappa + 1))^2 f at every step
    Adam, upper bound  with eta = min_l C1_l, from almost every start,
                       f+ <= max_l (1 - 1 / (r kappa_l)) f,  r = max_l C2_l^2 / min_l C1_l^2

Sources: thesis arXiv 2608.16760, theorem 3.2 (lower bound); Zhang et al., NeurIPS 2024, arXiv
2402.16788, propositions 1 and 2. The lower bound's factor is max((1 - eta mu)^2, (1 - eta L)^2),
which is least at eta = 2 / (mu + L), where it is (1 - 2 / (kappa + 1))^2 exactly. The published
slides have 1 - 2 / kappa, which is larger: it is false at that step, and true for eta <= 1 / L, as
(1 - 1 / kappa)^2 > 1 - 2 / kappa.

The upper bound also holds with r' = max_l C2_l / min_l C1_l, not squared, and with the whole factor
squared: with D = diag(|g_0|) the eigenvalues of eta D^-1/2 H D^-1/2 are at most
eta max_l lambda_max,l / min_i |g_0,li| = 1 and at least 1 / (r' kappa_l) in block l, and f
contracts by the square of 1 minus the least of them.

:mod:`hessian_tools.quadratic.practice` holds the bounds against runs.

Shapes: N problems, S starts, L blocks, d coordinates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.quadratic.construction import from_blocks
from hessian_tools.quadratic.methods import METHOD_DEFAULTS
from hessian_tools.quadratic.preconditioning import (
    extremes,
    first_gradient_ratios,
    linear_iterations,
)
from hessian_tools.quadratic.problems import Quadratic, draw_starts, gaussian
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Floats

ADAM = METHOD_DEFAULTS["adam"]  # the theorem's


@registered
@dataclass(frozen=True, eq=False)
class Constants:
    """What the theorems are about, for N problems and S starts of each."""

    kappa: Floats  # (N,)
    block_kappas: Floats  # (N, L)
    c1: Floats  # (N, S, L)
    c2: Floats  # (N, S, L)
    r: Floats  # (N, S) max C2^2 / min C1^2
    tight_r: Floats  # (N, S) max C2 / min C1
    gd_lower: Floats  # (N,) (1 - 2 / (kappa + 1))^2
    gd_lower_slides: Floats  # (N,) 1 - 2 / kappa
    adam_upper: Floats  # (N, S) max_l (1 - 1 / (r kappa_l))
    adam_upper_tight: Floats  # (N, S) max_l (1 - 1 / (r' kappa_l))^2

    @property
    def adam_kappas(self) -> Floats:
        """(N, S, L) kappa_Adam,l = r kappa_l."""
        return self.r[..., None] * self.block_kappas[:, None]

    @property
    def adam_wins(self) -> NDArray[np.bool_]:
        """(N, S) the prediction: r max_l kappa_l <= kappa."""
        return self.adam_kappas.max(-1) <= self.kappa[:, None]


def constants(
    problem: Quadratic,
    *,
    num_starts: int = 100,
    seed: int = 0,
    starts: Tensor | None = None,
) -> Constants:
    """Constants and rates of both theorems.

    ``starts`` (N, S, d), or the first S that :func:`hessian_tools.quadratic.run` draws from
    ``seed``.
    """
    w0 = draw_starts(problem, num_starts, seed) if starts is None else starts
    c1, c2 = first_gradient_ratios(problem, w0 @ problem.hessian)
    tight = c2.amax(-1) / c1.amin(-1)
    kappa = problem.kappa
    worst = problem.block_kappas.amax(1)[:, None]
    values = {
        "kappa": kappa,
        "block_kappas": problem.block_kappas,
        "c1": c1,
        "c2": c2,
        "r": tight**2,
        "tight_r": tight,
        "gd_lower": (1 - 2 / (kappa + 1)) ** 2,
        "gd_lower_slides": 1 - 2 / kappa,
        "adam_upper": 1 - 1 / (tight**2 * worst),
        "adam_upper_tight": (1 - 1 / (tight * worst)) ** 2,
    }
    return Constants(**{name: value.cpu().numpy() for name, value in values.items()})


@registered
@dataclass(frozen=True)
class Scorecard:
    """How often "Adam beats GD when r max_l kappa_l <= kappa" was right over problems and
    starts."""

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


def score_prediction(
    problem: Quadratic,
    *,
    num_starts: int = 4,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> list[Scorecard]:
    """The prediction against iterations to ``tolerance``, for r and for r'.

    Adam wins when it needs fewer iterations, see :func:`gd_and_adam_iterations`.
    """
    starts = draw_starts(problem, num_starts, seed)
    exact = constants(problem, starts=starts)
    gd, adam = gd_and_adam_iterations(problem, starts, tolerance)
    won = adam < gd
    worst = exact.block_kappas.max(1)[:, None]
    cards = []
    for symbol, r in (("r", exact.r), ("r'", exact.tight_r)):
        predicted = r * worst <= exact.kappa[:, None]
        card = Scorecard(
            f"{symbol} max kappa_l <= kappa",
            predicted_and_won=int((predicted & won).sum()),
            predicted_and_lost=int((predicted & ~won).sum()),
            not_predicted_and_won=int((~predicted & won).sum()),
            not_predicted_and_lost=int((~predicted & ~won).sum()),
        )
        cards.append(card)
    return cards


def gd_and_adam_iterations(
    problem: Quadratic,
    starts: Tensor,
    tolerance: float,
) -> tuple[Floats, Floats]:
    """(N, S) iterations to ``tolerance`` of GD at 2 / (mu + L) and of the theorem's Adam at 1 /
    a_max.

    They are those of :func:`linear_iterations`, so that no run ends too early.
    """
    gd_step = (2 / (problem.smallest + problem.largest))[:, None]
    gd = linear_iterations(problem, "gd", starts, gd_step, tolerance)
    adam_step = 1 / extremes(problem, "adam", ADAM, starts)[1]
    adam = linear_iterations(problem, "adam", starts, adam_step, tolerance, **ADAM)
    return gd, adam


def random_problems(
    num_problems: int,
    *,
    block_sizes: Sequence[int] = (3, 3, 3),
    scale_decades: float = 4.0,
    inner_decades: float = 2.0,
    seed: int = 0,
) -> Quadratic:
    """N problems whose blocks have random scales and condition numbers, both log-uniform.

    Block l's eigenvalues are 10^(s + u x_i): s uniform on 0 .. ``scale_decades``, u on
    0 .. ``inner_decades``, and x_i on 0 .. 1 with both ends met.
    """
    blocks = []
    for index, n in enumerate(block_sizes):
        normal = gaussian(seed, f"random block {index}", num_problems, n + 2)
        # drawn as normal numbers, which belong to the seed on every machine
        uniform = torch.special.ndtr(normal)
        scale = scale_decades * uniform[:, :1]
        width = inner_decades * uniform[:, 1:2]
        inner = uniform[:, 2:].sort(dim=1).values
        if n > 1:
            inner[:, 0] = 0.0
            inner[:, -1] = 1.0
        blocks.append(10 ** (scale + width * inner))
    return from_blocks(blocks, seed=seed, name="random blocks", num_problems=num_problems)


def theory_rows(exact: Constants) -> list[list[str]]:
    """The theorems' constants in words and numbers; those of Adam are medians over starts."""
    worst = float(exact.block_kappas.max())
    r = float(np.median(exact.r))
    tight_r = float(np.median(exact.tight_r))
    upper = float(np.median(exact.adam_upper))
    upper_tight = float(np.median(exact.adam_upper_tight))
    lower = exact.gd_lower[0]
    wins = np.mean(exact.adam_wins)
    return [
        ["kappa", f"{exact.kappa[0]:.6g}"],
        ["max kappa_l", f"{worst:.6g}"],
        ["r = max C2^2 / min C1^2 (median)", f"{r:.4g}"],
        ["r' = max C2 / min C1 (median)", f"{tight_r:.4g}"],
        ["r max kappa_l (median)", f"{r * worst:.4g}"],
        ["starts with r max kappa_l <= kappa, where theory has Adam win", f"{wins:.0%}"],
        ["GD, factor of f a step, worst start at any step size, at least", f"{lower:.8g}"],
        ["Adam, factor of f a step, at most (median)", f"{upper:.8g}"],
        ["the same by r', squared", f"{upper_tight:.8g}"],
    ]
