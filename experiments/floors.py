"""What do readings say of blocks that have one and the same spectrum?

Protocol, fixed before any result: six blocks of 3000 rows with the same eigenvalues, of two kinds
(a Marchenko-Pastur bulk, and a bulk around 1e-4 with 20 outliers), 2 x 20, 4 x 40 and 10 x 100
Gaussian probes and steps, 20 seeds. The truth is 0 for every reading. The literature's readings are
given beside the floor that a run tells from groups of each block's own probes. Those of this
package are without a floor: given are their mean and, of the intervals stated, how many hold 0.

`python experiments/floors.py [--smoke]` writes results/floors: table.txt and all numbers.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from planted_spectra import Floats
from script import Script
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.heterogeneity.comparison import Found, compared
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.heterogeneity.readings import READINGS

BLOCKS = 6
SETTINGS = ((2, 20), (4, 40), (10, 100))
SIZE, SEEDS = 3000, 20
SMOKE_SIZE, SMOKE_SEEDS = 300, 2
HEADER = ("spectrum", "probes x steps", "reading", "mean", "sd", "floor told", "intervals hold 0")
OUT = Path("results/floors")


def spectra(size: int) -> dict[str, Floats]:
    rng = np.random.default_rng(5)
    samples = rng.standard_normal((size, 2 * size)) / np.sqrt(2 * size)
    signs = rng.choice([1, -0.3], size - 20)
    bulk = 1e-4 * 10 ** rng.normal(0, 0.7, size - 20) * signs
    return {
        "bulk": np.linalg.eigvalsh(samples @ samples.T),
        "network-like": np.append(bulk, 10 ** rng.uniform(-1.5, 0, 20)),
    }


def runs(eigenvalues: Floats, probes: int, steps: int, seeds: int) -> Iterator[dict[str, Found]]:
    operator = DiagonalOperator(torch.from_numpy(eigenvalues))
    options = {"num_probes": probes, "num_steps": steps, "probes": "gaussian", "exact": False}
    for seed in range(seeds):
        blocks = [ht.slq(operator, seed=seed, name=str(b), **options) for b in range(BLOCKS)]
        yield compared(blocks, list(READINGS), GridSettings())[0]


def line(reading: str, found: list[Found]) -> dict[str, float]:
    means = [one.mean for one in found]
    stated = [one for one in found if one.is_resolved]
    return {
        "mean": float(np.mean(means)),
        "sd": float(np.std(means, ddof=1)),
        "floor": float(np.mean([one.floor for one in found])),
        "stated": len(stated),
        "hold": sum(one.low <= 0 <= one.high for one in stated),
        "tolerable": READINGS[reading].tolerable,
    }


def row_of(key: str, numbers: dict[str, float]) -> list[str]:
    name, setting, reading = key.split("|")
    hold = f"{numbers['hold']:.0f} of {numbers['stated']:.0f}" if numbers["tolerable"] else "-"
    floor = "-" if numbers["tolerable"] else f"{numbers['floor']:.3g}"
    values = [f"{numbers['mean']:.3g}", f"{numbers['sd']:.2g}"]
    return [name, setting, reading, *values, floor, hold]


def main() -> None:
    run = Script(__doc__, OUT, smoke="blocks of 300 rows, two seeds: seconds").run()
    size, seeds = (SMOKE_SIZE, SMOKE_SEEDS) if run.smoke else (SIZE, SEEDS)
    settings = SETTINGS[:2] if run.smoke else SETTINGS
    lines = {}
    for (name, values), (k, m) in tqdm([*product(spectra(size).items(), settings)], disable=None):
        found = list(runs(values, k, m, seeds))
        for reading in READINGS:
            of_reading = [one[reading] for one in found]
            lines[f"{name}|{k} x {m}|{reading}"] = line(reading, of_reading)
    run.save(lines, {"size": size, "seeds": seeds, "settings": settings})
    rows = [row_of(key, numbers) for key, numbers in lines.items()]
    run.print_table(report.table(HEADER, rows, left=3))


if __name__ == "__main__":
    main()
