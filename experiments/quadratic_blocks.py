"""Three blocks: is one learning rate a block enough to beat Adam?

Claim (Adam-mini, arXiv 2406.16793, section 2): on three dense 30 x 30 blocks with eigenvalues drawn
from {1,2,3}, {99,100,101}, {4998,4999,5000}, gradient descent with three step sizes, each block's
own 2 / (L + mu), about 0.5, 0.01 and 0.0002, beats Adam, which beats gradient descent with one; on
the first block alone plain gradient descent beats Adam. No momentum anywhere, for a like
comparison.

`python experiments/quadratic_blocks.py [--smoke]` writes results/quadratic_blocks: the runs and the
step sizes. `python figures/quadratic_blocks.py` draws it.
"""

from pathlib import Path

import numpy as np
from script import Script

from hessian_tools import quadratic
from hessian_tools.app.report import table
from hessian_tools.quadratic import Quadratic, Runs

GROUPS = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
SIZE, STARTS, STEPS = 30, 48, 20_000
SMOKE = (6, 6, 600)  # the same in the small run
TOLERANCE, SEED = 1e-6, 0
# label -> method, settings, step
METHODS = {
    "blockwise GD": ("blockwise_gd", {}, "optimal"),
    "Adam-mini, β₂ = 1": ("adam_mini", {}, "safe"),
    "Adam, β₂ = 1": ("adam", {}, "safe"),
    "Adam, β₁ = 0, β₂ = 0.999": ("adam", {"beta2": 0.999, "bias_correction": True}, "best"),
    "GD": ("gd", {}, "optimal"),
}
OUT = Path("results/quadratic_blocks")


def problems(size: int) -> dict[str, Quadratic]:
    draw = np.random.default_rng(SEED)
    blocks = [draw.choice(group, size=size) for group in GROUPS]
    return {
        "three blocks": quadratic.from_blocks(blocks, seed=SEED, name="three blocks"),
        "first block alone": quadratic.from_blocks(blocks[:1], seed=SEED, name="first block alone"),
    }


def measured(q: Quadratic, starts: int, steps: int) -> dict[str, Runs]:
    """Runs of each of METHODS from the same starts."""
    runs = {}
    for label, (method, settings, step) in METHODS.items():
        runs[label] = quadratic.run(
            q,
            method,
            step=step,
            num_starts=starts,
            num_steps=steps,
            seed=SEED,
            **settings,
        )
    return runs


def own_steps(q: Quadratic) -> list[float]:
    """Each block's best step, 2 / (L + mu)."""
    return [float(2 / (e[0, 0] + e[0, -1])) for e in q.eigenvalues]


def rows_of(name: str, runs: dict[str, Runs]) -> list[list[str]]:
    rows = []
    for label, of in runs.items():
        low, middle, high = of.quantiles(TOLERANCE)
        step = f"{np.median(of.steps):.3g}"
        rows.append([name, label, step, f"{middle:,.0f}", f"{low:,.0f} - {high:,.0f}"])
    return rows


def main() -> None:
    run = Script(__doc__, OUT, smoke="blocks of 6, few steps: seconds").run()
    size, starts, steps = SMOKE if run.smoke else (SIZE, STARTS, STEPS)
    results = {}
    rows = []
    for name, q in problems(size).items():
        rates = own_steps(q)
        results[name] = {
            "runs": measured(q, starts, steps),
            "rates": np.array(rates),
            "heterogeneity": q.heterogeneity() if len(rates) > 1 else None,
        }
        rows += rows_of(name, results[name]["runs"])
    header = ("problem", "method", "step", f"iterations to {TOLERANCE:g}", "quartiles")
    print(table(header, rows, left=2))
    rates = ", ".join(f"{rate:.4g}" for rate in results["three blocks"]["rates"])
    print("each block's own step:", rates)
    run.save(results, {"size": size, "starts": starts, "steps": steps, "seed": SEED})


if __name__ == "__main__":
    main()
