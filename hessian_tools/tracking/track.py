"""What a tracker has measured: arrays by step, made from its journal or saved as a result.

Letters: T measurements.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hessian_tools.results import Journal, JsonObject, registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.tables import table

STEP, SECONDS = "step", "seconds"


@registered
@dataclass(frozen=True, eq=False)
class Track(Tabular, Drawable):
    """Readings along training.

    Attributes:
        steps: (T,) of the optimizer, ascending; 0 is before the first.
        readings: (T,) by name; nan where one was not taken then.
        seconds: (T,) that each measurement took.
    """

    steps: NDArray[np.int64]
    readings: dict[str, NDArray[np.float64]]
    seconds: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Mapping[str, JsonObject]) -> "Track":
        """From the lines of a journal."""
        ordered = sorted(lines.values(), key=lambda line: int(line[STEP]))
        names = dict.fromkeys(name for line in ordered for name in line)
        readings = {
            name: np.array([number(line.get(name)) for line in ordered])
            for name in names
            if name not in (STEP, SECONDS)
        }
        steps = np.array([line[STEP] for line in ordered], dtype=np.int64)
        return cls(steps, readings, np.array([line[SECONDS] for line in ordered], dtype=float))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Track":
        """From a journal's file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: one that is not as it was written.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no journal {path}; a Tracker writes one")
        # a run may be writing to it
        return cls.of(Journal(Path(path), repair=False).finished)

    def records(self) -> list[Record]:
        """A row a measurement and reading that was taken then."""
        return [
            {"step": int(step), "reading": name, "value": float(values[place])}
            for place, step in enumerate(self.steps)
            for name, values in self.readings.items()
            if np.isfinite(values[place])
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        """A row a measurement."""
        rows = [
            [str(step), *(f"{values[place]:.4g}" for values in self.readings.values())]
            for place, step in enumerate(self.steps)
        ]
        return table((STEP, *self.readings), rows)


def number(value: float | None) -> float:
    """JSON has no nan: it is None there."""
    return float("nan") if value is None else float(value)
