"""What does SGD with momentum lose to Adam? Every pair of the suite, trained as the protocol says.

The protocol, fixed before any run: docs/evidence/protocol.md; as data: evidence/arms.py. The arms
are "main" (all pairs, 32 examples a batch, 300 and 1,000 steps), "race" (the baseline: 200 steps),
"small-batch" (8), "large-batch" (128, 300 steps) and "unclipped" (300 steps).

`python experiments/evidence_runs.py [--arms main] [--up-to 300] [--workers 2]` trains all that is
not held out. Every run is a line of a journal in results/evidence/journals, so that the same
command goes on after a kill; results/evidence/runs.jsonl.gz has all runs of the pairs that are
done, with the losses of those at the best rates: these are not trained again, and table.txt is
made from it alone. --table makes the table and trains nothing.
"""

import dataclasses
from pathlib import Path

from evidence import EVERY, FAMILIES, Pair
from evidence.arms import ARMS, Arm, pairs_of
from evidence.command import add_options, done, selected
from evidence.lines import Packed, lines_of
from evidence.tuning import tuned
from script import Run, Script

from hessian_tools.app import report
from hessian_tools.results import JsonObject

OUT = Path("results/evidence")
SMOKE_PAIRS = ("mlp/tanh-deep", "decoder-pre-norm/bytes")
SMOKE_BUDGETS = (5, 10)
HEADER = (
    "pair",
    "arm",
    "steps",
    "SGD's rate",
    "Adam's rate",
    "g1",
    "between seeds",
    "g3, decades",
)


def trained(
    name: str,
    arm_name: str,
    up_to: int | None,
    folder: Path,
    smoke: bool,
) -> list[JsonObject]:
    """The lines of one pair in one arm."""
    pair = EVERY[name]
    arm = ARMS[arm_name]
    if smoke:
        arm = dataclasses.replace(arm, budgets=SMOKE_BUDGETS)
    found, runs = tuned(pair, arm, folder / "journals", up_to)
    return list(lines_of(name, arm_name, found, runs))


def jobs(run: Run, pairs: list[Pair], packed: Packed) -> list[tuple[object, ...]]:
    """What the lines lack, an arm after the other, so that the main one is done first."""
    options = run.options
    names = [pair.name for pair in pairs]
    if options.interventions:
        return [(name, "main", options.up_to, run.out, False) for name in names]
    if run.smoke:
        return [(name, "main", None, run.out, True) for name in SMOKE_PAIRS]
    known = packed.gaps()

    def is_done(pair: Pair, arm: Arm) -> bool:
        asked = (steps for steps in arm.budgets if steps <= (options.up_to or steps))
        return all((pair.name, arm.name, steps) in known for steps in asked)

    return [
        (pair.name, arm, options.up_to, run.out, False)
        for arm in options.arms
        for pair in pairs_of(ARMS[arm], FAMILIES)
        if pair.name in names and not is_done(pair, ARMS[arm])
    ]


def table(packed: Packed) -> str:
    rows = []
    for (pair, arm, steps), (gap, rates) in packed.gaps().items():
        row = [pair, arm, str(steps), f"{rates['sgd']:.3g}", f"{rates['adam']:.3g}"]
        row += [f"{gap.g1:.3f}", f"{gap.g1_spread:.3f}", f"{gap.g3:.2f}"]
        rows.append(row)
    note = "g1 within 0.02 of 0 is a tie; positive: Adam is ahead"
    return f"{report.table(HEADER, rows, left=2)}\n\n{note}"


def results(packed: Packed) -> JsonObject:
    return {
        f"{pair}, {arm}, {steps} steps": {"g1": gap.g1, "g3": gap.g3, **rates}
        for (pair, arm, steps), (gap, rates) in packed.gaps().items()
    }


def main() -> None:
    script = Script(__doc__, OUT, smoke="two pairs, a few steps: half a minute")
    add_options(script)
    script.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    script.add_argument("--up-to", type=int, metavar="STEPS", help="(default: all budgets)")
    script.add_argument("--table", action="store_true", help="from the lines there are")
    run = script.run()
    packed = Packed(run.out / "runs.jsonl.gz")
    failures = []
    planned = [] if run.options.table else jobs(run, selected(script, run.options), packed)
    for given, lines, error in done(trained, planned, run.options.workers):
        pair, arm = given[:2]
        if error:
            failures.append(f"{pair}, {arm}: {error}")
            print(failures[-1], flush=True)
            continue
        packed.update(lines)
        packed.write()
        print(f"{pair}, {arm}: {len(lines)} runs", flush=True)
    run.save(results(packed), {"arms": list(ARMS), "failures": failures})
    run.print_table("\n".join([table(packed), *failures]))


if __name__ == "__main__":
    main()
