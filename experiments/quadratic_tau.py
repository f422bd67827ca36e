"""Does Adam's preconditioner help or hurt a dense block? kappa(D_Adam H) / kappa(H) against how diagonal H is.

Claim (Adam-mini, arXiv 2406.16793): D_Adam = diag(1 / |g_0|) helps near-diagonal H and hurts dense H. H has evenly
spaced eigenvalues 1 .. kappa; its eigenvectors are turned away from the axes by expm(angle S), S random and skew;
tau = sum_i |H_ii| / sum_ij |H_ij|. `python figures/quadratic_tau.py` draws it.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import hessian_tools as ht
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


def at_tau(size: int, kappa: float, tau: float, problems: int, starts: int) -> float:
    """Median ratio over random eigenvectors and starts, at the angle whose median tau comes nearest."""
    diagonal = quadratic.from_blocks(
        [np.linspace(1, kappa, size)], num_problems=problems, basis="identity"
    )
    turned = (
        quadratic.rotated(diagonal, angle, seed=SEED) for angle in (0, *np.geomspace(0.005, 2, 48))
    )
    return float(
        np.median(ratios(min(turned, key=lambda q: abs(float(q.tau.median()) - tau)), starts))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two shapes, few angles: seconds")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    shapes, angles, problems = (
        (SHAPES[:1], ANGLES[::4], 4) if arguments.smoke else (SHAPES, ANGLES, PROBLEMS)
    )
    found = {}
    for size, kappa in shapes:
        diagonal = quadratic.from_blocks(
            [np.linspace(1, kappa, size)], num_problems=problems, basis="identity"
        )
        rows = []
        for angle in tqdm(angles, desc=f"d = {size}, kappa = {kappa:g}", disable=None):
            turned = quadratic.rotated(diagonal, angle, seed=SEED)
            rows.append(
                [
                    float(turned.tau.median()),
                    *np.quantile(ratios(turned, STARTS), (0.25, 0.5, 0.75)),
                ]
            )
        found[f"d = {size}, kappa = {kappa:g}"] = np.array(
            rows
        )  # (angles, 4): tau, quartiles of the ratio
        last = f"{rows[-1][2]:.1f} at tau {rows[-1][0]:.2f}"
        print(
            f"d = {size}, kappa = {kappa:g}: ratio {rows[0][2]:.2f} when diagonal, {last}",
            flush=True,
        )
    ht.save(
        found,
        out / "result",
        config={"angles": list(angles), "problems": problems, "starts": STARTS, "seed": SEED},
    )


if __name__ == "__main__":
    main()
