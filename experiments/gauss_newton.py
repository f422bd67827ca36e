"""Where do the Hessian and the Gauss-Newton matrix part, and is block-diagonal curvature enough?

Protocol, fixed before any result: gpt-nano and resnet-nano (batch statistics) on packaged data, at
initialisation, float32. Three measurements of each network, of the Hessian H and the Gauss-Newton
matrix G:

- the spectra of the blocks of weight matrices, 2 probes of 30 steps;
- masses, squared Frobenius norms, of H, G and H - G, of the whole and of every such block, from the
  same 16 Rademacher probes for both matrices, each a product with H and one with G: the share of G
  is |G|^2 / |H|^2, the alignment <H, G> / (|H| |G|), and what is left |H - G|^2 / |H|^2;
- the mass between tensors by `ht.coupling`, 8 probes for each tensor of all parameters: the share
  inside tensors, between tensors of one layer, and across layers.

Errors are standard errors over probes (jackknife, for ratios). What was finished is kept, and the
same command goes on.

`python experiments/gauss_newton.py [--smoke]` writes results/gauss_newton: table.txt, all numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script import Run, Script
from torch import Tensor

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.problem import zoo
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.tables import plus_minus

OUT = Path("results/gauss_newton")
NETWORKS = ("gpt-nano", "resnet-nano")
KINDS = {"Hessian": ht.HessianOperator, "Gauss-Newton": ht.GaussNewtonOperator}
SPECTRA = {"num_probes": 2, "num_steps": 30}
PROBES, COUPLING = 16, 8
SMOKE_SPECTRA = {"num_probes": 1, "num_steps": 2}
SMOKE_PROBES, SMOKE_COUPLING = 2, 2
MASS_HEADER = ("network", "block", "|G|^2 / |H|^2", "alignment", "|H - G|^2 / |H|^2")
PLACE_HEADER = ("network", "matrix", "inside tensors", "inside layers", "across layers")
Floats = np.ndarray


def problem(name: str, smoke: bool) -> ht.Problem:
    made = zoo.load(name, num_examples=2 if smoke else None)
    return ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)


def kept(run: Run, name: str, compute: Callable[[], Any]) -> Any:
    """What an earlier run has left under ``name``, else computed and left."""
    folder = run.out / "parts"
    path = folder / name
    if path.with_suffix(".json").exists():
        return ht.load(path)
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    ht.save(found, path)
    return found


# --------------------------------------------------------------------------------------- measuring


def spectra(operator: CurvatureOperator, smoke: bool) -> ht.BlockSpectra:
    blocks = ht.partition(operator.problem.model, "weights")
    return ht.blockwise_slq(operator, blocks, **(SMOKE_SPECTRA if smoke else SPECTRA))


def products(operators: list[CurvatureOperator], smoke: bool) -> dict[str, Floats]:
    """(3, probes) squares of H z, G z and their inner product, by block and of the whole."""
    count = SMOKE_PROBES if smoke else PROBES
    hessian = operators[0]
    size = hessian.problem.num_parameters
    probes = draw_probes("rademacher", 0, "gauss-newton", count, size, dtype=hessian.dtype)
    found = {"whole": joint([operator.matmat(probes) for operator in operators])}
    for block in ht.partition(hessian.problem.model, "weights"):
        some = draw_probes("rademacher", 0, block.name, count, block.numel, dtype=hessian.dtype)
        pair = [operator.block(block).matmat(some) for operator in operators]
        found[block.name] = joint(pair)
    return found


def joint(pair: list[Tensor]) -> Floats:
    h, g = (product.double() for product in pair)
    return torch.stack([(h * h).sum(1), (g * g).sum(1), (h * g).sum(1)]).numpy()


def coupling(operator: CurvatureOperator, smoke: bool) -> dict[str, tuple[float, float]]:
    tensors = ht.partition(operator.problem.model, "tensor")
    found = ht.coupling(operator, tensors, num_probes=SMOKE_COUPLING if smoke else COUPLING)
    return {place: (share.value, share.standard_error) for place, share in found.shares.items()}


def measured(run: Run, name: str) -> dict[str, Any]:
    case = problem(name, run.smoke)
    operators = [kind(case) for kind in KINDS.values()]
    found: dict[str, Any] = {
        "masses": kept(run, f"{name}-masses", lambda: products(operators, run.smoke))
    }
    for kind, operator in zip(KINDS, operators, strict=True):
        label = f"{name}-{kind}"
        of_kind = {
            "spectra": kept(run, f"{label}-spectra", lambda o=operator: spectra(o, run.smoke)),
            "places": kept(run, f"{label}-places", lambda o=operator: coupling(o, run.smoke)),
        }
        found[kind] = of_kind
        operator.release()
    return found


# -------------------------------------------------------------------------------------- reporting


def ratios(squares: Floats) -> Floats:
    """Share, alignment and rest, from sums over probes of the three squares."""
    h, g, inner = squares.sum(1)
    return np.array([g / h, inner / np.sqrt(h * g), (h + g - 2 * inner) / h])


def with_errors(squares: Floats) -> tuple[Floats, Floats]:
    """The ratios and their jackknife errors over probes."""
    count = squares.shape[1]
    without = [ratios(np.delete(squares, probe, axis=1)) for probe in range(count)]
    spread = np.std(without, axis=0) * np.sqrt(count - 1)
    return ratios(squares), spread


def mass_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, of_network in found.items():
        for block, squares in of_network["masses"].items():
            values, spreads = with_errors(squares)
            pairs = zip(values, spreads, strict=True)
            rows.append([name, block, *(plus_minus(v, 2 * s) for v, s in pairs)])
    return rows


def place_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, of_network in found.items():
        for kind in KINDS:
            places = of_network[kind]["places"]
            inside = places["block"]
            layer = places["layer"]
            across = places["across"]
            cells = [percent(*place) for place in (inside, layer, across)]
            rows.append([name, kind, *cells])
    return rows


def percent(value: float, error: float) -> str:
    return f"{plus_minus(100 * value, 200 * error)} %"


def main() -> None:
    smoke = "two examples, few probes and steps: a quarter of a minute"
    run = Script(__doc__, OUT, smoke=smoke).run()
    run.out.mkdir(parents=True, exist_ok=True)
    found = {name: measured(run, name) for name in NETWORKS}
    run.save(found, {"spectra": SPECTRA, "probes": PROBES, "coupling": COUPLING})
    masses = report.table(MASS_HEADER, mass_rows(found), left=2)
    places = report.table(PLACE_HEADER, place_rows(found), left=2)
    run.print_table(f"{places}\n\n{masses}\n\n± is two standard errors")


if __name__ == "__main__":
    main()
