"""What does the verdict say of every network of the zoo, and does anything measured contradict it?

Spectra of blocks are those that `js0_families.py` and the command line have left in results/ and,
for the large networks, of small inputs: they are computed here once, in a journal that the same
command goes on with. The verdict is the present one: this package's rule and calibration.

A verdict is *contradicted* by a race of this repository if it advises an optimizer and another one
has the lowest loss there. Told beside it: the race's order.

`python experiments/zoo_verdicts.py [--large] [--smoke]` writes results/zoo_verdicts; --large
computes what is missing of the large networks, in about half an hour.
"""

from collections.abc import Iterator
from pathlib import Path

from js0_families import block_spectra
from script import Script

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.heterogeneity.verdict import Verdict
from hessian_tools.problem import zoo
from hessian_tools.training.races import Race

OUT = Path("results/zoo_verdicts")
RESULTS = Path("results")
# a network at full size, on inputs small enough for minutes
LARGE: dict[str, dict[str, int]] = {
    "vgg16": {"image_size": 32, "num_examples": 4},
    "vit-base": {"image_size": 32, "num_examples": 4},
    "bert-base": {"context": 16, "num_examples": 2},
    "mlp-mixer": {"image_size": 32, "num_examples": 4},
}
PROBES, STEPS = 3, 10
SMOKE = {"mlp": {"num_examples": 2}}
SMOKE_PROBES, SMOKE_STEPS = 2, 4
HEADER = ("network", "decision", "scale", "curvature", "in a race of this repository")


def known_spectra() -> Iterator[tuple[str, ht.BlockSpectra]]:
    """What results/ holds, by network."""
    for folder in sorted((RESULTS / "js0_families" / "spectra").iterdir()):
        yield folder.name, ht.load(folder / "result")["spectra"]
    yield "gpt2", ht.load(RESULTS / "gpt2_official" / "result")["spectra"]


def computed(out: Path, small: bool) -> Iterator[tuple[str, ht.BlockSpectra]]:
    models, probes, steps = (SMOKE, SMOKE_PROBES, SMOKE_STEPS) if small else (LARGE, PROBES, STEPS)
    for name, knobs in models.items():
        yield name, block_spectra(name, knobs, probes, steps, out)


def race_of(name: str) -> Race | None:
    folder = RESULTS / f"race_{name.replace('-', '_')}"
    return ht.load(folder / "result")["race"] if folder.is_dir() else None


def told(race: Race | None) -> str:
    """The optimizers with their losses, the lowest first."""
    if race is None:
        return "-"
    size = race.batch_sizes[0]
    ranking = [f"{entry.optimizer} {entry.loss:.3g}" for entry in race.ranking(size)]
    return " < ".join(ranking)


def contradicted(verdict: Verdict, race: Race | None) -> bool:
    """The verdict names an optimizer, and another one won the race."""
    advised = verdict.decision.lower()
    if race is None or advised not in ("sgd", "adam"):
        return False
    return any(leader != advised for leader in race.leaders.values())


def main() -> None:
    script = Script(__doc__, OUT, smoke="one small network: seconds")
    script.add_argument("--large", action="store_true", help="compute what is missing")
    run = script.run()
    found = {} if run.smoke else dict(known_spectra())
    if run.smoke or run.options.large or (run.out / "spectra").is_dir():
        found |= dict(computed(run.out, run.smoke))
    rows, results = [], {}
    for name in sorted(found, key=zoo.names().index):
        js = ht.js_heterogeneity(found[name])
        race = race_of(name)
        cells = [js.told(reading) for reading in ("scale", "curvature")]
        rows.append([name, js.verdict.decision, *cells, told(race)])
        against = contradicted(js.verdict, race)
        results[name] = {"verdict": str(js.verdict), "contradicted": against}
        print(f"{name}: {js.verdict}\n", flush=True)
    run.save(results, {"networks": list(found)})
    wrong = [name for name, some in results.items() if some["contradicted"]]
    summary = f"contradicted by a race: {', '.join(wrong) or 'none'}"
    run.print_table(f"{report.table(HEADER, rows, left=2)}\n\n{summary}")


if __name__ == "__main__":
    main()
