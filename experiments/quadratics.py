"""Every number stated on quadratics, beside what the code gives.

`python experiments/quadratics.py [--smoke]` writes results/quadratics: the table (quadratics.md)
and the loss curves of cases 1 to 4, which `python figures/quadratics.py` draws. A full run also
puts the table into experiments/quadratics.md.

"P" numbers are published (paper arXiv 2402.16788, thesis arXiv 2608.16760, Adam-mini arXiv
2406.16793), "I" numbers were measured once with other code for this project.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import quadratic_blocks
import quadratic_heterogeneity as dial
import quadratic_tau
from script import Script

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.quadratic import BoundCheck, Quadratic
from hessian_tools.quadratic.theory import gd_and_adam_iterations
from hessian_tools.results import write_atomically

BASES, STARTS = 400, 5  # of the medians
CURVES = ("gd", "nesterov", "blockwise_gd", "adam_frozen", "adam_mini_frozen", "adam")
CURVE_STARTS, CURVE_STEPS = 32, 10_000
PREDICTED = 2000  # random problems
SEED, TOLERANCE = 0, 1e-6
OUT = Path("results/quadratics")
PAGE = Path(__file__).parent / "quadratics.md"
# bound on GD -> source, what is stated of it
GD_BOUNDS = {
    "thesis, any eta": ("P", "holds"),
    "slides, eta <= 1/L": ("I", "holds"),
    "slides, eta = 2/(mu+L)": ("I", "violated"),
}
HEAD = """\
# Numbers on quadratics, stated and found

Written by `python experiments/quadratics.py`. P: published; \
I: measured earlier for this project with other
code. GD steps are 2/(mu + L), Adam's (beta1 = 0, beta2 = 1) 1/lambda_max(D^-1/2 H D^-1/2), \
bases random by
Haar measure, starts N(0, I), everything float64.

| what | | stated | found | remark |
|---|---|---|---|---|
"""
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
    """Iterations of GD at 2 / (mu + L) and of Adam at 1 / a_max.

    Intervals of the median come from resampling bases.
    """
    rows = []
    draw = np.random.default_rng(SEED)
    for (number, kappa), stated in MEDIANS.items():
        q = quadratic.case(number, kappa=kappa, seed=SEED, num_problems=bases)
        w0 = quadratic.draw_starts(q, starts, SEED)
        counted = gd_and_adam_iterations(q, w0, TOLERANCE)
        for name, number_stated, counts in zip(("GD", "Adam"), stated, counted, strict=True):
            resampled = [np.median(counts[draw.integers(bases, size=bases)]) for _ in range(400)]
            low, high = np.quantile(resampled, (0.025, 0.975))
            quartiles = ", ".join(f"{x:,.0f}" for x in np.quantile(counts, (0.25, 0.75)))
            what = f"case {number}, kappa {kappa}: median iterations of {name} to 1e-6"
            remark = f"95 % interval {low:,.0f} to {high:,.0f}; quartiles of starts {quartiles}"
            rows.append(Row(what, "I", f"{number_stated:,}", f"{np.median(counts):,.0f}", remark))
    return rows


def checks_of(problems: list[Quadratic]) -> list[BoundCheck]:
    """The theorems' bounds on every step: GD's of all problems first, then Adam's."""
    checks = [check for q in problems for check in quadratic.check_gd_bound(q)]
    for q in problems:
        checks += quadratic.check_adam_bound(q, num_starts=20, num_steps=400)
    return checks


def bound_row(name: str, label: str, checks: list[BoundCheck]) -> Row:
    if label in GD_BOUNDS:
        kind = "GD's lower bound"
        source, claim = GD_BOUNDS[label]
    else:
        kind = "Adam's upper bound"
        source = "P" if "^2" in label else "I"
        claim = "holds"
    steps = sum(check.steps for check in checks)
    violated = sum(check.violations for check in checks)
    what = f"{name}: {kind}, {label}"
    remark = f"least margin {min(check.margin for check in checks):.2g} (log)"
    return Row(what, source, claim, f"{violated:,} of {steps:,} steps violate it", remark)


