"""Do the intervals of the readings cover the exact value as often as they say?

Protocol, fixed before any result:

- Ten families of blocks with known eigenvalues (experiments/planted_spectra.py): eight planted ones
  of six blocks of 300 rows, and the exact spectra of the weight blocks of a small Transformer and a
  small ResNet.
- Gaussian probes, whose law depends on the eigenvalues alone, so that a diagonal matrix stands for
  every matrix; for the two networks Rademacher probes as well, which need the eigenvectors.
- 300 seeds, 2, 4 and 8 probes. "scale" and "curvature" are read at 4 Lanczos steps, with which an
  adaptive run begins, "curvature" at 6 as well, "log" and "wasserstein" at 40.
- The exact value is the same reading of the exact spectra, for "log" and "wasserstein" on the axis
  that the run chose.
- An interval is stated unless the run says that its steps do not resolve the reading. Of those
  stated, between 92 and 98 in 100 shall cover. Where fewer than 30 are stated, nothing is claimed.

`python experiments/coverage.py [--smoke]` prints and writes results/coverage: a line a family,
number of probes and reading; the same command goes on where it was stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from planted_spectra import Floats, dense_blocks, networks, planted
from script import Run, Script
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.heterogeneity.comparison import Found, compared
from hessian_tools.heterogeneity.measure import GridSettings, Sampled, Workspace
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.spectra.gauss import ritz
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.quadrature import Quadrature

SEEDS, SMOKE_SEEDS = 300, 3
PROBES = (2, 4, 8)
READ_AT = {4: ("scale", "curvature"), 6: ("curvature",), 40: ("log", "wasserstein")}
LOW, HIGH = 0.92, 0.98
FEWEST = 30  # stated intervals, below which no share is claimed
HEADER = (
    "blocks",
    "probes",
    "reading",
    "steps",
    "exact",
    "mean",
    "sd",
    "error told",
    "stated",
    "covers",
    "",
)
OUT = Path("results/coverage")


@dataclass(frozen=True)
class Family:
    """Blocks by their eigenvalues, and by their eigenvectors where the probes need them."""

    eigenvalues: Sequence[Floats]
    eigenvectors: Sequence[Floats] | None = None  # None: Gaussian probes


def families(smoke: bool) -> dict[str, Family]:
    """All, or the first two."""
    found = {name: Family(eigenvalues) for name, eigenvalues in planted().items()}
    if smoke:
        return dict(list(found.items())[:2])
    for name, problem in networks().items():
        solved = [np.linalg.eigh(matrix) for matrix in dense_blocks(problem).values()]
        eigenvalues = [values for values, _ in solved]
        found[name] = Family(eigenvalues)
        found[f"{name}, ±1"] = Family(eigenvalues, [vectors for _, vectors in solved])
    return found


def exact(eigenvalues: Floats) -> Quadrature:
    operator = DiagonalOperator(torch.from_numpy(eigenvalues))
    return ht.slq(operator, num_probes=1, num_steps=1, exact=True)


def quadratures(family: Family, probes: int, steps: int, seeds: int) -> Iterator[list[Quadrature]]:
    """A run a seed: the quadratures of all blocks."""
    blocks = []
    for index, eigenvalues in enumerate(family.eigenvalues):
        vectors = family.eigenvectors[index] if family.eigenvectors else None
        rng = np.random.default_rng([index, probes, steps])
        blocks.append(list(_runs(eigenvalues, vectors, probes, steps, seeds, rng)))
    yield from (list(run) for run in zip(*blocks, strict=True))


def _runs(
    eigenvalues: Floats,
    vectors: Floats | None,
    probes: int,
    steps: int,
    seeds: int,
    rng: np.random.Generator,
) -> Iterator[Quadrature]:
    """The quadrature of one block, a seed after the other, in its eigenbasis."""
    size = len(eigenvalues)
    if vectors is None:
        start = rng.standard_normal((seeds * probes, size))
    else:
        start = rng.choice([-1.0, 1.0], (seeds * probes, size)) @ vectors
    operator = DiagonalOperator(torch.from_numpy(eigenvalues))
    run = lanczos(operator, torch.from_numpy(start), steps)
    nodes, weights, residuals = ritz(run.alphas, run.betas, run.steps)
    for seed in range(seeds):
        rows = slice(seed * probes, (seed + 1) * probes)
        yield Quadrature(
            nodes=nodes[rows],
            weights=weights[rows],
            residuals=residuals[rows],
            steps=run.steps[rows],
            size=size,
            num_matvecs=probes * steps,
            status="complete",
            probes="gaussian" if vectors is None else "rademacher",
            reorthogonalize="full",
        )


def true_value(reading: str, blocks: Sequence[Quadrature], workspace: Workspace) -> float:
    measure = READINGS[reading]
    assert isinstance(measure, Sampled)
    return measure.sample(Workspace(blocks, workspace.settings, workspace.axis)).mean


def counted(found: Sequence[Found], truths: Sequence[float]) -> dict[str, float]:
    """What a line of the table says of one reading over all seeds."""
    means = np.array([one.mean for one in found])
    true = np.array(truths)
    lows = np.array([one.low for one in found])
    highs = np.array([one.high for one in found])
    stated = ~np.isnan(lows)
    # a truth of zero has the rounding of its own computation
    covers = (lows <= true + 1e-9) & (true <= highs + 1e-9)
    return {
        "exact": float(true.mean()),
        "mean": float(means.mean()),
        "sd": float((means - true).std()),
        "error": float(np.median([one.standard_error for one in found])),
        "stated": float(stated.mean()),
        "covers": float(covers[stated].mean()) if stated.any() else float("nan"),
        "seeds": len(found),
    }


def lines_of(family: Family, probes: int, steps: int, seeds: int) -> dict[str, dict[str, float]]:
    readings = READ_AT[steps]
    truth = [exact(eigenvalues) for eigenvalues in family.eigenvalues]
    runs: dict[str, list[Found]] = {name: [] for name in readings}
    truths: dict[str, list[float]] = {name: [] for name in readings}
    for blocks in quadratures(family, probes, steps, seeds):
        found, workspace = compared(blocks, readings, GridSettings())
        for name in readings:
            runs[name].append(found[name])
            truths[name].append(true_value(name, truth, workspace))
    return {name: counted(runs[name], truths[name]) for name in readings}


def measured(run: Run, seeds: int, probes: Sequence[int]) -> dict[str, dict[str, float]]:
    """A line's name -> its numbers; lines that an earlier run has finished are read."""
    lines = {}
    blocks = families(run.smoke).items()
    for (name, family), k, m in tqdm([*product(blocks, probes, READ_AT)], disable=None):
        config = {"command": "coverage", "blocks": name, "probes": k, "steps": m, "seeds": seeds}
        key = f"{name}-{k}-{m}".replace(" ", "_").replace(",", "").replace("±", "plus-minus-")
        folder = RunFolder(run.out / "lines" / key, config)
        if not folder.result:
            folder.finish(lines_of(family, k, m, seeds))
            folder = RunFolder(folder.path, config)
        for reading, numbers in (folder.result or {}).items():
            lines[f"{name}|{k}|{reading}|{m}"] = numbers
    return lines


