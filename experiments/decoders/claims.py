"""What the decoders' runs come to: a line a run, and tables made of these lines alone.

A sweep is *cut short* where its best rate is the last one tried on either side: then a better one
may lie beyond, and its width is at least what is told.
"""

import gzip
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import hessian_tools as ht
from decoders.tasks import Task, around
from hessian_tools.results import Journal
from hessian_tools.tables import table
from hessian_tools.training import Trajectory
from hessian_tools.training.sweeps import width

LINES = "lines.jsonl.gz"
CURVE = 40  # points of a run's smoothed losses that are kept
WORD = re.compile(r"(?P<claim>[abces]|seeds-a)-(?P<size>[0-9]+M)-(?P<variant>[a-z]+)-")
SETTING = re.compile(
    r"(?P<optimizer>\w+), rate (?P<rate>[^,]+)(, momentum (?P<momentum>[^,]+))?, "
    r"(?P<steps>\d+) steps, seed (?P<seed>\d+)"
)
HEADER = (
    "size",
    "variant",
    "optimizer",
    "momentum",
    "best rate",
    "loss",
    "held out",
    "width",
    "rates",
    "diverged",
    "ms a step",
    "state",
)
EFFECTIVE_HEADER = (
    "size",
    "step",
    "between logits",
    "in the embedding",
    "in other tensors, median",
    "largest",
    "between tensors",
)
Line = dict[str, Any]  # JSON-able
Key = tuple[str, str, str, str, float | None]


@dataclass(frozen=True)
class Sweep:
    """The rates of one optimizer with the first seed."""

    key: Key  # claim, size, variant, optimizer, momentum
    lines: list[Line]  # by rate, ascending

    @property
    def rates(self) -> np.ndarray:
        return np.array([line["rate"] for line in self.lines])

    @property
    def losses(self) -> np.ndarray:
        return np.array([number(line["loss"]) for line in self.lines])

    @property
    def best(self) -> Line:
        return self.lines[int(np.argmin(self.losses))]

    @property
    def is_cut_short(self) -> bool:
        return int(np.argmin(self.losses)) in (0, len(self.lines) - 1)

    @property
    def width(self) -> float:
        return width(self.rates, self.losses)


def number(given: float | None) -> float:
    """A loss as JSON has it: None where it is not finite."""
    return math.inf if given is None else given


def lines_of(journal: Path) -> list[Line]:
    """The runs of one task."""
    where = WORD.match(journal.name)
    assert where, journal
    found = []
    for name, run in Journal(journal).finished.items():
        setting = SETTING.fullmatch(name)
        assert setting, name
        found.append({**where.groupdict(), **setting.groupdict(), **measured(run)})
    for line in found:
        line["rate"] = float(line["rate"])
        line["momentum"] = None if line["momentum"] is None else float(line["momentum"])
        line["steps"], line["seed"] = int(line["steps"]), int(line["seed"])
    return found


