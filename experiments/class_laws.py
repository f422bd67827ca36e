"""How does the Hessian at initialisation become block-diagonal with the number of classes?

Claim (arXiv 2505.02809): for f = V relu(W x) with m hidden neurons and C classes, Gaussian data and
LeCun initialisation, the mean squared Frobenius norm of an off-diagonal block over that of a
diagonal one falls as 1/C for H_ww (blocks: hidden neurons; cross-entropy and mean squared error)
and as 1/C^2 for H_vv (blocks: outputs; cross-entropy; exactly 0 under MSE). A diagonal block faces
C - 1 others in its row, so H_vv's total mass outside falls as 1/C. "By pairs" divides each |H_ij|^2
by |H_ii| |H_jj| before the mean: outputs of large logits weigh no more then. Exponents are least
squares of log ratio on log C, one a seed, with 95 % intervals of Student's t over seeds. Norms are
in closed form (:mod:`relu_hessian`), checked here against ``ht.dense_block`` at small C and, at
sizes m C too large for that, against the blocks that ``ht.coupling`` draws and probes.

`python experiments/class_laws.py [--smoke]` writes results/class_laws: ratios, exponents, checks,
and table.txt. `python figures/class_laws.py` draws it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from relu_hessian import LOSSES, ReluHessian, worst_difference
from scipy.stats import t as student
from script import Script
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report

HIDDEN, INPUTS, EXAMPLES = 8, 60, 600
CLASSES = (10, 30, 100, 300, 1000)
SEEDS = 12
SMOKE_CLASSES, SMOKE_SEEDS, SMOKE_DRAWN = (10, 30), 2, 8
FEW = 10  # classes of the dense check
DRAWN, PROBES = 64, 4  # blocks and probes of the check by probing
LATE = 100  # classes from which the second fit is made
# name -> loss, block, exponent, whether by pairs
LAWS = {
    "H_ww, MSE": ("MSE", "ww", -1, False),
    "H_ww, CE": ("CE", "ww", -1, False),
    "H_vv, CE": ("CE", "vv", -2, False),
    "H_vv, CE, by pairs": ("CE", "vv", -2, True),
}
# measured before; whether H_vv by pairs is not known
REFERENCE = {
    "H_ww, MSE": {10: 2.0e-2, 100: 2.3e-3, 1000: 2.9e-4},
    "H_ww, CE": {10: 3.0e-2, 100: 3.7e-3, 1000: 4.9e-4},
    "H_vv, CE": {10: 1.8e-2, 100: 1.3e-4, 1000: 1.2e-6},
}
OUT = Path("results/class_laws")


def drawn(classes: int, seed: int, loss: str) -> ReluHessian:
    """Data N(0, I), weights N(0, 1 / fan in), labels even and independent; the same for both
    losses.
    """
    stream = torch.Generator().manual_seed(1000 * seed + classes)
    shapes = ((EXAMPLES, INPUTS), (HIDDEN, INPUTS), (classes, HIDDEN))
    inputs, w, v = (torch.randn(s, generator=stream, dtype=torch.float64) for s in shapes)
    labels = torch.randint(classes, (EXAMPLES,), generator=stream)
    return ReluHessian(inputs, labels, w / INPUTS**0.5, v / HIDDEN**0.5, loss)


def ratio(mass: Tensor, by_pairs: bool) -> float:
    """Mean mass of an off-diagonal block over that of a diagonal one."""
    if by_pairs:
        mass = mass / (mass.diagonal()[:, None] * mass.diagonal()).sqrt()
    diagonal = float(mass.diagonal().sum())
    return (float(mass.sum()) - diagonal) / (len(mass) - 1) / diagonal


def against_dense(loss: str) -> dict[str, float]:
    """The largest difference of the closed form's masses from the dense Hessian's, over the largest
    mass.
    """
    net = drawn(FEW, 0, loss)
    targets = nn.functional.one_hot(net.labels, FEW).double() if loss == "MSE" else None
    problem = net.problem(targets)
    dense = ht.dense_block(problem, ht.partition(problem.model, {"*": "row"}), progress=False)
    mass = torch.from_numpy(dense.mass)
    differences = {
        "ww": worst_difference(net.ww(), mass[:HIDDEN, :HIDDEN]),
        "vv": worst_difference(net.vv(), mass[HIDDEN:, HIDDEN:]),
    }
    if loss == "CE":
        differences["wv"] = worst_difference(net.wv(), mass[:HIDDEN, HIDDEN:])
    return differences


def against_probing(classes: int, num_blocks: int) -> dict[str, float]:
    """The share of H_vv's mass inside output neurons: closed form, ht.coupling's estimate and its
    standard error.
    """
    net = drawn(classes, 0, "CE")
    problem = net.problem()
    rows = ht.partition(problem.model, {"3.weight": "row"})
    coupling = ht.coupling(
        problem, rows, num_probes=PROBES, num_blocks=num_blocks, exact=False, progress=False
    )
    share = coupling.shares["block"]
    mass = net.vv()
    truth = float(mass.diagonal().sum() / mass.sum())
    return {
        "classes": classes,
        "closed form": truth,
        "estimate": share.value,
        "standard error": share.standard_error,
        "products": coupling.num_matvecs,
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95 % interval."""
    count = len(values)
    half = student.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    return float(values.mean()), float(half)


