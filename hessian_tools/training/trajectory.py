"""What a training run leaves: its losses by step, and how it ended.

Letters: T steps done, V validations.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hessian_tools.results import registered
from hessian_tools.shown import Drawable

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
FINAL_SHARE = 0.1  # of the steps done, over whose losses the final loss is the mean
SMOOTH_SHARE = 0.05  # of the steps asked for: the window in which a curve is smoothed


@registered
@dataclass(frozen=True, eq=False)
class Trajectory(Drawable):
    """A training run, finished, diverged or stopped early.

    Attributes:
        losses: (T,) of each step's batch, before the step; without a z-loss.
        learning_rates: (T,) of the optimizer's first group.
        gradient_norms: (T,) before clipping.
        validation_steps: (V,) steps done when the validation loss was taken.
        validation_losses: (V,) mean loss over the batches held out.
        num_steps: steps asked for.
        diverged: the loss or the gradient was NaN or infinite, or the loss stayed far above the
            start.
        stopped: given up early as hopeless.
        seconds: wall time of the steps done, in all sittings.
        state_bytes: of the optimizer's state at the end.
    """

    losses: Floats = field(repr=False)
    learning_rates: Floats = field(repr=False)
    gradient_norms: Floats = field(repr=False)
    validation_steps: Integers = field(repr=False)
    validation_losses: Floats = field(repr=False)
    num_steps: int
    diverged: bool
    stopped: bool
    seconds: float
    state_bytes: int

    @property
    def steps(self) -> int:
        """T."""
        return len(self.losses)

    @property
    def final(self) -> float:
        """The mean loss of the last tenth of the steps; infinite where the run diverged."""
        if self.diverged or not self.steps:
            return math.inf
        last = max(1, round(FINAL_SHARE * self.steps))
        return float(self.losses[-last:].mean())

    @property
    def final_validation(self) -> float:
        """The last validation loss; NaN where nothing is held out, infinite where it diverged."""
        if self.diverged:
            return math.inf
        return float(self.validation_losses[-1]) if len(self.validation_losses) else math.nan

    @property
    def seconds_a_step(self) -> float:
        """NaN before the first."""
        return self.seconds / self.steps if self.steps else math.nan

    def smoothed(self) -> Floats:
        """(T,) the mean of each loss and of those before it, in a window of 5 % of the steps."""
        return smoothed(self.losses, self.num_steps)

    def steps_to(self, level: float) -> int | None:
        """Steps until the smoothed loss is at most ``level`` for the first time; None if never."""
        reached = np.flatnonzero(self.smoothed() <= level)
        return int(reached[0]) + 1 if len(reached) else None


def smoothed(losses: Floats, num_steps: int) -> Floats:
    """See :meth:`Trajectory.smoothed`; the first windows are as long as there are losses."""
    window = max(1, round(SMOOTH_SHARE * num_steps))
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
