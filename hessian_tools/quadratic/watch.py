"""Looks through the losses of many runs, a window of steps at a time.

Shapes: n problems and r runs of each, K tolerances, T recorded steps, W steps of a window.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.quadratic.plan import Plan

DIVERGED = 1e12  # relative to the first loss
VANISHED = 1e-200  # relative to the first loss; less counts as zero


class Watch:
    """Notes which runs diverge, when they cross the tolerances, and the losses to be kept.

    Attributes:
        first: (n, r) losses at the starts.
        diverged_at: (n, r) step at which a run diverged, inf where it did not.
        reached: (n, r, K) first step at each tolerance, inf where not yet.
        losses: (n, r, T) relative losses at the recorded steps, nan where not yet.
    """

    def __init__(self, first: Tensor, plan: Plan) -> None:
        self.first = first
        self.tolerances = plan.tolerances
        self.recorded: NDArray[np.int_] = plan.recorded
        self.diverged_at = torch.full_like(first, math.inf)
        self.reached = self.diverged_at[..., None].repeat(1, 1, len(plan.tolerances))
        self.losses = first.new_full((*first.shape, len(self.recorded)), math.nan)
        self.losses[..., 0] = 1.0

    def window(self, begin: int, losses: Tensor) -> Tensor:
        """Takes the losses of the steps ``begin``, ``begin`` + 1, ..., (W + 1, n, r).

        Returns:
            them relative to the first, inf from where a run has diverged.
        """
        relative = self._without_diverged(begin, losses / self.first)
        self._note_crossings(begin, relative)
        self._keep_recorded(begin, relative)
        return relative

    def close(self) -> None:
        """Marks recorded losses of diverged runs that come after the last window as inf."""
        steps = torch.as_tensor(self.recorded, device=self.losses.device)
        self.losses.masked_fill_(steps >= self.diverged_at[..., None], math.inf)

    def settled(self, tolerance: float) -> Tensor:
        """(n, r) whether a run has come to ``tolerance``, one of those watched, or diverged."""
        k = self.tolerances.index(tolerance)
        return self.reached[..., k].isfinite() | self.diverged_at.isfinite()

    def _without_diverged(self, begin: int, relative: Tensor) -> Tensor:
        beyond = ~(relative <= DIVERGED)  # true where a loss is nan, as > is not
        newly = beyond.any(0) & self.diverged_at.isinf()
        self.diverged_at[newly] = begin + _first(beyond[:, newly])
        if not bool(self.diverged_at.isfinite().any()):
            return relative
        steps = torch.arange(begin, begin + len(relative), device=relative.device)
        # what comes after means nothing, even where it falls back below the limit
        return relative.masked_fill(steps[:, None, None] >= self.diverged_at, math.inf)

    def _note_crossings(self, begin: int, relative: Tensor) -> None:
        # the least loss of the window first: few runs cross a tolerance in it
        lowest = relative.amin(0)
        for k, tolerance in enumerate(self.tolerances):
            reached = self.reached[..., k]
            newly = (lowest <= tolerance) & reached.isinf()
            if bool(newly.any()):
                reached[newly] = begin + _first(relative[:, newly] <= tolerance)

    def _keep_recorded(self, begin: int, relative: Tensor) -> None:
        inside = (self.recorded > begin) & (self.recorded < begin + len(relative))
        kept = np.flatnonzero(inside)
        if not len(kept):  # most windows hold none, as steps are spaced in log t
            return
        rows = torch.as_tensor(self.recorded[kept] - begin, device=relative.device)
        columns = torch.as_tensor(kept, device=relative.device)
        self.losses[..., columns] = relative[rows].permute(1, 2, 0)


def _first(mask: Tensor) -> Tensor:
    """The first row of ``mask`` that is true, for each column; in float64, which has inf."""
    # argmax of bool is not implemented
    return mask.to(torch.uint8).argmax(0).double()
