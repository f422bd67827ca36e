"""Which reading of heterogeneity predicts how much Adam gains over gradient descent? And what does a rotation do?

Case 3 and case 4 have the same nine eigenvalues in other blocks. There are 280 ways to put nine eigenvalues into three
blocks of three; every one is taken, from the homogeneous case 4 to the heterogeneous case 3: the spectrum, so GD's
speed, stays the same. As those nine lie in three tight groups, so that readings take few values, the dial is turned a
second time with twelve eigenvalues evenly spaced in log from 1 to kappa in four blocks: sorted into blocks by their
logarithm plus noise of SPREADS times its range. The gain is the ratio of median iterations to 1e-6, GD at 2 / (mu + L)
over Adam (beta2 = 1, beta1 = 0) at 1 / a_max, over random bases and starts. Readings are those of exact spectra; rank
correlations (Spearman) have 95 % intervals by resampling the assignments. Then case 3 with its basis turned: within
blocks, and as a whole, which destroys the blocks, so that theory has Adam lose.
`python figures/quadratic_heterogeneity.py` draws it.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.app.report import table
from hessian_tools.quadratic import Quadratic

KAPPA, BASES, STARTS, TOLERANCE, SEED = 2000, 12, 12, 1e-6, 0
ANGLES = (0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2)
SPREADS, EACH = (
    (0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 2.0),
    32,
)  # noise of the second dial, assignments of each
TURNED = 40  # bases of the rotation study
RESAMPLES = 2000
NAMES = {
    "kappa": "1 / max kappa_l", "wasserstein": "Wasserstein, log axis", "spread": "spread of block scales",
    "log": "JS, log axis", "bounded": "JS bounded", "unnormalised": "JS0 (literature)",
}  # fmt: skip
READINGS = ("wasserstein", "log", "bounded", "unnormalised")
OUT = Path("results/quadratic_heterogeneity")


def assignments(values: list[float]) -> list[list[list[float]]]:
    """All ways to put nine values into three blocks of three, blocks not told apart."""
    found = []
    for two in combinations(range(1, 9), 2):
        rest = [i for i in range(1, 9) if i not in two]
        for pair in combinations(rest[1:], 2):
            groups = ((0, *two), (rest[0], *pair), tuple(i for i in rest[1:] if i not in pair))
            found.append([[values[i] for i in group] for group in groups])
    return found


def noisy_assignments(each: int) -> list[list[list[float]]]:
    """Twelve log-spaced values in four blocks of three, from sorted to random."""
    draw, place = np.random.default_rng(SEED), np.linspace(0, 1, 12)
    found = []
    for spread in SPREADS:
        for _ in range(each):
            order = np.argsort(place + spread * draw.normal(size=12))
            found.append((KAPPA ** place[order]).reshape(4, 3).tolist())
    return found


def gain(q: Quadratic, starts: int) -> np.ndarray:
    """(2,) median iterations of GD and of Adam, over problems and starts, without running a step."""
    w0, settings = quadratic.draw_starts(q, starts, SEED), quadratic.METHOD_DEFAULTS["adam"]
    gd = quadratic.linear_iterations(
        q, "gd", w0, (2 / (q.smallest + q.largest))[:, None], TOLERANCE
    )
    steps = 1 / quadratic.extremes(q, "adam", settings, w0)[1]
    adam = quadratic.linear_iterations(q, "adam", w0, steps, TOLERANCE, **settings)
    return np.array([np.median(gd), np.median(adam)])


def in_place(blocks: list[list[float]]) -> int:
    """How many of the nine eigenvalues share a block as in case 3: the best of the ways to name the blocks."""
    group = {1: 0, 2: 0, 3: 0, 99: 1, 100: 1, 101: 1}
    counts = np.array(
        [[sum(group.get(value, 2) == g for value in block) for g in range(3)] for block in blocks]
    )
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return max(int(counts[range(3), order].sum()) for order in orders)


def dialled(chosen: list[list[list[float]]], bases: int, starts: int) -> dict[str, np.ndarray]:
    """Readings and gain of every assignment, each (A,)."""
    rows: dict[str, list[float]] = {
        name: [] for name in ("gd", "adam", "spread", "kappa", "place", *READINGS)
    }
    for blocks in tqdm(chosen, desc="assignments", disable=None):
        q = quadratic.from_blocks(blocks, seed=SEED, num_problems=bases)
        js = q.heterogeneity()
        gd, adam = gain(q, starts)
        told = {
            "gd": gd, "adam": adam, "spread": js.scale_spread.value, "kappa": float(1 / q.block_kappas[0].amax()),
            "place": in_place(blocks) if len(blocks) == 3 else np.nan,
        }  # fmt: skip
        told |= {name: js.readings[name].mean for name in READINGS}
        for name, value in told.items():
            rows[name].append(float(value))
    return {name: np.array(values) for name, values in rows.items()}


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
    found = {}
    for scope in ("blocks", "whole"):
        start, rows = quadratic.case(3, kappa=KAPPA, seed=SEED, num_problems=bases), []
        for angle in angles:
            q = quadratic.rotated(start, torch.full((bases,), angle), seed=SEED, scope=scope)
            rows.append([float(q.tau.median()), *gain(q, starts)])
        found[scope] = np.array(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="12 assignments, few bases: seconds")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    bases, starts, angles = (2, 4, ANGLES[::4]) if arguments.smoke else (BASES, STARTS, ANGLES)
    values = [1.0, 2.0, 3.0, 99.0, 100.0, 101.0, KAPPA - 2.0, KAPPA - 1.0, float(KAPPA)]
    families = {
        "the nine of cases 3 and 4": assignments(values)[:: 24 if arguments.smoke else 1],
        "twelve, log-spaced": noisy_assignments(1 if arguments.smoke else EACH),
    }
    dials, correlations, rows = {}, {}, []
    for family, chosen in families.items():
        dials[family] = dial = dialled(chosen, bases, starts)
        ratio = dial["gd"] / dial["adam"]
        correlations[family] = {name: rank_correlation(dial[name], ratio) for name in NAMES}
        print(
            f"{family}: {len(ratio)} assignments, gain from {ratio.min():.2g} to {ratio.max():.3g}"
        )
        for name, (rho, low, high) in correlations[family].items():
            told = ["constant", ""] if np.isnan(rho) else [f"{rho:.2f}", f"{low:.2f} to {high:.2f}"]
            rows.append([family, NAMES[name], *told])
    print(
        table(
            ("eigenvalues", "reading", "rank correlation with the gain", "95 % interval"),
            rows,
            left=2,
        )
    )
    lowest = {name: min(by[name][1] for by in correlations.values()) for name in NAMES}
    best = max(
        (name for name in NAMES if not np.isnan(lowest[name])), key=lambda name: lowest[name]
    )
    least = f"rank correlation at least {lowest[best]:.2f} in both families (lower ends of the intervals)"
    print(f"The gain is predicted best by {NAMES[best]}: {least}")
    rotations = turned(TURNED if not arguments.smoke else 2, starts, angles)
    for scope, found in rotations.items():
        first, last = (found[i, 1] / found[i, 2] for i in (0, -1))
        print(f"turned, {scope}: gain {first:.3g} at angle 0, {last:.3g} at {angles[-1]}")
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
    ht.save(result, out / "result", config=config)


if __name__ == "__main__":
    main()
