"""Losses that transformers' Trainer keeps: ``trainer_state.json``, in its checkpoints.

A tracker's curves stand beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hessian_tools.results import JsonObject, load_json
from hessian_tools.training.trajectory import Floats

STATE = "trainer_state.json"


@dataclass(frozen=True, eq=False)
class LossLog:
    """Losses by step, as they were logged.

    Attributes:
        file: where they stand.
        training: (N, 2) steps and training losses, each a mean since the one before.
        held_out: (V, 2) steps and evaluation losses.
    """

    file: Path
    training: Floats
    held_out: Floats

    @property
    def last_step(self) -> float:
        """Of a training loss."""
        return float(self.training[-1, 0])


def find_logs(folder: Path) -> list[LossLog]:
    """Those in ``folder`` and below; files without a loss are none."""
    logs = [_log(file) for file in sorted(folder.rglob(STATE))]
    return [log for log in logs if len(log.training)]


def nearest_log(logs: Sequence[LossLog], file: Path) -> LossLog | None:
    """The one whose folder shares the most with that of ``file``; of several the longest."""

    def nearness(log: LossLog) -> tuple[int, float]:
        pairs = zip(file.parent.parts, log.file.parent.parts, strict=False)
        shared = sum(one == other for one, other in pairs)
        return shared, log.last_step

    return max(logs, key=nearness, default=None)


def _log(file: Path) -> LossLog:
    try:
        history = load_json(file).get("log_history")
    except ValueError:  # no file of a trainer's
        history = None
    lines = [line for line in history or () if isinstance(line, dict)]
    return LossLog(file, _column(lines, "loss"), _column(lines, "eval_loss"))


def _column(lines: Sequence[JsonObject], key: str) -> Floats:
    pairs = [(line["step"], line[key]) for line in lines if key in line and "step" in line]
    return np.array(pairs, dtype=float).reshape(-1, 2)
