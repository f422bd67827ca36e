"""Does Adam's preconditioner help or hurt a dense block?

Claim (Adam-mini, arXiv 2406.16793): D_Adam = diag(1 / |g_0|) helps near-diagonal H and hurts dense
H. H has evenly spaced eigenvalues 1 .. kappa; its eigenvectors are turned away from the axes by
expm(angle S), S random and skew; tau = sum_i |H_ii| / sum_ij |H_ij|. Shown is
kappa(D_Adam H) / kappa(H) against tau.

`python experiments/quadratic_tau.py [--smoke]` writes results/quadratic_tau: a table of tau and the
quartiles of the ratio for each size and kappa. `python figures/quadratic_tau.py` draws it.
"""

from pathlib import Path

import numpy as np
from script import Script
from tqdm import tqdm

from hessian_tools import quadratic
from hessian_tools.quadratic import Quadratic

SHAPES = ((20, 100.0), (20, 1000.0), (50, 500.0), (50, 5000.0), (100, 1000.0))  # size, kappa
ANGLES = (0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5)
PROBLEMS, STARTS, SEED = 24, 6, 0
# tau -> r of the reference (medians)
REFERENCE = {
    (20, 100.0): {1.0: 0.40, 0.90: 0.70, 0.76: 1.23, 0.49: 5.9, 0.34: 9.2},
    (50, 500.0): {1.0: 0.22, 0.79: 2.0, 0.55: 5.8, 0.29: 15.5, 0.24: 20.0},
}
OUT = Path("results/quadratic_tau")


def ratios(q: Quadratic, starts: int) -> np.ndarray:
    """(N, S) kappa(D_Adam H) / kappa(H)."""
    settings = quadratic.METHOD_DEFAULTS["adam"]
    low, high = quadratic.extremes(q, "adam", settings, quadratic.draw_starts(q, starts, SEED))
    return (high / low / q.kappa[:, None]).numpy()


def diagonal(size: int, kappa: float, problems: int) -> Quadratic:
    """Eigenvectors along the axes, to be turned away from them."""
    eigenvalues = np.linspace(1, kappa, size)
    return quadratic.from_blocks([eigenvalues], num_problems=problems, basis="identity")


def at_tau(size: int, kappa: float, tau: float, problems: int, starts: int) -> float:
    """Median ratio over eigenvectors and starts, at the angle whose median tau is nearest."""
    unturned = diagonal(size, kappa, problems)
    angles = (0, *np.geomspace(0.005, 2, 48))
    turned = (quadratic.rotated(unturned, angle, seed=SEED) for angle in angles)
    nearest = min(turned, key=lambda q: abs(float(q.tau.median()) - tau))
    return float(np.median(ratios(nearest, starts)))


def by_angle(size: int, kappa: float, angles: tuple[float, ...], problems: int) -> np.ndarray:
    """(angles, 4): median tau, and quartiles of the ratio."""
    unturned = diagonal(size, kappa, problems)
    rows = []
    for angle in tqdm(angles, desc=f"d = {size}, kappa = {kappa:g}", disable=None):
        turned = quadratic.rotated(unturned, angle, seed=SEED)
        quartiles = np.quantile(ratios(turned, STARTS), (0.25, 0.5, 0.75))
        rows.append([float(turned.tau.median()), *quartiles])
    return np.array(rows)


def main() -> None:
    run = Script(__doc__, OUT, smoke="two shapes, few angles: seconds").run()
    shapes = SHAPES[:1] if run.smoke else SHAPES
    angles = ANGLES[::4] if run.smoke else ANGLES
    problems = 4 if run.smoke else PROBLEMS
    tables = {}
    for size, kappa in shapes:
        label = f"d = {size}, kappa = {kappa:g}"
        table = by_angle(size, kappa, angles, problems)
        tables[label] = table
        last = f"{table[-1, 2]:.1f} at tau {table[-1, 0]:.2f}"
        print(f"{label}: ratio {table[0, 2]:.2f} when diagonal, {last}", flush=True)
    config = {"angles": list(angles), "problems": problems, "starts": STARTS, "seed": SEED}
    run.save(tables, config)


if __name__ == "__main__":
    main()
