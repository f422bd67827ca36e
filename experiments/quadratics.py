"""Every number on quadratics that the literature or this project's notes state, beside what the code gives.

Writes result.json and quadratics.md; a full run also puts the table into experiments/quadratics.md. "P" numbers are
published (paper arXiv 2402.16788, thesis arXiv 2608.16760, Adam-mini arXiv 2406.16793), "I" numbers were measured once
with other code for this project. `python figures/quadratics.py` draws the loss curves of cases 1 to 4.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quadratic_blocks
import quadratic_heterogeneity as dial
import quadratic_tau

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.results import write_atomically

BASES, STARTS = 400, 5  # of the medians
CURVES = ("gd", "nesterov", "blockwise_gd", "adam_frozen", "adam_mini_frozen", "adam")
CURVE_STARTS, CURVE_STEPS = 32, 10_000
PREDICTED = 2000  # random problems
SEED, TOLERANCE = 0, 1e-6
OUT, PAGE = Path("results/quadratics"), Path(__file__).parent / "quadratics.md"
# iterations of GD and of Adam, the reference
MEDIANS = {
    (3, 2000): (6067, 92),
    (4, 2000): (6095, 9938),
    (3, 5000): (15290, 110),
    (4, 5000): (15348, 20127),
}


@dataclass(frozen=True)
class Row:
    """One number of the table."""

    what: str
    source: str  # "P" | "I"
    stated: str
    found: str
    remark: str = ""


def medians(bases: int, starts: int) -> list[Row]:
    """Iterations of GD at 2 / (mu + L) and of Adam at 1 / a_max, with intervals of the median by resampling bases."""
    rows, draw = [], np.random.default_rng(SEED)
    for (number, kappa), stated in MEDIANS.items():
        q = quadratic.case(number, kappa=kappa, seed=SEED, num_problems=bases)
        w0, adam = quadratic.draw_starts(q, starts, SEED), quadratic.METHOD_DEFAULTS["adam"]
        gd = quadratic.linear_iterations(
            q, "gd", w0, (2 / (q.smallest + q.largest))[:, None], TOLERANCE
        )
        safe = 1 / quadratic.extremes(q, "adam", adam, w0)[1]
        by_adam = quadratic.linear_iterations(q, "adam", w0, safe, TOLERANCE, **adam)
        for name, number_stated, counts in zip(("GD", "Adam"), stated, (gd, by_adam), strict=True):
            resampled = [np.median(counts[draw.integers(bases, size=bases)]) for _ in range(400)]
            low, high = np.quantile(resampled, (0.025, 0.975))
            quartiles = ", ".join(f"{x:,.0f}" for x in np.quantile(counts, (0.25, 0.75)))
            what = f"case {number}, kappa {kappa}: median iterations of {name} to 1e-6"
            remark = f"95 % interval {low:,.0f} to {high:,.0f}; quartiles of starts {quartiles}"
            rows.append(Row(what, "I", f"{number_stated:,}", f"{np.median(counts):,.0f}", remark))
    return rows


def bounds(bases: int) -> list[Row]:
    rows = []
    problems = {f"cases 3 and 4, kappa {k}": [quadratic.case(c, kappa=k, num_problems=bases) for c in (3, 4)]
                for k in (2000, 5000)}  # fmt: skip
    problems["random blocks"] = [quadratic.random_problems(10 * bases)]
    stated = {"thesis, any eta": ("P", "holds"), "slides, eta <= 1/L": ("I", "holds"),
              "slides, eta = 2/(mu+L)": ("I", "violated")}  # fmt: skip
    for name, some in problems.items():
        gd = [check for q in some for check in quadratic.check_gd_bound(q)]
        adam = [
            check
            for q in some
            for check in quadratic.check_adam_bound(q, num_starts=20, num_steps=400)
        ]
        for label in dict.fromkeys(check.name for check in (*gd, *adam)):
            checks = [check for check in (*gd, *adam) if check.name == label]
            steps, violated = sum(c.steps for c in checks), sum(c.violations for c in checks)
            kind = "GD's lower bound" if label in stated else "Adam's upper bound"
            source, claim = stated.get(label, ("P" if "^2" in label else "I", "holds"))
            remark = f"least margin {min(c.margin for c in checks):.2g} (log)"
            what = f"{name}: {kind}, {label}"
            rows.append(
                Row(what, source, claim, f"{violated:,} of {steps:,} steps violate it", remark)
            )
    return rows


def probabilities(bases: int) -> list[Row]:
    found = quadratic.constants(quadratic.case(3, num_problems=bases), num_starts=20)
    shares = [f"{np.mean(r <= 1000):.3f}" for r in (found.r, found.tight_r)]
    return [
        Row("probability that r <= 1000, case 3", "P, I", ">= 2/3 (P), 0.65 (I)", shares[0], "slightly below 2/3"),
        Row("the same with the unsquared ratio", "I", "0.99", shares[1]),
        Row("that theory has Adam win, r max kappa_l <= kappa, case 3, kappa 2000", "P", "Adam wins",
            f"{np.mean(found.adam_wins):.2f} of starts", "Adam is faster from nearly all starts: the bound is shy"),
    ]  # fmt: skip


def predictions(count: int) -> tuple[list[Row], list[quadratic.Scorecard]]:
    cards = quadratic.score_prediction(quadratic.random_problems(count, seed=SEED))
    rows = []
    for card in cards:
        counts = (
            card.predicted_and_won,
            card.predicted_and_lost,
            card.not_predicted_and_won,
            card.not_predicted_and_lost,
        )
        told = "predicted and won {:,}, predicted and lost {:,}, not predicted and won {:,}, not predicted and lost {:,}"
        shares = (
            f"{card.precision:.1%} of predictions right, {card.recall:.0%} of Adam's wins predicted"
        )
        what = f"Adam beats GD when {card.name}, {count:,} random problems x 4 starts"
        rows.append(
            Row(
                what, "P" if card.name[1] == " " else "I", "Adam wins", shares, told.format(*counts)
            )
        )
    return rows, cards


def cycles(steps: int) -> list[Row]:
    rows = []
    for beta2 in (0.9, 0.99):
        found = quadratic.limit_cycle(quadratic.case(3), beta2=beta2, num_starts=8, num_steps=steps)
        period = np.unique(found.period).tolist()
        told = f"radius {np.median(found.radius):.4f} eta, period {period}, loss as eta^{found.exponent:.3f}"
        rows.append(
            Row(f"Adam, beta2 = {beta2}, constant step, case 3", "P", "ends in a limit cycle", told)
        )
    return rows


def blocks(smoke: bool) -> list[Row]:
    size, starts, steps = (6, 6, 600) if smoke else (30, 48, 20_000)
    rows = []
    for name, q in quadratic_blocks.problems(size).items():
        middle = {label: float(np.median(runs.iterations_to(TOLERANCE)))
                  for label, runs in quadratic_blocks.measured(q, starts, steps).items()}  # fmt: skip
        told = ", ".join(f"{label} {count:,.0f}" for label, count in middle.items())
        claim = "blockwise GD beats Adam beats GD" if name == "three blocks" else "GD beats Adam"
        rows.append(Row(f"30 x 30 blocks, {name}: median iterations", "P", claim, told))
        if name == "three blocks":
            rates = ", ".join(f"{float(2 / (e[0, 0] + e[0, -1])):.4g}" for e in q.eigenvalues)
            rows.append(Row("each block's own best step", "P", "about 0.5, 0.01, 0.0002", rates))
    return rows


def taus(problems: int, starts: int) -> list[Row]:
    rows = []
    for (size, kappa), stated in quadratic_tau.REFERENCE.items():
        for tau, r in stated.items():
            found = quadratic_tau.at_tau(size, kappa, tau, problems, starts)
            what = f"kappa(D_Adam H) / kappa(H), d = {size}, kappa = {kappa:g}, tau = {tau:.2f}"
            rows.append(Row(what, "I", f"{r:g}", f"{found:.2f}"))
    return rows


def readings() -> list[Row]:
    rows = []
    stated = {"bounded": (0.693, 0.693), "log": (0.693, 0.081), "wasserstein": (2.03, 0.11)}
    js = [quadratic.case(number).heterogeneity() for number in (3, 4)]
    for name, numbers in stated.items():
        told = " / ".join(f"{of.readings[name].mean:.3f}" for of in js)
        rows.append(
            Row(
                f"{name} reading, case 3 / case 4",
                "I",
                " / ".join(map(str, numbers)),
                told,
                js[0].readings[name].unit,
            )
        )
    for width, numbers in ((0.05, (0.693, 0.220)), (0.5, (0.575, 0.014))):
        some = [
            ht.js_heterogeneity(quadratic.case(n).spectra(), readings=("log",), log_width=width)
            for n in (3, 4)
        ]
        told = " / ".join(f"{of.readings['log'].mean:.3f}" for of in some)
        what = f"log reading at width {width} decades, case 3 / case 4"
        rows.append(Row(what, "I", f"{numbers[0]} / {numbers[1]}", told, "nats"))
    return rows


def ranks(smoke: bool) -> list[Row]:
    """Rank correlations of the gain with readings, over all 280 assignments (the reference: 120 random ones)."""
    values = [1.0, 2.0, 3.0, 99.0, 100.0, 101.0, 1998.0, 1999.0, 2000.0]
    chosen = dial.assignments(values)[:: 24 if smoke else 1]
    found = dial.dialled(chosen, 2 if smoke else dial.BASES, 4 if smoke else dial.STARTS)
    rows = []
    for name, stated in {"kappa": 0.73, "wasserstein": 0.71, "spread": 0.69, "log": 0.50}.items():
        rho, low, high = dial.rank_correlation(found[name], found["gd"] / found["adam"])
        what = f"rank correlation of GD/Adam iterations with {dial.NAMES[name]}, nine eigenvalues in three blocks"
        rows.append(
            Row(what, "I", f"{stated:.2f}", f"{rho:.2f}", f"95 % interval {low:.2f} to {high:.2f}")
        )
    return rows


def page(rows: list[Row]) -> str:
    lines = [
        "# Numbers on quadratics, stated and found", "",
        "Written by `python experiments/quadratics.py`. P: published; I: measured earlier for this project with other",
        "code. GD steps are 2/(mu + L), Adam's (beta1 = 0, beta2 = 1) 1/lambda_max(D^-1/2 H D^-1/2), bases random by",
        "Haar measure, starts N(0, I), everything float64.", "",
        "| what | | stated | found | remark |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {r.what} | {r.source} | {r.stated} | {r.found} | {r.remark} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="few of everything: under a minute")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    smoke = arguments.smoke
    out = arguments.out or (OUT / "smoke" if smoke else OUT)
    rows = medians(20 if smoke else BASES, STARTS)
    rows += bounds(2 if smoke else 20) + probabilities(20 if smoke else BASES)
    predicted, cards = predictions(50 if smoke else PREDICTED)
    rows += predicted + cycles(4000 if smoke else 20_000) + blocks(smoke)
    rows += taus(4 if smoke else 60, 3 if smoke else 8) + readings() + ranks(smoke)
    curves = {}
    for number in quadratic.CASES[2:] if smoke else quadratic.CASES:
        q = quadratic.case(number, kappa=2000 if number > 2 else None)
        steps = 500 if smoke else CURVE_STEPS
        runs = quadratic.compare(
            q, CURVES, num_starts=8 if smoke else CURVE_STARTS, num_steps=steps, seed=SEED
        )
        spectra = {name: e[0].numpy() for name, e in zip(q.block_names, q.eigenvalues, strict=True)}
        found = quadratic.constants(q, num_starts=CURVE_STARTS)
        curves[q.name] = {
            "runs": runs,
            "eigenvalues": spectra,
            "constants": found,
            "heterogeneity": q.heterogeneity(),
        }
    table = [[row.what, row.source, row.stated, row.found, row.remark] for row in rows]
    ht.save(
        {"table": table, "scorecards": cards, "curves": curves},
        out / "result",
        config={"seed": SEED, "smoke": smoke},
    )
    text = page(rows)
    for path in (out / "quadratics.md", *(() if smoke or arguments.out else (PAGE,))):
        write_atomically(path, text.encode())
    print(text)


if __name__ == "__main__":
    main()
