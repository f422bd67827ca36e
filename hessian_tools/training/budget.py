"""What a run or a race may spend: steps, or seconds."""

import re
from dataclasses import dataclass

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """A number of steps, or of seconds.

    Attributes: ``amount`` positive; ``unit`` "steps" or "seconds".

    Raises:
        ValueError: for anything else.
    """

    amount: float
    unit: str = "steps"

    def __post_init__(self) -> None:
        if self.unit not in ("steps", "seconds"):
            raise ValueError(f"unit must be 'steps' or 'seconds', got {self.unit!r}")
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"a budget must be positive and finite, got {self.amount!r}")
        if self.unit == "steps" and self.amount != int(self.amount):
            raise ValueError(f"a budget in steps must be a whole number, got {self.amount!r}")

    @property
    def steps(self) -> int | None:
        """None where it is in seconds."""
        return int(self.amount) if self.unit == "steps" else None

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def budget_of(given: "Budget | int | str") -> Budget:
    """A budget as it is, a whole number of steps, or words: "500steps", "90s", "5min", "1h".

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, Budget):
        return given
    if isinstance(given, int) and not isinstance(given, bool):
        return Budget(given)
    parts = re.fullmatch(r"([0-9]+\.?[0-9]*) *([a-z]+)", str(given))
    if parts:
        amount, unit = float(parts[1]), parts[2]
        if unit in ("step", "steps"):
            return Budget(amount)
        if unit in _UNITS:
            return Budget(amount * _UNITS[unit], "seconds")
    raise ValueError(f"a budget is steps or time, such as 500steps, 90s or 5min, got {given!r}")
