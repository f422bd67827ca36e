"""Ten thousand runs of 10,000 steps on 90-dimensional quadratics: seconds, operations, rate.

    PYTHONPATH=. python benchmarks/quadratic.py                # on all cores
    PYTHONPATH=. python benchmarks/quadratic.py --device cuda  # the same on a GPU
    PYTHONPATH=. python benchmarks/quadratic.py --table        # prints what was measured

The first writes benchmarks/results/quadratic.json, the second quadratic_cuda.json beside it.

10 problems of three 30 x 30 blocks (eigenvalues from {1,2,3}, {99,100,101}, {4998,4999,5000}, Haar
bases), 1,000 starts each, everything float64. A step of a run is a product with H, its loss, and
the method's update; losses of every step are looked at. "FLOP a step" are those of products,
counted by torch.utils.flop_counter; "products alone" is what those products take in the same pieces
on the same threads without the rest; "of the peak rate" compares with one large float64 matrix
product on the same machine.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_measure import hardware, named, operations, wait
from torch import Tensor

from hessian_tools import quadratic
from hessian_tools.app.report import table
from hessian_tools.quadratic import simulation
from hessian_tools.results import write_atomically

PROBLEMS, STARTS, STEPS = 10, 1000, 10_000
SMOKE = (2, 20, 130)
BLOCK, GROUPS = 30, ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))
TEXTBOOK = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "bias_correction": True}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient descent": ("gd", {"step": "optimal"}),
    "Adam, beta2 = 1": ("adam", {"step": "safe"}),
    "Adam, betas 0.9 and 0.999": ("adam", {"step": 0.01, **TEXTBOOK}),
}
RESULTS = Path(__file__).parent / "results"
COUNTED_STEPS, LARGE = 20, 2048


def problem(count: int, device: str) -> quadratic.Quadratic:
    draw = np.random.default_rng(0)
    blocks = [draw.choice(group, size=(count, BLOCK)) for group in GROUPS]
    return quadratic.from_blocks(blocks, num_problems=count, name="three blocks").to(device)


def counted(q: quadratic.Quadratic, method: str, settings: dict[str, Any]) -> float:
    """Floating-point operations of the products of one step of one run."""
    few, knobs, threads = q.part(slice(0, 1)), settings | {"step": 0.01}, torch.get_num_threads()

    def steps(number: int) -> int:
        return operations(
            lambda: quadratic.run(
                few, method, num_starts=2, num_steps=number, progress=False, **knobs
            )
        )

    torch.set_num_threads(1)  # the counter sees what its own thread does
    try:
        return (steps(2 * COUNTED_STEPS) - steps(COUNTED_STEPS)) / (2 * COUNTED_STEPS)
    finally:
        torch.set_num_threads(threads)


def products_alone(q: quadratic.Quadratic, starts: int, steps: int) -> float:
    """Seconds of the products of all runs, in the simulation's pieces and on its threads.

    Taken from a tenth of the steps.
    """
    device = q.hessian.device
    pieces = list(simulation.pieces_of(q.num_problems, starts, q.size, device.type))
    fewer = max(1, steps // 10)

    def one(piece: simulation.Piece) -> Tensor:
        problems, runs = piece
        part = q.part(problems)
        shape = (part.num_problems, runs.stop - runs.start, q.size)
        w = torch.randn(shape, dtype=torch.float64, device=device)
        out = torch.empty_like(w)
        multiply = simulation.product(part, w, out)
        for _ in range(fewer):
            multiply()
        return out[..., :1].sum()

    list(simulation.in_threads(one, pieces[:2], device.type))  # warm
    wait(device)
    started = time.perf_counter()
    list(simulation.in_threads(one, pieces, device.type))
    wait(device)
    return (time.perf_counter() - started) * steps / fewer


def peak_rate(device: torch.device) -> float:
    """FLOP/s of one large float64 product, the best of five."""
    a = torch.randn(LARGE, LARGE, dtype=torch.float64, device=device)
    taken = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        a @ a
        wait(device)
        taken.append(time.perf_counter() - started)
    return 2 * LARGE**3 / min(taken[1:])


def measured(q: quadratic.Quadratic, starts: int, steps: int, repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for label, (method, settings) in METHODS.items():
        quadratic.run(q, method, num_starts=2, num_steps=70, progress=False, **settings)  # warm
        taken = []
        for _ in range(repeats):
            wait(q.hessian.device)
            started = time.perf_counter()
            runs = quadratic.run(q, method, num_starts=starts, num_steps=steps, **settings)
            taken.append(time.perf_counter() - started)
        reached = float(np.isfinite(runs.iterations_to(1e-6)).mean())
        rows[label] = {
            "seconds": taken,
            "flop_a_step": counted(q, method, settings),
            "reached": reached,
            "diverged": float(runs.diverged.mean()),
        }
        print(f"{label}: {min(taken):.1f} s", flush=True)
    return rows


def as_table(found: dict[str, Any]) -> str:
    total = found["runs"] * found["steps"]
    rows = []
    for label, row in found["methods"].items():
        seconds = float(np.median(row["seconds"]))
        flop = row["flop_a_step"] * total
        rate = flop / seconds
        rows.append(
            [
                label,
                f"{seconds:.1f}",
                f"{1e9 * seconds / total:.0f}",
                f"{row['flop_a_step']:,.0f}",
                f"{rate / 1e9:.1f}",
                f"{100 * rate / found['peak_flop_per_second']:.0f} %",
                f"{found['products_alone_seconds']:.1f}",
            ]
        )
    header = (
        "method",
        "seconds",
        "ns a step",
        "FLOP a step",
        "GFLOP/s",
        "of the peak rate",
        "products alone, s",
    )
    title = f"{found['runs']:,} runs of {found['steps']:,} steps, d = 90, float64, "
    title += f"{named(found['hardware'])}; peak {found['peak_flop_per_second'] / 1e9:.0f} GFLOP/s"
    return "\n".join(
        [title + (f" ({found['note']})" if found["note"] else ""), table(header, rows)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of each method; all are kept (default: 1)"
    )
    parser.add_argument("--smoke", action="store_true", help="40 runs of 130 steps")
    parser.add_argument("--note", default="", help="kept with the numbers and printed above them")
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--table", action="store_true", help="print the table of the kept result")
    arguments = parser.parse_args()
    name = (
        "quadratic"
        + ("" if arguments.device == "cpu" else "_cuda")
        + ("_smoke" if arguments.smoke else "")
    )
    out = arguments.out or RESULTS / f"{name}.json"
    if arguments.table:
        print(as_table(json.loads(out.read_text())))
        return
    problems, starts, steps = SMOKE if arguments.smoke else (PROBLEMS, STARTS, STEPS)
    q = problem(problems, arguments.device)
    found = {
        "benchmark": "quadratic",
        "note": arguments.note,
        "hardware": hardware(q.hessian.device),
        "runs": problems * starts,
        "steps": steps,
        "methods": measured(q, starts, steps, arguments.repeats),
        "peak_flop_per_second": peak_rate(q.hessian.device),
        "products_alone_seconds": products_alone(q, starts, steps),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(found, indent=1).encode())
    print(as_table(found))


if __name__ == "__main__":
    main()
