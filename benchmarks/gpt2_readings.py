"""GPT-2 at full size, 25 official blocks, 128 tokens: what `scale` and `curvature` to 5 % cost.

`python benchmarks/gpt2_readings.py` runs the command line twice in processes of their own, first
with a network that it has not verified before and then with one that it has, and writes products
and wall time (a whole process: imports, weights, planning, verification, products) to
results/fixed_costs/gpt2.txt.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hessian_tools.app.report import table
from hessian_tools.results import write_atomically

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "results" / "fixed_costs" / "gpt2.txt"
COMMAND = (
    "js0 --model gpt2 --blocks official --num-examples 1 --context 128 --memory 12GiB"
).split()
READINGS = {"scale": "spread of block scales", "curvature": "curvature [decades]"}
HEADER = ("network", "products", "whole process", *READINGS)


def one_run(cache: str) -> list[str]:
    """Products, seconds and both readings of one run."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hessian_tools", *COMMAND]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - started
    products = re.search(r"gpt2: (\d+) Hessian-vector products", done.stderr)
    assert products is not None
    lines = done.stdout.splitlines()
    found = [next(line for line in lines if line.startswith(title)) for title in READINGS.values()]
    readings = [line.split("]", 1)[1].strip() for line in found]
    return [products.group(1), f"{seconds:.0f} s", *readings]


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        rows = [
            ["not verified before", *one_run(cache)],
            ["verified before", *one_run(cache)],
        ]
    found = f"{table(HEADER, rows)}\n{os.cpu_count()} CPU cores\n"
    print(found, end="")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(TARGET, found.encode())


if __name__ == "__main__":
    main()
