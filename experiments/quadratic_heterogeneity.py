"""Which reading of heterogeneity predicts how much Adam gains over gradient descent?

Case 3 and case 4 have the same nine eigenvalues in other blocks. There are 280 ways to put nine
eigenvalues into three blocks of three; every one is taken, from the homogeneous case 4 to the
heterogeneous case 3: the spectrum, so GD's speed, stays the same. As those nine lie in three tight
groups, so that readings take few values, the dial is turned a second time with twelve eigenvalues
evenly spaced in log from 1 to kappa in four blocks: sorted into blocks by their logarithm plus
noise of SPREADS times its range. The gain is the ratio of median iterations to 1e-6, GD at 2 / (mu
+ L) over Adam (beta2 = 1, beta1 = 0) at 1 / a_max, over random bases and starts. Readings are those
of exact spectra; rank correlations (Spearman) have 95 % intervals by resampling the assignments.
Then case 3 with its basis turned: within blocks, and as a whole, which destroys the blocks, so that
theory has Adam lose.

`python experiments/quadratic_heterogeneity.py [--smoke]` writes results/quadratic_heterogeneity:
readings and gain of every assignment, correlations, rotations.
`python figures/quadratic_heterogeneity.py` draws it.
"""

from collections import defaultdict
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from script import Script
from tqdm import tqdm

from hessian_tools import quadratic
from hessian_tools.app.report import table
from hessian_tools.quadratic import Quadratic
from hessian_tools.quadratic.theory import gd_and_adam_iterations

KAPPA = 2000
BASES, STARTS = 12, 12  # random bases of a problem, starts in each
TOLERANCE, SEED = 1e-6, 0
ANGLES = (0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2)
SPREADS = (0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 2.0)  # noise of the second dial
EACH = 32  # assignments of each noise
TURNED = 40  # bases of the rotation study
RESAMPLES = 2000
EVERY = 24  # in the small run one assignment of so many
NAMES = {
    "kappa": "1 / max kappa_l",
    "wasserstein": "Wasserstein, log axis",
    "spread": "spread of block scales",
    "log": "JS, log axis",
    "bounded": "JS bounded",
    "unnormalised": "JS0 (literature)",
}
READINGS = ("wasserstein", "log", "bounded", "unnormalised")
OUT = Path("results/quadratic_heterogeneity")


def assignments(values: list[float]) -> list[list[list[float]]]:
    """All ways to put nine values into three blocks of three; the blocks' order does not count."""
    ways = []
    for two in combinations(range(1, 9), 2):
        rest = [i for i in range(1, 9) if i not in two]
        for pair in combinations(rest[1:], 2):
            last = tuple(i for i in rest[1:] if i not in pair)
            groups = ((0, *two), (rest[0], *pair), last)
            ways.append([[values[i] for i in group] for group in groups])
    return ways


def noisy_assignments(each: int) -> list[list[list[float]]]:
    """Twelve log-spaced values in four blocks of three, from sorted to random."""
    draw = np.random.default_rng(SEED)
    place = np.linspace(0, 1, 12)
    ways = []
    for spread in SPREADS:
        for _ in range(each):
            order = np.argsort(place + spread * draw.normal(size=12))
            ways.append((KAPPA ** place[order]).reshape(4, 3).tolist())
    return ways


def gain(q: Quadratic, starts: int) -> np.ndarray:
    """(2,) median iterations of GD and of Adam over problems and starts, in closed form."""
    w0 = quadratic.draw_starts(q, starts, SEED)
    gd, adam = gd_and_adam_iterations(q, w0, TOLERANCE)
    return np.array([np.median(gd), np.median(adam)])


def in_place(blocks: list[list[float]]) -> int:
    """How many of the nine eigenvalues are in the block where case 3 has them.

    The blocks are named so that the number is largest.
    """
    group = {1: 0, 2: 0, 3: 0, 99: 1, 100: 1, 101: 1}  # the others are in group 2
    counts = np.zeros((3, 3), dtype=int)
    for number, block in enumerate(blocks):
        for value in block:
            counts[number, group.get(value, 2)] += 1
    return max(int(counts[range(3), order].sum()) for order in permutations(range(3)))


