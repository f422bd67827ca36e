"""The ten predictors of every pair of the suite, as it starts or a little later.

The protocol, fixed before any run: docs/evidence/protocol.md; definitions: evidence/readings.py. 4
batches of 32 examples; spectra by 2 probes of 40 steps.

`python experiments/evidence_readings.py [--workers 2] [--after PERCENT]` writes readings.jsonl, a
line a pair, and table.txt to results/evidence_readings. With --after 1 or 5 it reads the weights
after that part of a run of Adam at its best rate (experiments/evidence_runs.py, 1,000 steps, seed
0), and the folder is after_1 and so on in that one. Pairs that have a line are not measured again,
so the same command goes on after a kill. Those that failed are tried again.
"""

import json
from dataclasses import replace
from pathlib import Path

from evidence import EVERY
from evidence.arms import LONG
from evidence.command import add_options, done, selected
from evidence.lines import Packed
from evidence.readings import PREDICTORS, measured, trained
from script import Run, Script

from hessian_tools.app import report
from hessian_tools.results import JsonObject

OUT = Path("results/evidence_readings")
RUNS = Path("results/evidence/runs.jsonl.gz")
SMOKE_PAIRS = ("mlp/tanh-deep", "graph/convolutions")


def measured_at(name: str, smoke: bool, percent: float, rate: float) -> JsonObject:
    few = {"num_batches": 1, "num_steps": 10, "simulated": 2}
    pair = EVERY[name]
    steps = round(percent / 100 * LONG)
    model = trained(pair, rate, steps) if steps else None
    return measured(pair, **(few if smoke else {}), model=model)


def best_rates() -> dict[str, float]:
    """Adam's, by pair, at the longest budget."""
    return {
        pair: rates["adam"]
        for (pair, arm, steps), (_, rates) in Packed(RUNS).gaps().items()
        if (arm, steps) == ("main", LONG)
    }


def known(path: Path) -> dict[str, JsonObject]:
    """The lines by pair; a line torn by a kill is dropped."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["name"]] = line
    return found


def write(path: Path, lines: dict[str, JsonObject]) -> None:
    ordered = [lines[name] for name in EVERY if name in lines]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in ordered))
    scratch.replace(path)


def table(lines: dict[str, JsonObject]) -> str:
    rows = []
    for name, line in lines.items():
        values = [line.get("predictors", {}).get(predictor) for predictor in PREDICTORS]
        rows.append([name, *("-" if value is None else f"{value:.3g}" for value in values)])
    failures = [f"{name}: {line['error']}" for name, line in lines.items() if "error" in line]
    return "\n".join([report.table(("pair", *PREDICTORS), rows), *failures])


def measure(run: Run, names: list[str]) -> dict[str, JsonObject]:
    percent = run.options.after
    path = run.out / "readings.jsonl"
    lines = known(path)
    rates = best_rates() if percent else {}
    left = [
        name
        for name in names
        if "predictors" not in lines.get(name, {}) and (name in rates or not percent)
    ]
    jobs: list[tuple[object, ...]] = [
        (name, run.smoke, percent, rates.get(name, 0.0)) for name in left
    ]
    for (name, *_), line, error in done(measured_at, jobs, run.options.workers):
        lines[str(name)] = line if line is not None else {"name": name, "error": error}
        write(path, lines)
        print(f"{name}: {error or 'measured'}", flush=True)
    return lines


def main() -> None:
    script = Script(__doc__, OUT, smoke="two pairs, one batch: half a minute")
    add_options(script)
    script.add_argument("--after", type=float, default=0.0, metavar="PERCENT", help="of training")
    run = script.run()
    if run.options.after:
        run = replace(run, out=run.out / f"after_{run.options.after:g}")
    run.out.mkdir(parents=True, exist_ok=True)
    pairs = selected(script, run.options)
    names = list(SMOKE_PAIRS) if run.smoke else [pair.name for pair in pairs]
    lines = measure(run, names)
    run.save({name: line.get("predictors") for name, line in lines.items()}, {})
    run.print_table(table(lines))


if __name__ == "__main__":
    main()
