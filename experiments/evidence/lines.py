"""Runs as lines of JSON: what is committed of the journals, and gaps computed from that alone.

A line tells the pair, the arm and the run, how the run ended, and, of the runs at the best rates,
all losses to four digits.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from evidence.gaps import Gap, gap
from evidence.tuning import Tuned
from hessian_tools.results import JsonObject
from hessian_tools.training import Trajectory

DIGITS = 4
_NAME = re.compile(r"(\w+), rate ([^,]+), momentum [^,]+, (\d+) steps, seed (\d+)")
Key = tuple[str, str, str]  # pair, arm, run


def lines_of(
    pair: str,
    arm: str,
    found: Iterable[Tuned],
    runs: dict[str, Trajectory],
) -> Iterator[JsonObject]:
    """A line for each of ``runs``, by name; with losses where it is one of ``found``."""
    best = {(tuned.optimizer, f"{tuned.rate:.6g}", tuned.num_steps) for tuned in found}
    for name, run in runs.items():
        optimizer, rate, num_steps, seed = parsed(name)
        line = {
            "pair": pair,
            "arm": arm,
            "run": name,
            "optimizer": optimizer,
            "rate": float(rate),
            "num_steps": num_steps,
            "seed": seed,
            "steps": run.steps,
            "final": finite(run.final),
            "validation": finite(run.final_validation),
            "diverged": run.diverged,
            "stopped": run.stopped,
            "seconds": round(run.seconds, 2),
        }
        if (optimizer, rate, num_steps) in best:
            line["losses"] = [rounded(loss) for loss in run.losses]
        yield line


def parsed(name: str) -> tuple[str, str, int, int]:
    """Optimizer, rate, steps and seed of a run's name."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ValueError(f"{name!r} is no name of a run of this experiment")
    return parts[1], parts[2], int(parts[3]), int(parts[4])


def finite(value: float) -> float | None:
    """None for nan and infinities, which JSON does not have."""
    return float(value) if np.isfinite(value) else None


def rounded(loss: float) -> float | None:
    return finite(float(f"{loss:.{DIGITS}g}"))


def trajectory_of(line: JsonObject) -> Trajectory:
    """The run of a line that has its losses, as far as gaps ask for it."""
    nothing = np.array([])
    return Trajectory(
        losses=np.array([np.nan if loss is None else loss for loss in line["losses"]]),
        learning_rates=nothing,
        gradient_norms=nothing,
        validation_steps=nothing.astype(np.int64),
        validation_losses=nothing,
        num_steps=line["num_steps"],
        diverged=line["diverged"],
        stopped=line["stopped"],
        seconds=line["seconds"],
        state_bytes=0,
    )


class Packed:
    """Lines in a gzip file, by pair, arm and run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = gzip.decompress(path.read_bytes()).decode() if path.exists() else ""
        self.lines: dict[Key, JsonObject] = {}
        self.update(json.loads(text) for text in content.splitlines())

    def update(self, lines: Iterable[JsonObject]) -> None:
        for line in lines:
            self.lines[line["pair"], line["arm"], line["run"]] = line

    def write(self) -> None:
        """All lines in order; at once, so that a kill leaves the file before or after."""
        ordered = [self.lines[key] for key in sorted(self.lines)]
        text = "".join(json.dumps(line) + "\n" for line in ordered)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_bytes(gzip.compress(text.encode(), mtime=0))
        scratch.replace(self.path)

    def gaps(
        self,
        seed: int | None = None,
    ) -> dict[tuple[str, str, int], tuple[Gap, dict[str, float]]]:
        """By pair, arm and steps: the gap, and the best rates of the optimizers.

        Of one ``seed`` alone, or of all.
        """
        best: dict[tuple[str, str, int], dict[str, list[JsonObject]]] = {}
        for line in self.lines.values():
            if "losses" in line and seed in (None, line["seed"]):
                key = (line["pair"], line["arm"], line["num_steps"])
                best.setdefault(key, {}).setdefault(line["optimizer"], []).append(line)
        found = {}
        for key, by_optimizer in sorted(best.items()):
            if set(by_optimizer) == {"sgd", "adam"}:
                runs = {
                    optimizer: [trajectory_of(line) for line in _by_seed(lines)]
                    for optimizer, lines in by_optimizer.items()
                }
                rates = {optimizer: lines[0]["rate"] for optimizer, lines in by_optimizer.items()}
                found[key] = (gap(runs["sgd"], runs["adam"]), rates)
        return found


def _by_seed(lines: Iterable[JsonObject]) -> list[JsonObject]:
    return sorted(lines, key=lambda line: line["seed"])