def measured(run: Trajectory) -> Line:
    curve = run.smoothed()
    places = np.unique(np.linspace(0, run.steps - 1, CURVE).astype(int))
    return {
        "loss": finite(run.final),
        "held_out": finite(run.final_validation),
        "diverged": run.diverged,
        "stopped": run.stopped,
        "seconds_a_step": round(run.seconds_a_step, 5),
        "state_bytes": run.state_bytes,
        "curve_steps": (places + 1).tolist(),
        "curve": [finite(round(loss, 4)) for loss in curve[places].tolist()],
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def identity(line: Line) -> str:
    names = ("claim", "size", "variant", "optimizer", "rate", "momentum", "steps", "seed")
    return json.dumps([line[name] for name in names])


def packed(folder: Path) -> list[Line]:
    """All lines of a folder's lines.jsonl.gz, to which those of its parts are added."""
    path = folder / LINES
    old = gzip.decompress(path.read_bytes()).splitlines() if path.exists() else []
    known = {identity(line): line for line in map(json.loads, old)}
    parts = folder / "parts"
    for journal in sorted(parts.glob("*.jsonl")):
        known |= {identity(line): line for line in lines_of(journal)}
    lines = [known[name] for name in sorted(known)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    scratch = path.with_suffix(f".{os.getpid()}")  # another command may read beside this one
    scratch.write_bytes(gzip.compress(text.encode(), mtime=0))
    scratch.replace(path)
    return lines


def effective_rates(folder: Path) -> dict[str, Any]:
    """By size, of parts; else of an earlier result."""
    found = {
        path.stem.removeprefix("effective-"): ht.load(path.with_suffix(""))
        for path in sorted((folder / "parts").glob("effective-*.json"))
    }
    earlier = folder / "result"
    if not found and earlier.with_suffix(".json").exists():
        found = ht.load(earlier)["effective"]
    return found


def sweeps(lines: Iterable[Line]) -> list[Sweep]:
    """Those of the first seed, by claim, size and variant, the lowest loss first."""
    grouped: dict[Key, list[Line]] = defaultdict(list)
    for line in lines:
        if line["claim"] != "seeds-a":
            names = ("claim", "size", "variant", "optimizer", "momentum")
            grouped[tuple(line[name] for name in names)].append(line)
    found = [
        Sweep(key, sorted(some, key=lambda line: line["rate"])) for key, some in grouped.items()
    ]
    standard_first = {"standard": 0, "plain": 1}

    def place(sweep: Sweep) -> tuple[Any, ...]:
        claim, size, variant, _, _ = sweep.key
        return claim, size, standard_first[variant], number(sweep.best["loss"])

    return sorted(found, key=place)


def left(tasks: Iterable[Task], lines: Iterable[Line]) -> Iterator[Task]:
    """What the lines lack: rates of a grid, and what lies beyond a best rate that is the last."""
    known = {sweep.key: sweep for sweep in sweeps(lines)}
    for task in tasks:
        found = known.get((task.claim, task.size, task.variant, task.optimizer, task.momentum))
        if found is None or any(not np.isclose(found.rates, rate).any() for rate in task.rates):
            yield task
        elif found.is_cut_short:
            best = found.best["rate"]
            is_last = best == found.rates[-1]
            yield replace(task, rates=around(best, below=not is_last, above=is_last))


def row(sweep: Sweep, bytes_of_adam: dict[str, int]) -> list[str]:
    _, size, variant, optimizer, momentum = sweep.key
    best = sweep.best
    least = "at least " if sweep.is_cut_short else ""
    share = best["state_bytes"] / bytes_of_adam[size] if size in bytes_of_adam else math.nan
    diverged = sum(line["diverged"] for line in sweep.lines)
    return [
        size,
        variant,
        optimizer,
        "own" if momentum is None else f"{momentum:g}",
        f"{best['rate']:.2g}" + (" (end)" if sweep.is_cut_short else ""),
        f"{number(best['loss']):.3f}",
        f"{number(best['held_out']):.3f}",
        f"{least}{sweep.width:.2f}",
        str(len(sweep.lines)),
        str(diverged),
        f"{1000 * best['seconds_a_step']:.3g}",
        f"{100 * share:.0f} %",
    ]


def losses_text(found: Iterable[Sweep]) -> str:
    """Every loss by rate, on a line a sweep."""
    lines = []
    for sweep in found:
        claim, size, variant, optimizer, momentum = sweep.key
        name = optimizer if momentum is None else f"{optimizer} {momentum:g}"
        pairs = zip(sweep.rates, sweep.losses, strict=True)
        shown = ", ".join(f"{rate:.2g}: {loss:.3f}" for rate, loss in pairs)
        lines.append(f"{claim} {size} {variant} {name}: {shown}")
    return "losses by rate\n" + "\n".join(lines)


def closed_text(found: Iterable[Sweep]) -> str:
    """Of the gap between SGD and AdamW at their best, how much each sweep of claim c closes."""
    best = {sweep.key[1:4]: number(sweep.best["loss"]) for sweep in found if sweep.key[0] in "ac"}
    lines = []
    for (size, variant, optimizer), loss in best.items():
        sgd = best.get((size, variant, "sgd"))
        adam = best.get((size, variant, "adamw"))
        if sgd and adam and "adalayer" in optimizer:
            share = (sgd - loss) / (sgd - adam)
            lines.append(
                f"{size} {variant} {optimizer}: {100 * share:.0f} % of the gap from SGD to AdamW, "
                f"{100 * (loss / adam - 1):.1f} % above AdamW"
            )
    return "\n".join(lines)


def seeds_text(lines: Iterable[Line]) -> str:
    """How far seeds differ."""
    by_size: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["claim"] == "seeds-a":
            by_size[line["size"]].append(number(line["loss"]))
    told = [
        f"{size}: standard deviation of AdamW's loss at its best rate over {len(losses)} other "
        f"seeds {np.std(losses, ddof=1):.4f} (mean {np.mean(losses):.3f})"
        for size, losses in by_size.items()
        if len(losses) > 1
    ]
    return "\n".join(told)


def effective_text(effective: dict[str, Any]) -> str:
    """How far AdamW's effective rates spread, inside tensors and between them."""
    rows = []
    for size, found in effective.items():
        for place, step in enumerate(found["steps"].tolist()):
            quantiles = {name: np.log10(of[place]) for name, of in found["rates"].items()}
            rows.append([size, f"{step:,}", *spreads(quantiles)])
    return table(EFFECTIVE_HEADER, rows)


def spreads(quantiles: dict[str, np.ndarray]) -> list[str]:
    """Decades from the 5 % to the 95 % quantile, and between tensors' medians."""
    inside = {name: of[-1] - of[0] for name, of in quantiles.items()}
    # of all others the last layer and the embedding have rows that hardly any token touches
    others = [name for name in inside if name.startswith("blocks")]
    # a bias of keys changes no attention: its gradient is rounding
    medians = [quantiles[name][2] for name in others if not name.endswith("key_norm.bias")]
    numbers = (
        inside["by logit"],
        inside["tokens.weight"],
        float(np.median([inside[name] for name in others])),
        max(inside[name] for name in others),
        max(medians) - min(medians),
    )
    return [f"{number:.2f}" for number in numbers]


def text(lines: list[Line], effective: dict[str, Any]) -> str:
    """A table a claim."""
    found = sweeps(lines)
    bytes_of_adam = {
        sweep.key[1]: sweep.best["state_bytes"] for sweep in found if sweep.key[3] == "adamw"
    }
    parts = []
    for claim in sorted({sweep.key[0] for sweep in found}):
        rows = [row(sweep, bytes_of_adam) for sweep in found if sweep.key[0] == claim]
        parts.append(f"claim {claim}\n{table(HEADER, rows, left=3)}")
    if effective:
        parts.append(f"AdamW's effective rates, decades\n{effective_text(effective)}")
    parts += [closed_text(found), losses_text(found), seeds_text(lines)]
    return "\n\n".join(part for part in parts if part)