def exponents(ratios: np.ndarray, classes: tuple[int, ...]) -> tuple[float, float]:
    """Of the (seeds, C) ratios of one law: mean slope and half width."""
    return interval(np.polyfit(np.log(classes), np.log(ratios).T, 1)[0])


def law_row(law: str, result: dict[str, Any]) -> list[str]:
    """Means and exponents of one law, with half widths."""
    means = [interval(seeds) for seeds in result["ratios"][law].T]
    fits = (result["exponents"][law], result["late exponents"][law])
    cells = [f"{mean:.2e} ± {half:.0e}" for mean, half in means]
    slopes = [f"{mean:.3f} ± {half:.3f}" for mean, half in fits]
    return [law, *cells, *slopes, str(LAWS[law][2])]


def reference_row(law: str, classes: tuple[int, ...]) -> list[str]:
    known = (REFERENCE[law].get(c) for c in classes)
    cells = ["" if value is None else f"{value:.1e}" for value in known]
    return ["  measured before", *cells, "", "", ""]


def text(result: dict[str, Any], classes: tuple[int, ...]) -> str:
    columns = [f"C = {c}" for c in classes]
    header = ("off-diagonal / diagonal", *columns, "exponent", "from C = 100", "law")
    rows = []
    for law in LAWS:
        rows.append(law_row(law, result))
        if law in REFERENCE:
            rows.append(reference_row(law, classes))
    worst = max(value for loss in result["dense"].values() for value in loss.values())
    lines = [
        report.table(header, rows),
        "± is half a 95 % interval over seeds.",
        f"Closed form against ht.dense_block, C = {FEW}, both losses: "
        f"masses differ by at most {worst:.1e} of the largest.",
    ]
    for check in result["probing"]:
        estimate = f"{check['estimate']:.4f} ± {check['standard error']:.4f}"
        lines.append(
            f"Share of H_vv's mass inside outputs, C = {check['classes']}: "
            f"closed form {check['closed form']:.4f}, "
            f"ht.coupling {estimate} in {check['products']} products."
        )
    return "\n".join(lines)


def ratios_at(classes: int, seed: int) -> dict[str, float]:
    """The ratio of every law for one draw of data and weights."""
    nets = {loss: drawn(classes, seed, loss) for loss in LOSSES}
    pairs = {(loss, layer) for loss, layer, _, _ in LAWS.values()}
    masses = {(loss, layer): getattr(nets[loss], layer)() for loss, layer in pairs}
    return {
        law: ratio(masses[loss, layer], by_pairs)
        for law, (loss, layer, _, by_pairs) in LAWS.items()
    }


def all_ratios(classes: tuple[int, ...], seeds: int) -> dict[str, np.ndarray]:
    """(seeds, C) ratios of every law."""
    ratios = {law: np.zeros((seeds, len(classes))) for law in LAWS}
    places = [(seed, place) for seed in range(seeds) for place in range(len(classes))]
    for seed, place in tqdm(places, disable=None):
        for law, value in ratios_at(classes[place], seed).items():
            ratios[law][seed, place] = value
    return ratios


def measured(classes: tuple[int, ...], seeds: int, num_blocks: int) -> dict[str, Any]:
    """All that is saved, drawn and printed."""
    ratios = all_ratios(classes, seeds)
    late = [i for i, c in enumerate(classes) if c >= LATE] or list(range(len(classes)))
    late_classes = tuple(classes[i] for i in late)
    return {
        "ratios": ratios,
        "exponents": {law: exponents(values, classes) for law, values in ratios.items()},
        "late exponents": {
            law: exponents(values[:, late], late_classes) for law, values in ratios.items()
        },
        "dense": {loss: against_dense(loss) for loss in LOSSES},
        "probing": [against_probing(c, num_blocks) for c in classes[-2:]],
        "classes": np.array(classes),
        "laws": {law: power for law, (_, _, power, _) in LAWS.items()},
        "reference": {
            law: {str(c): value for c, value in known.items()} for law, known in REFERENCE.items()
        },
    }


def main() -> None:
    run = Script(__doc__, OUT, smoke="two seeds, two numbers of classes: seconds").run()
    classes = SMOKE_CLASSES if run.smoke else CLASSES
    seeds = SMOKE_SEEDS if run.smoke else SEEDS
    num_blocks = SMOKE_DRAWN if run.smoke else DRAWN
    result = measured(classes, seeds, num_blocks)
    config = {
        "hidden": HIDDEN,
        "inputs": INPUTS,
        "examples": EXAMPLES,
        "seeds": seeds,
        "classes": list(classes),
    }
    run.save(result, config)
    run.print_table(text(result, classes))


if __name__ == "__main__":
    main()
