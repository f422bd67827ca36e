"""What SGD loses to Adam: the two numbers that are to be predicted, from runs at the best rates.

Letters: S seeds, T steps of a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.training import Trajectory

TIE = 0.02  # of the progress


@dataclass(frozen=True)
class Gap:
    """SGD against Adam at one budget, means over seeds.

    Attributes:
        g1: (L_sgd - L_adam) / (L_0 - L_adam); positive where Adam is better, nan where Adam has
            not come below the start.
        g3: log10 of the budget over the steps that the better needs to come to the other's final
            loss; negative where SGD is the better.
        g1_spread: standard deviation of g1 over seeds; nan with one.
    """

    g1: float
    g3: float
    g1_spread: float

    @property
    def is_tie(self) -> bool:
        return abs(self.g1) < TIE


def gap(sgd: Sequence[Trajectory], adam: Sequence[Trajectory]) -> Gap:
    """Of the runs of both, one a seed, in the same order.

    Final losses are means over the last tenth of the steps. Curves are smoothed in windows of 5 %
    of the steps before they are asked when they reach a loss.
    """
    start = float(np.mean([run.losses[0] for run in [*sgd, *adam]]))
    l_sgd = float(np.mean([run.final for run in sgd]))
    l_adam = float(np.mean([run.final for run in adam]))
    by_seed = [
        _share(one.losses[0], one.final, other.final) for one, other in zip(sgd, adam, strict=True)
    ]
    spread = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan
    g3 = _decades(adam, l_sgd) if l_adam <= l_sgd else -_decades(sgd, l_adam)
    return Gap(_share(start, l_sgd, l_adam), g3, spread)


def _share(start: float, l_sgd: float, l_adam: float) -> float:
    return (l_sgd - l_adam) / (start - l_adam) if l_adam < start else math.nan


def _decades(better: Sequence[Trajectory], level: float) -> float:
    """log10 of the budget over the mean steps to ``level``; an infinite level takes one step."""
    budget = better[0].num_steps
    steps = [run.steps_to(level) or budget for run in better]
    return math.log10(budget / float(np.mean(steps)))
