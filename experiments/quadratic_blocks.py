"""Three blocks: is one learning rate a block enough to beat Adam?

Claim (Adam-mini, arXiv 2406.16793, section 2): on three dense 30 x 30 blocks with eigenvalues drawn from {1,2,3},
{99,100,101}, {4998,4999,5000}, gradient descent with three step sizes, each block's own 2 / (L + mu), about 0.5, 0.01
and 0.0002, beats Adam, which beats gradient descent with one; on the first block alone plain gradient descent beats
Adam. No momentum anywhere, for a like comparison. `python figures/quadratic_blocks.py` draws it.
"""

import argparse
from pathlib import Path

import numpy as np

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.app.report import table
from hessian_tools.quadratic import Quadratic, Runs

GROUPS = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
SIZE, STARTS, STEPS, TOLERANCE, SEED = 30, 48, 20_000, 1e-6, 0
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
    found = {}
    for label, (method, settings, step) in METHODS.items():
        found[label] = quadratic.run(
            q, method, step=step, num_starts=starts, num_steps=steps, seed=SEED, **settings
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="blocks of 6, few steps: seconds")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    size, starts, steps = (6, 6, 600) if arguments.smoke else (SIZE, STARTS, STEPS)
    found, rows = {}, []
    for name, q in problems(size).items():
        rates = [float(2 / (e[0, 0] + e[0, -1])) for e in q.eigenvalues]
        found[name] = {
            "runs": measured(q, starts, steps),
            "rates": np.array(rates),
            "heterogeneity": None,
        }
        if len(rates) > 1:
            found[name]["heterogeneity"] = q.heterogeneity()
        for label, runs in found[name]["runs"].items():
            low, middle, high = runs.quantiles(TOLERANCE)
            rows.append(
                [
                    name,
                    label,
                    f"{np.median(runs.steps):.3g}",
                    f"{middle:,.0f}",
                    f"{low:,.0f} - {high:,.0f}",
                ]
            )
    header = ("problem", "method", "step", f"iterations to {TOLERANCE:g}", "quartiles")
    print(table(header, rows, left=2))
    print(
        "each block's own step:",
        ", ".join(f"{rate:.4g}" for rate in found["three blocks"]["rates"]),
    )
    ht.save(
        found, out / "result", config={"size": size, "starts": starts, "steps": steps, "seed": SEED}
    )


if __name__ == "__main__":
    main()
