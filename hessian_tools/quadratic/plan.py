"""What all runs of a simulation share, validated where a user's arguments come in.

Shapes: K tolerances, T recorded steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.quadratic.methods import Settings, settings_of
from hessian_tools.quadratic.problems import check_count

TOLERANCES = tuple(float(f"1e-{power}") for power in range(1, 13))
Observer = Callable[[slice, slice, int, Tensor], None]
"""Called with (problems, runs, step of the first row, losses), a window of steps at a time.

Losses (window + 1, n, r) are relative to the first of each run.
"""


@dataclass(frozen=True)
class Plan:
    """One method, how long it runs and what is kept of its runs; made by :func:`planned`."""

    method: str
    settings: Settings  # all of the method's
    num_steps: int
    tolerances: tuple[float, ...]  # (K,) relative losses, descending
    num_recorded: int
    tail: int  # last iterates kept
    stop_at: float | None  # one of the tolerances: runs that have come to it need not go on
    observe: Observer | None

    @property
    def recorded(self) -> NDArray[np.int_]:
        """(T,) steps whose losses are kept, evenly spaced in log t; 0 first."""
        spaced = np.geomspace(1, self.num_steps + 1, self.num_recorded)
        return np.unique(spaced.round().astype(int) - 1)


def planned(
    method: str,
    settings: Settings,
    num_steps: int,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    num_recorded: int = 200,
    tail: int = 0,
    stop_at: float | None = None,
    observe: Observer | None = None,
) -> Plan:
    """The plan of a simulation; missing settings take the method's defaults.

    Args:
        num_recorded: about how many losses of each run are kept.
    Raises:
        ValueError: for an unknown method or setting, or an argument out of range.
    """
    settings = settings_of(method, settings)
    check_count("num_steps", num_steps)
    check_count("num_recorded", num_recorded)
    watched = _watched(tolerances, stop_at)
    if not isinstance(tail, int) or tail < 0 or (tail and stop_at is not None):
        raise ValueError(
            f"tail is {tail!r} with stop_at {stop_at}; "
            "0 or more last iterates, without stopping early"
        )
    kept = min(tail, num_steps)
    return Plan(method, settings, num_steps, watched, num_recorded, kept, stop_at, observe)


def _watched(tolerances: Sequence[float], stop_at: float | None) -> tuple[float, ...]:
    every = tuple(tolerances)
    if stop_at is not None:
        every += (stop_at,)
    if not every or not all(0 < tolerance < 1 for tolerance in every):
        raise ValueError(f"tolerances are {every}; relative losses between 0 and 1 are needed")
    return tuple(sorted(set(every), reverse=True))
