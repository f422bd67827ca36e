"""The suite on which readings are held against training: what is in it, and what a step costs.

Processor time of a step of Adam, from 20 steps; rough, for it is to plan the runs by. The estimate
of an arm's cost counts 8 whole runs an optimizer and budget: the sweep's, some of them given up
half way, and two more seeds at the best rate; 5 for the race.

`python experiments/evidence_suite.py [--smoke]` writes results/evidence_suite: table.txt and the
numbers.
"""

import time
from pathlib import Path

from evidence import FAMILIES, HELD_OUT, SUITE, Pair
from evidence.arms import ARMS, OPTIMIZERS, Arm, pairs_of
from evidence.tuning import use_one_thread
from script import Script
from tqdm import tqdm

from hessian_tools.app import report
from hessian_tools.optimizers.named import make
from hessian_tools.training import train

OUT = Path("results/evidence_suite")
STEPS = 20
SMOKE_PAIRS = ("mlp/relu", "vit/mean-token")
HEADER = ("pair", "held out", "Transformer", "text", "parameters", "blocks", "ms a step")


def milliseconds(pair: Pair, batch_size: int, steps: int) -> float:
    """Processor time of a step, after as many that prepare the data."""
    stream = pair.stream(batch_size)
    for _ in range(2):
        model = pair.make_model(0)
        optimizer = make("adam", model)
        started = time.process_time()
        train(model, stream, optimizer, budget=steps, validate_every=0)
    return 1000 * (time.process_time() - started) / steps


def hours(arm: Arm, pairs: list[Pair], costs: dict[tuple[str, int], float]) -> dict[int, float]:
    """Core hours of an arm, by budget, for those of ``pairs`` whose costs are known."""
    known = [costs.get((pair.name, arm.batch_size), 0.0) for pair in pairs]
    runs = arm.runs * len(OPTIMIZERS)
    return {steps: sum(known) / 1000 * steps * runs / 3600 for steps in arm.budgets}


def estimates(costs: dict[tuple[str, int], float]) -> str:
    rows = []
    for arm in ARMS.values():
        for is_held_out in (False, True):
            pairs = [p for p in pairs_of(arm, FAMILIES) if (p.family in HELD_OUT) == is_held_out]
            for steps, cost in hours(arm, pairs, costs).items():
                kind = "held out" if is_held_out else "open"
                row = (arm.name, kind, str(len(pairs)), str(arm.batch_size), str(steps))
                rows.append((*row, f"{cost:.2f}"))
    return report.table(("arm", "families", "pairs", "batch size", "steps", "core hours"), rows, 2)


def measured(names: list[str], steps: int) -> dict[tuple[str, int], float]:
    """Milliseconds by pair and batch size, for every batch size that an arm has for the pair."""
    wanted = {
        (pair.name, arm.batch_size)
        for arm in ARMS.values()
        for pair in pairs_of(arm, FAMILIES)
        if pair.name in names
    }
    return {key: milliseconds(SUITE[key[0]], key[1], steps) for key in tqdm(sorted(wanted))}


def row(pair: Pair, cost: float) -> list[str]:
    flags = (pair.family in HELD_OUT, pair.traits.is_transformer, pair.traits.is_text)
    marks = ["yes" if flag else "" for flag in flags]
    return [pair.name, *marks, f"{pair.num_parameters:,}", str(pair.num_blocks), f"{cost:.0f}"]


def main() -> None:
    run = Script(__doc__, OUT, smoke="two pairs, two steps: ten seconds").run()
    use_one_thread()
    names = list(SMOKE_PAIRS) if run.smoke else list(SUITE)
    costs = measured(names, 2 if run.smoke else STEPS)
    rows = [row(SUITE[name], costs[name, ARMS["main"].batch_size]) for name in sorted(names)]
    counts = f"{len(SUITE)} pairs in {len(FAMILIES)} families, {len(HELD_OUT)} of them held out"
    saved = {f"{name}, batch size {size}": cost for (name, size), cost in costs.items()}
    run.save(saved, {"steps": STEPS, "held out": sorted(HELD_OUT)})
    run.print_table(f"{counts}\n\n{estimates(costs)}\n\n{report.table(HEADER, rows)}")


if __name__ == "__main__":
    main()