def bounds(bases: int) -> list[Row]:
    problems = {}
    for kappa in (2000, 5000):
        cases = [quadratic.case(number, kappa=kappa, num_problems=bases) for number in (3, 4)]
        problems[f"cases 3 and 4, kappa {kappa}"] = cases
    problems["random blocks"] = [quadratic.random_problems(10 * bases)]
    rows = []
    for name, some in problems.items():
        by_label: dict[str, list[BoundCheck]] = defaultdict(list)
        for check in checks_of(some):
            by_label[check.name].append(check)
        rows += [bound_row(name, label, checks) for label, checks in by_label.items()]
    return rows


def probabilities(bases: int) -> list[Row]:
    constants = quadratic.constants(quadratic.case(3, num_problems=bases), num_starts=20)
    squared = f"{np.mean(constants.r <= 1000):.3f}"
    unsquared = f"{np.mean(constants.tight_r <= 1000):.3f}"
    return [
        Row(
            "probability that r <= 1000, case 3",
            "P, I",
            ">= 2/3 (P), 0.65 (I)",
            squared,
            "slightly below 2/3",
        ),
        Row("the same with the unsquared ratio", "I", "0.99", unsquared),
        Row(
            "that theory has Adam win, r max kappa_l <= kappa, case 3, kappa 2000",
            "P",
            "Adam wins",
            f"{np.mean(constants.adam_wins):.2f} of starts",
            "Adam is faster from nearly all starts: the bound is shy",
        ),
    ]


def predictions(count: int) -> tuple[list[Row], list[quadratic.Scorecard]]:
    cards = quadratic.score_prediction(quadratic.random_problems(count, seed=SEED))
    rows = []
    for card in cards:
        what = f"Adam beats GD when {card.name}, {count:,} random problems x 4 starts"
        source = "P" if card.name[1] == " " else "I"
        shares = (
            f"{card.precision:.1%} of predictions right, {card.recall:.0%} of Adam's wins predicted"
        )
        remark = (
            f"predicted and won {card.predicted_and_won:,}, "
            f"predicted and lost {card.predicted_and_lost:,}, "
            f"not predicted and won {card.not_predicted_and_won:,}, "
            f"not predicted and lost {card.not_predicted_and_lost:,}"
        )
        rows.append(Row(what, source, "Adam wins", shares, remark))
    return rows, cards


def cycles(steps: int) -> list[Row]:
    rows = []
    for beta2 in (0.9, 0.99):
        cycle = quadratic.limit_cycle(quadratic.case(3), beta2=beta2, num_starts=8, num_steps=steps)
        period = np.unique(cycle.period).tolist()
        measured = (
            f"radius {np.median(cycle.radius):.4f} eta, period {period}, "
            f"loss as eta^{cycle.exponent:.3f}"
        )
        what = f"Adam, beta2 = {beta2}, constant step, case 3"
        rows.append(Row(what, "P", "ends in a limit cycle", measured))
    return rows


def blocks(smoke: bool) -> list[Row]:
    size, starts, steps = (6, 6, 600) if smoke else (30, 48, 20_000)
    rows = []
    for name, q in quadratic_blocks.problems(size).items():
        three = name == "three blocks"
        medians = []
        for label, runs in quadratic_blocks.measured(q, starts, steps).items():
            iterations = float(np.median(runs.iterations_to(TOLERANCE)))
            medians.append(f"{label} {iterations:,.0f}")
        what = f"30 x 30 blocks, {name}: median iterations"
        claim = "blockwise GD beats Adam beats GD" if three else "GD beats Adam"
        rows.append(Row(what, "P", claim, ", ".join(medians)))
        if three:
            rates = ", ".join(f"{rate:.4g}" for rate in quadratic_blocks.own_steps(q))
            rows.append(Row("each block's own best step", "P", "about 0.5, 0.01, 0.0002", rates))
    return rows


def taus(problems: int, starts: int) -> list[Row]:
    rows = []
    for (size, kappa), stated in quadratic_tau.REFERENCE.items():
        for tau, r in stated.items():
            median = quadratic_tau.at_tau(size, kappa, tau, problems, starts)
            what = f"kappa(D_Adam H) / kappa(H), d = {size}, kappa = {kappa:g}, tau = {tau:.2f}"
            rows.append(Row(what, "I", f"{r:g}", f"{median:.2f}"))
    return rows


