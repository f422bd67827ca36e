"""Which way of computing products a memory budget leads to, for networks of the zoo.

`python benchmarks/plan_table.py` prints a row a network and budget: recorded or rebuilt, what is
computed again instead of kept, micro-batches, probes at once, and the peak that the plan announces
(besides model and data). Nothing is measured but the trial products from which plans are made.
"""

import argparse

from hessian_tools import HessianOperator, Problem
from hessian_tools.app.report import table
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.problem import zoo

MODELS = ("gpt-nano", "gpt2-nano", "resnet-nano")
BUDGETS = ("100MB", "250MB", "500MB", "1GB", "2GB", "4GB", "8GB", "16GB")
SMOKE_BUDGETS = ("100MB", "16GB")
SMOKE_KNOBS = {"num_examples": 2}
SEED = 0
HEADER = ("network", "budget", "graphs", "computed again", "micro-batches", "probes", "peak")


def row_of(name: str, problem: Problem, budget: str) -> list[str]:
    """The plan for one budget, or why there is none."""
    try:
        hessian = HessianOperator(problem, memory=budget)
        plan = hessian.plan
    except ValueError as error:
        return [name, budget, f"none: {str(error).splitlines()[0]}", "", "", "", ""]
    row = [
        name,
        budget,
        "recorded" if plan.recorded else "rebuilt",
        str(plan.segments),
        str(len(plan.pieces)),
        str(plan.rows),
        format_bytes(plan.peak_bytes()),
    ]
    hessian.release()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one network, two budgets: seconds")
    smoke = parser.parse_args().smoke
    models = MODELS[:1] if smoke else MODELS
    budgets = SMOKE_BUDGETS if smoke else BUDGETS
    rows = []
    for name in models:
        made = zoo.load(name, seed=SEED, **(SMOKE_KNOBS if smoke else {}))
        problem = Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
        rows += [row_of(name, problem, budget) for budget in budgets]
    print(table(HEADER, rows, left=4))


if __name__ == "__main__":
    main()
