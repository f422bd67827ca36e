"""The more classes, the more block-diagonal the Hessian at initialisation: 1/C and 1/C^2, by how much exactly?

Claim (arXiv 2505.02809): for f = V relu(W x) with m hidden neurons and C classes, Gaussian data and
LeCun initialisation, the mean squared Frobenius norm of an off-diagonal block over that of a diagonal one falls as 1/C
for H_ww (blocks: hidden neurons; cross-entropy and mean squared error) and as 1/C^2 for H_vv (blocks: outputs;
cross-entropy; exactly 0 under MSE). A diagonal block faces C - 1 others in its row, so H_vv's total mass outside falls
as 1/C. "By pairs" divides each |H_ij|^2 by |H_ii| |H_jj| before the mean: outputs of large logits weigh no more then.
Exponents are least squares of log ratio on log C, one a seed, with 95 % intervals of Student's t over seeds. Norms are
in closed form (:mod:`relu_hessian`), checked here against ``ht.dense_block`` at small C and, at sizes m C too large for
that, against the blocks that ``ht.coupling`` draws and probes.
`python figures/class_laws.py` draws it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from relu_hessian import LOSSES, ReluHessian, worst_difference
from scipy.stats import t as student
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report

HIDDEN, INPUTS, EXAMPLES = 8, 60, 600
CLASSES = (10, 30, 100, 300, 1000)
SEEDS, SMOKE_SEEDS, SMOKE_CLASSES = 12, 2, (10, 30)
FEW = 10  # classes of the dense check
DRAWN, PROBES = 64, 4  # blocks and probes of the check by probing
# name -> loss, block, exponent, whether by pairs
LAWS = {
    "H_ww, MSE": ("MSE", "ww", -1, False), "H_ww, CE": ("CE", "ww", -1, False), "H_vv, CE": ("CE", "vv", -2, False),
    "H_vv, CE, by pairs": ("CE", "vv", -2, True),
}  # fmt: skip
# measured before; whether H_vv by pairs is not known
REFERENCE = {
    "H_ww, MSE": {10: 2.0e-2, 100: 2.3e-3, 1000: 2.9e-4}, "H_ww, CE": {10: 3.0e-2, 100: 3.7e-3, 1000: 4.9e-4},
    "H_vv, CE": {10: 1.8e-2, 100: 1.3e-4, 1000: 1.2e-6},
}  # fmt: skip
OUT = Path("results/class_laws")


def drawn(classes: int, seed: int, loss: str) -> ReluHessian:
    """Data N(0, I), weights N(0, 1 / fan in), labels even and independent; the same for both losses."""
    stream = torch.Generator().manual_seed(1000 * seed + classes)
    inputs, w, v = (torch.randn(shape, generator=stream, dtype=torch.float64)
                    for shape in ((EXAMPLES, INPUTS), (HIDDEN, INPUTS), (classes, HIDDEN)))  # fmt: skip
    labels = torch.randint(classes, (EXAMPLES,), generator=stream)
    return ReluHessian(inputs, labels, w / INPUTS**0.5, v / HIDDEN**0.5, loss)


def ratio(mass: Tensor, by_pairs: bool) -> float:
    """Mean mass of an off-diagonal block over that of a diagonal one."""
    if by_pairs:
        mass = mass / (mass.diagonal()[:, None] * mass.diagonal()).sqrt()
    count, own = len(mass), float(mass.diagonal().sum())
    return (float(mass.sum()) - own) / (count - 1) / own


def against_dense(loss: str) -> dict[str, float]:
    """The largest difference of the closed form's masses from the dense Hessian's, over the largest mass."""
    net = drawn(FEW, 0, loss)
    targets = nn.functional.one_hot(net.labels, FEW).double() if loss == "MSE" else None
    problem = net.problem(targets)
    dense = ht.dense_block(problem, ht.partition(problem.model, {"*": "row"}), progress=False)
    mass = torch.from_numpy(dense.mass)
    found = {"ww": worst_difference(net.ww(), mass[:HIDDEN, :HIDDEN])}
    found["vv"] = worst_difference(net.vv(), mass[HIDDEN:, HIDDEN:])
    if loss == "CE":
        found["wv"] = worst_difference(net.wv(), mass[:HIDDEN, HIDDEN:])
    return found


def against_probing(classes: int, num_blocks: int) -> dict[str, float]:
    """The share of H_vv's mass inside output neurons: closed form, ht.coupling's estimate and its standard error."""
    net = drawn(classes, 0, "CE")
    problem = net.problem()
    rows = ht.partition(problem.model, {"3.weight": "row"})
    found = ht.coupling(
        problem, rows, num_probes=PROBES, num_blocks=num_blocks, exact=False, progress=False
    )
    mass, share = net.vv(), found.shares["block"]
    truth = float(mass.diagonal().sum() / mass.sum())
    return {"classes": classes, "closed form": truth, "estimate": share.value, "standard error": share.standard_error,
            "products": found.num_matvecs}  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean over seeds and half the width of its 95 % interval."""
    count = len(values)
    return float(values.mean()), float(
        student.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    )