def readings() -> list[Row]:
    rows = []
    stated = {"bounded": (0.693, 0.693), "log": (0.693, 0.081), "wasserstein": (2.03, 0.11)}
    both = [quadratic.case(number).heterogeneity() for number in (3, 4)]
    for name, numbers in stated.items():
        what = f"{name} reading, case 3 / case 4"
        values = " / ".join(f"{js.readings[name].mean:.3f}" for js in both)
        claim = " / ".join(map(str, numbers))
        rows.append(Row(what, "I", claim, values, both[0].readings[name].unit))
    for width, numbers in ((0.05, (0.693, 0.220)), (0.5, (0.575, 0.014))):
        both = [
            ht.js_heterogeneity(quadratic.case(n).spectra(), readings=("log",), log_width=width)
            for n in (3, 4)
        ]
        what = f"log reading at width {width} decades, case 3 / case 4"
        values = " / ".join(f"{js.readings['log'].mean:.3f}" for js in both)
        rows.append(Row(what, "I", f"{numbers[0]} / {numbers[1]}", values, "nats"))
    return rows


def ranks(smoke: bool) -> list[Row]:
    """Rank correlations of the gain with readings, over all 280 assignments.

    The reference took 120 random ones.
    """
    values = [1.0, 2.0, 3.0, 99.0, 100.0, 101.0, 1998.0, 1999.0, 2000.0]
    chosen = dial.assignments(values)[:: dial.EVERY if smoke else 1]
    bases, starts = (2, 4) if smoke else (dial.BASES, dial.STARTS)
    columns = dial.dialled(chosen, bases, starts)
    gain = columns["gd"] / columns["adam"]
    rows = []
    for name, stated in {"kappa": 0.73, "wasserstein": 0.71, "spread": 0.69, "log": 0.50}.items():
        rho, low, high = dial.rank_correlation(columns[name], gain)
        what = (
            f"rank correlation of GD/Adam iterations with {dial.NAMES[name]}, "
            "nine eigenvalues in three blocks"
        )
        interval = f"95 % interval {low:.2f} to {high:.2f}"
        rows.append(Row(what, "I", f"{stated:.2f}", f"{rho:.2f}", interval))
    return rows


def page(rows: list[Row]) -> str:
    lines = [f"| {r.what} | {r.source} | {r.stated} | {r.found} | {r.remark} |" for r in rows]
    return HEAD + "\n".join(lines) + "\n"


def all_rows(smoke: bool) -> tuple[list[Row], list[quadratic.Scorecard]]:
    """The whole table, and the scorecards of the theory's predictions."""
    bases = 20 if smoke else BASES
    predicted, cards = predictions(50 if smoke else PREDICTED)
    rows = [
        *medians(bases, STARTS),
        *bounds(2 if smoke else 20),
        *probabilities(bases),
        *predicted,
        *cycles(4000 if smoke else 20_000),
        *blocks(smoke),
        *taus(4 if smoke else 60, 3 if smoke else 8),
        *readings(),
        *ranks(smoke),
    ]
    return rows, cards


def curves_of(number: int, starts: int, steps: int) -> tuple[str, dict[str, Any]]:
    """Name and loss curves of one of the literature's cases."""
    q = quadratic.case(number, kappa=2000 if number > 2 else None)
    curves = {
        "runs": quadratic.compare(q, CURVES, num_starts=starts, num_steps=steps, seed=SEED),
        "eigenvalues": q.by_block(),
        "constants": quadratic.constants(q, num_starts=CURVE_STARTS),
        "heterogeneity": q.heterogeneity(),
    }
    return q.name, curves


def main() -> None:
    run = Script(__doc__, OUT, smoke="few of everything: under a minute").run()
    rows, cards = all_rows(run.smoke)
    numbers = quadratic.CASES[2:] if run.smoke else quadratic.CASES
    starts = 8 if run.smoke else CURVE_STARTS
    steps = 500 if run.smoke else CURVE_STEPS
    curves = dict(curves_of(number, starts, steps) for number in numbers)
    table = [[row.what, row.source, row.stated, row.found, row.remark] for row in rows]
    result = {"table": table, "scorecards": cards, "curves": curves}
    run.save(result, {"seed": SEED, "smoke": run.smoke})
    text = page(rows)
    write_atomically(run.out / "quadratics.md", text.encode())
    if not run.smoke and run.options.out is None:
        write_atomically(PAGE, text.encode())
    print(text)


if __name__ == "__main__":
    main()