def dialled(chosen: list[list[list[float]]], bases: int, starts: int) -> dict[str, np.ndarray]:
    """Readings and gain of every assignment, each (A,)."""
    columns: dict[str, list[float]] = defaultdict(list)
    for blocks in tqdm(chosen, desc="assignments", disable=None):
        q = quadratic.from_blocks(blocks, seed=SEED, num_problems=bases)
        js = q.heterogeneity()
        gd, adam = gain(q, starts)
        place = in_place(blocks) if len(blocks) == 3 else np.nan
        columns["gd"].append(float(gd))
        columns["adam"].append(float(adam))
        columns["spread"].append(float(js.scale_spread.value))
        columns["kappa"].append(float(1 / q.block_kappas[0].amax()))
        columns["place"].append(float(place))
        for name in READINGS:
            columns[name].append(float(js.readings[name].mean))
    return {name: np.array(values) for name, values in columns.items()}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(3,) Spearman's rho and its 95 % interval; nan for a reading that never changes."""
    if np.ptp(x) <= 1e-9 * np.abs(x).max():
        return np.full(3, np.nan)
    draw = np.random.default_rng(SEED)
    picks = draw.integers(len(x), size=(RESAMPLES, len(x)))
    resampled = [spearmanr(x[p], y[p]).statistic for p in picks if np.ptp(x[p]) > 0]
    return np.array([spearmanr(x, y).statistic, *np.quantile(resampled, (0.025, 0.975))])


def turned(bases: int, starts: int, angles: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Gain of case 3 turned by each angle, (angles, 3): tau, GD's and Adam's median iterations."""
    rotations = {}
    for scope in ("blocks", "whole"):
        start = quadratic.case(3, kappa=KAPPA, seed=SEED, num_problems=bases)
        rows = []
        for angle in angles:
            q = quadratic.rotated(start, torch.full((bases,), angle), seed=SEED, scope=scope)
            rows.append([float(q.tau.median()), *gain(q, starts)])
        rotations[scope] = np.array(rows)
    return rotations


def correlation_rows(family: str, correlations: dict[str, np.ndarray]) -> list[list[str]]:
    rows = []
    for name, (rho, low, high) in correlations.items():
        cells = ["constant", ""] if np.isnan(rho) else [f"{rho:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append([family, NAMES[name], *cells])
    return rows


def best_reading(correlations: dict[str, dict[str, np.ndarray]]) -> tuple[str, float]:
    """The reading whose intervals reach down least over all families, and how far they reach."""
    lowest = {name: min(by[name][1] for by in correlations.values()) for name in NAMES}
    known = [name for name in NAMES if not np.isnan(lowest[name])]
    best = max(known, key=lambda name: lowest[name])
    return best, lowest[best]


def families_of(smoke: bool) -> dict[str, list[list[list[float]]]]:
    """The assignments of both dials."""
    values = [1.0, 2.0, 3.0, 99.0, 100.0, 101.0, KAPPA - 2.0, KAPPA - 1.0, float(KAPPA)]
    return {
        "the nine of cases 3 and 4": assignments(values)[:: EVERY if smoke else 1],
        "twelve, log-spaced": noisy_assignments(1 if smoke else EACH),
    }


def print_rotations(rotations: dict[str, np.ndarray], last_angle: float) -> None:
    for scope, rows in rotations.items():
        first, last = (rows[i, 1] / rows[i, 2] for i in (0, -1))
        print(f"turned, {scope}: gain {first:.3g} at angle 0, {last:.3g} at {last_angle}")


def main() -> None:
    run = Script(__doc__, OUT, smoke="12 assignments, few bases: seconds").run()
    bases, starts = (2, 4) if run.smoke else (BASES, STARTS)
    angles = ANGLES[::4] if run.smoke else ANGLES
    dials = {}
    correlations = {}
    rows = []
    for family, chosen in families_of(run.smoke).items():
        dial = dialled(chosen, bases, starts)
        ratio = dial["gd"] / dial["adam"]
        dials[family] = dial
        correlations[family] = {name: rank_correlation(dial[name], ratio) for name in NAMES}
        rows += correlation_rows(family, correlations[family])
        span = f"gain from {ratio.min():.2g} to {ratio.max():.3g}"
        print(f"{family}: {len(ratio)} assignments, {span}")
    header = ("eigenvalues", "reading", "rank correlation with the gain", "95 % interval")
    print(table(header, rows, left=2))
    best, lowest = best_reading(correlations)
    print(
        f"The gain is predicted best by {NAMES[best]}: rank correlation at least {lowest:.2f} "
        "in both families (lower ends of the intervals)"
    )
    rotations = turned(2 if run.smoke else TURNED, starts, angles)
    print_rotations(rotations, angles[-1])
    result = {
        "dials": dials,
        "correlations": correlations,
        "best": best,
        "angles": np.array(angles),
        "rotations": rotations,
    }
    config = {
        "kappa": KAPPA,
        "bases": bases,
        "starts": starts,
        "tolerance": TOLERANCE,
        "seed": SEED,
    }
    run.save(result, config)


if __name__ == "__main__":
    main()