def exponents(ratios: np.ndarray, classes: tuple[int, ...]) -> tuple[float, float]:
    """Of the (seeds, C) ratios of one law: mean slope and half width."""
    return interval(np.polyfit(np.log(classes), np.log(ratios).T, 1)[0])


def text(found: dict, classes: tuple[int, ...]) -> str:
    header = (
        "off-diagonal / diagonal",
        *(f"C = {c}" for c in classes),
        "exponent",
        "from C = 100",
        "law",
    )
    rows = []
    for law, (_, _, power, _) in LAWS.items():
        cells = [f"{mean:.2e} ± {half:.0e}" for mean, half in map(interval, found["ratios"][law].T)]
        fits = [
            f"{mean:.3f} ± {half:.3f}"
            for mean, half in (found["exponents"][law], found["late exponents"][law])
        ]
        rows.append([law, *cells, *fits, str(power)])
        if law not in REFERENCE:
            continue
        known = (REFERENCE[law].get(c) for c in classes)
        rows.append(
            [
                "  measured before",
                *("" if value is None else f"{value:.1e}" for value in known),
                "",
                "",
                "",
            ]
        )
    lines = [report.table(header, rows), "± is half a 95 % interval over seeds."]
    worst = max(value for loss in found["dense"].values() for value in loss.values())
    lines.append(f"Closed form against ht.dense_block, C = {FEW}, both losses: masses differ by at most {worst:.1e} "
                 "of the largest.")  # fmt: skip
    for check in found["probing"]:
        lines.append(
            f"Share of H_vv's mass inside outputs, C = {check['classes']}: closed form {check['closed form']:.4f}, "
            f"ht.coupling {check['estimate']:.4f} ± {check['standard error']:.4f} in {check['products']} products."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two seeds, two numbers of classes: seconds"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    classes, seeds, num_blocks = (
        (SMOKE_CLASSES, SMOKE_SEEDS, 8) if arguments.smoke else (CLASSES, SEEDS, DRAWN)
    )
    ratios = {law: np.zeros((seeds, len(classes))) for law in LAWS}
    for seed, place in tqdm(
        [(s, i) for s in range(seeds) for i in range(len(classes))], disable=None
    ):
        nets = {loss: drawn(classes[place], seed, loss) for loss in LOSSES}
        masses = {
            (loss, layer): getattr(nets[loss], layer)()
            for loss, layer in {law[:2] for law in LAWS.values()}
        }
        for name, (loss, layer, _, by_pairs) in LAWS.items():
            ratios[name][seed, place] = ratio(masses[loss, layer], by_pairs)
    late = [i for i, c in enumerate(classes) if c >= 100] or list(range(len(classes)))
    found = {
        "ratios": ratios,
        "exponents": {law: exponents(values, classes) for law, values in ratios.items()},
        "late exponents": {
            law: exponents(values[:, late], tuple(classes[i] for i in late))
            for law, values in ratios.items()
        },
        "dense": {loss: against_dense(loss) for loss in LOSSES},
        "probing": [against_probing(c, num_blocks) for c in classes[-2:]],
        "classes": np.array(classes),
        "laws": {law: power for law, (_, _, power, _) in LAWS.items()},
        "reference": {
            law: {str(c): value for c, value in known.items()} for law, known in REFERENCE.items()
        },
    }
    config = {
        "hidden": HIDDEN,
        "inputs": INPUTS,
        "examples": EXAMPLES,
        "seeds": seeds,
        "classes": list(classes),
    }
    ht.save(found, out / "result", config=config)
    table = text(found, classes)
    (out / "table.txt").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
