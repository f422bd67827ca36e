"""Learning rate schedules: the factor on the rate, a pure function of the step.

``schedule(step, num_steps)`` is the factor of step ``step``, counted from 0, of a run of
``num_steps``. Warm-up and cosine are those of Zhao et al., Deconstructing What Makes a Good
Optimizer (arXiv 2407.07972): 10 % of the steps from a tenth of the rate, then down to a tenth.
"""

import functools
import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]


def cosine(
    step: int,
    num_steps: int,
    *,
    warm_up: float = 0.1,
    start: float = 0.1,
    end: float = 0.1,
) -> float:
    """Linear warm-up from ``start`` over a share ``warm_up`` of the steps, then a cosine to
    ``end``."""
    warming = round(warm_up * num_steps)
    if step < warming:
        return _warmed(step, warming, start)
    share = _share(step - warming, num_steps - warming)
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2


def linear(
    step: int,
    num_steps: int,
    *,
    warm_up: float = 0.1,
    start: float = 0.1,
    end: float = 0.0,
) -> float:
    """The same warm-up, then a straight line to ``end``."""
    warming = round(warm_up * num_steps)
    if step < warming:
        return _warmed(step, warming, start)
    return 1 - (1 - end) * _share(step - warming, num_steps - warming)


def constant(step: int, num_steps: int, *, warm_up: float = 0.0, start: float = 0.1) -> float:
    """1 after the warm-up, of which there is none by default."""
    warming = round(warm_up * num_steps)
    return _warmed(step, warming, start) if step < warming else 1.0


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "constant": constant}


def schedule_of(name: str, **options: float) -> Schedule:
    """The schedule of this name with its options set.

    Raises:
        ValueError: an unknown name, or a share outside [0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    for option, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{option} is a share of 1, from 0 to 1, got {value!r}")
    return functools.partial(SCHEDULES[name], **options)


def _warmed(step: int, warming: int, start: float) -> float:
    return start + (1 - start) * step / warming


def _share(step: int, num_steps: int) -> float:
    """Of the way from the first of ``num_steps`` to the last, which is 1."""
    return step / max(1, num_steps - 1)
