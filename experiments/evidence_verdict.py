"""Does any reading predict what SGD loses to Adam, on families it has not seen?

The analysis that docs/evidence/protocol.md fixed before any run, of the committed lines alone:
results/evidence/runs.jsonl.gz (experiments/evidence_runs.py) and
results/evidence_readings/readings.jsonl (experiments/evidence_readings.py).

`python experiments/evidence_verdict.py [--draws 10000] [--held-out]` writes result.json, table.txt
(what decides, and a line of each other target) and targets.txt (all of the others) to
results/evidence_verdict. Only families that are not held out are looked at, unless
--held-out is given, once, after their table is committed; then the candidates are held against the
rest.
--smoke analyses planted numbers: one predictor is right, the others are noise.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence import FAMILIES, HELD_OUT, SUITE
from evidence.analysis import (
    DRAWS,
    Floats,
    Held,
    Sample,
    bar,
    candidates,
    correlation,
    held,
    survives,
)
from evidence.arms import LARGE, LONG, RACE, SEEDS, SHORT, SMALL
from evidence.gaps import TIE, Gap
from evidence.lines import Packed
from evidence.pair import BATCH_SIZE
from evidence.readings import PREDICTORS
from evidence_readings import known
from script import Run, Script

from hessian_tools.app import report
from hessian_tools.results import JsonObject

OUT = Path("results/evidence_verdict")
RUNS = Path("results/evidence/runs.jsonl.gz")
READINGS = Path("results/evidence_readings/readings.jsonl")
BASELINES = ("num_blocks", "num_parameters", "is_transformer", "is_text", "gradient_norm")
THE_RACE = "race of 200 steps"
MAIN = f"g1, {LONG} steps"
EXPLORATORY = ("simulated_block_progress", "simulated_adam_progress", "loss")
LOGARITHMS: dict[str, Callable[[float], float]] = {
    "js0": lambda value: math.log10(1 + value),
    "num_blocks": math.log10,
    "num_parameters": math.log10,
    "gradient_norm": math.log10,
}
LABELS = {
    "js0": "JS0",
    "log": "the log distance",
    "wasserstein": "the Wasserstein distance",
    "scale": "the spread of scales",
    "curvature": "the curvature distance",
    "block_progress": "the predicted progress of block rates",
    "adam_progress": "the predicted progress of Adam's diagonal",
    "gradient_range": "the range of gradient norms",
    "gradient_gini": "gradient heterogeneity",
    "top_spread": "the spread of top eigenvalues",
}
HEADER = ("", "Spearman", "95 % interval", "R2, families left out", "undefined")
OVERVIEW = ("other targets", "pairs", "best predictor", "Spearman", "by chance", "candidates")
Gaps = Mapping[tuple[str, str, int], Gap]


@dataclass(frozen=True)
class Data:
    """What was measured of some pairs, families side by side."""

    names: tuple[str, ...]
    families: tuple[str, ...]
    targets: dict[str, Floats]
    predictors: dict[str, Floats]
    baselines: dict[str, Floats]
    exploratory: dict[str, Floats]

    def sample(self, target: str) -> Sample:
        return Sample(self.families, self.targets[target])


def gathered(names: Iterable[str], gaps: Gaps, readings: Mapping[str, JsonObject]) -> Data:
    """Of the pairs that have a gap at the longest budget and readings."""
    kept = tuple(
        name
        for name in sorted(names)
        if (name, "main", LONG) in gaps and "predictors" in readings.get(name, {})
    )

    def of_gaps(arm: str, steps: int, what: Callable[[Gap], float]) -> Floats:
        found = [gaps.get((name, arm, steps)) for name in kept]
        return np.array([math.nan if gap is None else what(gap) for gap in found])

    def of_readings(name: str, place: str | None) -> Floats:
        lines = [readings[pair] for pair in kept]
        values = [(line[place] if place else line).get(name) for line in lines]
        log = LOGARITHMS.get(name, float)
        return np.array([math.nan if value is None else log(value) for value in values])

    targets = {
        MAIN: of_gaps("main", LONG, share),
        f"g1, {SHORT} steps": of_gaps("main", SHORT, share),
        f"g3, {LONG} steps": of_gaps("main", LONG, lambda gap: gap.g3),
        f"g3, {SHORT} steps": of_gaps("main", SHORT, lambda gap: gap.g3),
        "crossover in batch size": np.array([crossover(name, gaps) for name in kept]),
        f"g1 at a batch of {SMALL}, {LONG} steps": of_gaps("small-batch", LONG, share),
        f"g1 unclipped, {SHORT} steps": of_gaps("unclipped", SHORT, share),
    }
    baselines = {name: of_readings(name, "baselines") for name in BASELINES}
    baselines[THE_RACE] = of_gaps("race", RACE, share)
    exploratory = {
        name: of_readings(name, "baselines" if name == "loss" else None) for name in EXPLORATORY
    }
    return Data(
        kept,
        tuple(name.partition("/")[0] for name in kept),
        targets,
        {name: of_readings(name, "predictors") for name in PREDICTORS},
        baselines,
        exploratory,
    )


def share(gap: Gap) -> float:
    """g1, kept within -1 and 1; infinite where SGD diverged at every rate."""
    return float(np.clip(gap.g1, -1, 1))


def crossover(name: str, gaps: Gaps) -> float:
    """log2 of the batch size at which g1 passes a tie's edge, of 300 steps; nan where not tried.

    Below the smallest and above the largest batch it is a step beyond these.
    """
    arms = {SMALL: "small-batch", BATCH_SIZE: "main", LARGE: "large-batch"}
    found = [gaps.get((name, arm, SHORT)) for arm in arms.values()]
    if any(gap is None or math.isnan(gap.g1) for gap in found):
        return math.nan
    sizes = np.log2(list(arms))
    shares = [share(gap) - TIE for gap in found if gap is not None]
    if shares[0] > 0:
        return float(sizes[0] - 1)
    for place in (1, 2):
        if shares[place] > 0:
            step = shares[place - 1] / (shares[place - 1] - shares[place])
            return float(sizes[place - 1] + step * (sizes[place] - sizes[place - 1]))
    return float(sizes[-1] + 1)


def planted(families: int = 9, size: int = 3) -> Data:
    """Numbers where "block_progress" tells the gap of a family and nothing else tells anything."""
    random = np.random.default_rng(0)
    count = families * size
    truth = np.repeat(random.standard_normal(families), size)
    names = tuple(f"family-{place // size}/{place}" for place in range(count))
    predictors = {name: random.standard_normal(count) for name in PREDICTORS}
    predictors["block_progress"] = truth + 0.2 * random.standard_normal(count)
    target = truth + 0.2 * random.standard_normal(count)
    return Data(
        names,
        tuple(name.partition("/")[0] for name in names),
        {MAIN: target},
        predictors,
        {name: random.standard_normal(count) for name in [*BASELINES, THE_RACE]},
        {},
    )


# ---------------------------------------------------------------------------------------- in words


@dataclass(frozen=True)
class Analysed:
    """One target held against everything."""

    target: str
    pairs: int
    families: int
    predictors: dict[str, Held]
    baselines: dict[str, Held]
    exploratory: dict[str, Held]
    chance: float
    candidates: list[str]


def analysed(data: Data, target: str, draws: int) -> Analysed | None:
    """None where fewer than four families have the target."""
    sample = data.sample(target)
    defined = np.isfinite(sample.target)
    families = {name for name, there in zip(sample.families, defined, strict=True) if there}
    if len(families) < 4:
        return None

    def lines(values: Mapping[str, Floats]) -> dict[str, Held]:
        return {name: held(sample, array, draws) for name, array in values.items()}

    predictors, baselines = lines(data.predictors), lines(data.baselines)
    chance = bar(sample, list(data.predictors.values()), draws)
    to_beat = {name: line for name, line in baselines.items() if name != THE_RACE}
    pairs = int(defined.sum())
    return Analysed(
        target,
        pairs,
        len(families),
        predictors,
        baselines,
        lines(data.exploratory),
        chance,
        candidates(predictors, to_beat, chance, pairs),
    )


def text_of(found: Analysed) -> str:
    rows = []
    for group in (found.predictors, found.baselines, found.exploratory):
        ordered = sorted(group.items(), key=lambda item: -np.nan_to_num(item[1].correlation))
        rows += [[name, *row(line)] for name, line in ordered]
        rows.append([""] * len(HEADER))
    chosen = ", ".join(found.candidates) or "none"
    return (
        f"{found.target}: {found.pairs} pairs of {found.families} families\n"
        f"{report.table(HEADER, rows[:-1])}\n"
        f"the best of {len(found.predictors)} predictors reaches {found.chance:.2f} by chance in "
        f"5 of 100 cases; candidates: {chosen}"
    )


def overview(tables: Iterable[Analysed]) -> str:
    """A row a target: the best predictor, and what the best reaches by chance."""
    rows = []
    for found in tables:
        best, line = max(
            found.predictors.items(), key=lambda item: np.nan_to_num(item[1].correlation, nan=-1)
        )
        interval = f"{line.correlation:.2f} ({line.low:.2f} to {line.high:.2f})"
        chosen = ", ".join(found.candidates) or "none"
        rows.append([found.target, str(found.pairs), best, interval, f"{found.chance:.2f}", chosen])
    return report.table(OVERVIEW, rows, left=1)


def told(data: Data, tables: Iterable[Analysed]) -> list[str]:
    """What decides in full, and a line of each other target."""
    decides = [found for found in tables if found.target == MAIN]
    others = [found for found in tables if found.target != MAIN]
    texts = [summary(data), *map(text_of, decides)]
    return [*texts, overview(others)] if others else texts


def row(line: Held) -> list[str]:
    return [
        f"{line.correlation:.2f}",
        f"{line.low:.2f} to {line.high:.2f}",
        f"{line.r2:.2f}",
        str(line.undefined),
    ]


def confirmed(data: Data, names: Iterable[str], draws: int) -> dict[str, bool]:
    """By candidate: whether it survives on held-out families."""
    sample = data.sample(MAIN)
    chosen = list(names)
    to_beat = {name: values for name, values in data.baselines.items() if name != THE_RACE}
    return {
        name: survives(sample, data.predictors[name], to_beat, len(chosen), draws)
        for name in chosen
    }


def read(held_out: bool) -> Data:
    gaps = {key: gap for key, (gap, _) in Packed(RUNS).gaps().items()}
    names = [name for name, pair in SUITE.items() if (pair.family in HELD_OUT) == held_out]
    return gathered(names, gaps, known(READINGS))


def agreement(names: Iterable[str]) -> float:
    """Spearman's correlation between g1 of single seeds, at the longest budget: mean over seeds.

    What varies between seeds no reading can tell.
    """
    packed = Packed(RUNS)
    kept = sorted(names)
    by_seed = [
        np.array([share(found[name, "main", LONG][0]) for name in kept])
        for found in map(packed.gaps, SEEDS)
    ]
    return float(np.mean([correlation(x, y) for x, y in itertools.combinations(by_seed, 2)]))


def summary(data: Data) -> str:
    shares = data.targets[MAIN]
    ties = int((np.abs(shares) < TIE).sum())
    ahead = int((shares >= TIE).sum())
    return (
        f"{len(data.names)} pairs of {len(set(data.families))} families: Adam is ahead on {ahead}, "
        f"SGD on {int((shares <= -TIE).sum())}, {ties} are ties; median g1 "
        f"{np.nanmedian(shares):.3f}"
    )


def main() -> None:
    script = Script(__doc__, OUT, smoke="planted numbers: seconds")
    script.add_argument("--draws", type=int, default=DRAWS, metavar="N")
    script.add_argument("--held-out", action="store_true", help="once, at the end")
    run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    draws = 200 if run.smoke else run.options.draws
    data = planted() if run.smoke else read(held_out=False)
    if not data.names:
        raise SystemExit(
            f"no pair has both a gap and readings; run experiments/evidence_runs.py and "
            f"experiments/evidence_readings.py first ({len(FAMILIES)} families)"
        )
    tables = [found for name in data.targets if (found := analysed(data, name, draws))]
    texts = told(data, tables)
    if not run.smoke:
        texts[0] += f"; between seeds g1 correlates at {agreement(data.names):.2f}"
    others = [text_of(found) for found in tables if found.target != MAIN]
    result: dict[str, object] = {"open": tables, "points": points(data)}
    if run.options.held_out:
        chosen = next(table.candidates for table in tables if table.target == MAIN)
        rest = read(held_out=True)
        again = [found for name in rest.targets if (found := analysed(rest, name, draws))]
        verdicts = confirmed(rest, chosen, draws)
        result |= {"held out": again, "points held out": points(rest), "survives": verdicts}
        survivors = ", ".join(name for name, lives in verdicts.items() if lives) or "none"
        texts += [
            "HELD OUT",
            *told(rest, again),
            f"candidates: {len(chosen)}; survive: {survivors}",
        ]
        others += ["HELD OUT", *(text_of(found) for found in again if found.target != MAIN)]
    save(run, result)
    (run.out / "targets.txt").write_text("\n\n".join(others) + "\n")
    run.print_table("\n\n".join(texts))


def points(data: Data) -> JsonObject:
    """What a picture shows: every pair with its gap and what was to predict it."""
    columns = {**data.targets, **data.predictors, **data.baselines}
    return {
        name: {column: finite(values[place]) for column, values in columns.items()}
        for place, name in enumerate(data.names)
    }


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def save(run: Run, result: Mapping[str, object]) -> None:
    run.save(as_json(result), {"draws": run.options.draws})


def as_json(value: object) -> object:
    """Dataclasses as dicts, numbers that JSON lacks as None."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return finite(value) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