def row_of(key: str, numbers: dict[str, float]) -> list[str]:
    name, probes, reading, steps = key.split("|")
    is_claimed = numbers["stated"] * numbers["seeds"] >= FEWEST
    inside = LOW <= numbers["covers"] <= HIGH
    verdict = "" if inside else "too seldom" if numbers["covers"] < LOW else "too often"
    return [
        name,
        probes,
        reading,
        steps,
        f"{numbers['exact']:.4f}",
        f"{numbers['mean']:.4f}",
        f"{numbers['sd']:.4f}",
        f"{numbers['error']:.4f}",
        f"{100 * numbers['stated']:.0f} %",
        f"{100 * numbers['covers']:.1f} %" if is_claimed else "-",
        verdict if is_claimed else "not resolved",
    ]


def main() -> None:
    run = Script(__doc__, OUT, smoke="two families, 3 seeds, 4 probes: seconds").run()
    seeds = SMOKE_SEEDS if run.smoke else SEEDS
    probes = (4,) if run.smoke else PROBES
    lines = measured(run, seeds, probes)
    run.save(lines, {"seeds": seeds, "probes": probes})
    rows = [row_of(key, numbers) for key, numbers in lines.items()]
    table = report.table(HEADER, rows, left=3)
    claimed = [row for row in rows if row[-1] != "not resolved"]
    ends = {word: sum(row[-1] == word for row in claimed) for word in ("too seldom", "too often")}
    inside = len(claimed) - sum(ends.values())
    told = f"{inside} of {len(claimed)} lines cover {100 * LOW:.0f} to {100 * HIGH:.0f} %, "
    told += ", ".join(f"{count} {word}" for word, count in ends.items())
    silent = len(rows) - len(claimed)
    run.print_table(f"{table}\n\n{told}; {silent} state fewer than {FEWEST} intervals")


if __name__ == "__main__":
    main()
