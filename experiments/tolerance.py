"""Is a reading to a tolerance of 5 % within 5 % of the truth, and what does it cost?

Protocol, fixed before any result:

- Three networks at initialisation with few examples, so that minutes suffice; their weight blocks.
- The reference is one run of 10 Gaussian probes of 100 steps in every block, which is the
  literature's setting but for re-orthogonalisation, with the interval that it gives itself. "log"
  and "wasserstein" of the reference are taken on the axis of the run that is compared with it.
- Adaptive runs to 5 % of "scale", "curvature", "log" and "wasserstein", with other seeds and other
  probes (Rademacher).
- The claim: the root mean square of their relative deviations from the reference is at most 5 %,
  where the tolerance was met; their intervals and the reference's overlap. Where the reference is
  not resolved, or is below a tenth of a decade (0.05 nats for "log"), to which a tolerance refers
  then, deviations are relative to that.

`python experiments/tolerance.py [--smoke]` writes results/tolerance: errors and costs by network
and reading, table.txt, and all finished runs, so that the command goes on where it was stopped.
`python figures/tolerance.py` draws it.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from script import Run, Script
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.heterogeneity.adaptive import adaptive_js0
from hessian_tools.heterogeneity.comparison import compared
from hessian_tools.heterogeneity.measure import GridSettings, Sampled, Workspace
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.problem import zoo
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.tables import interval

TOLERANCE = 0.05
ASKED = ("scale", "curvature", "log", "wasserstein")
REFERENCE = {"num_probes": 10, "num_steps": 100, "probes": "gaussian", "exact": False}
# name -> knobs of zoo.load
MODELS: dict[str, dict[str, int]] = {
    "vgg-nano": {"num_examples": 8},
    "gpt-nano": {"num_examples": 1, "context": 32},
    "resnet-nano": {"num_examples": 8},
}
SEEDS, REFERENCE_SEED = 6, 1000
SMOKE = {"vgg-nano": {"num_examples": 2, "image_size": 16}}
SMOKE_REFERENCE = {**REFERENCE, "num_probes": 3, "num_steps": 12}
HEADER = ("network", "reading", "reference", "error", "products", "met", "overlap", "claim holds")
OUT = Path("results/tolerance")


def operator(model: str, knobs: dict[str, int]) -> tuple[ht.HessianOperator, ht.Partition]:
    """The Hessian of one network at initialisation, and its weight blocks."""
    made = zoo.load(model, seed=0, **knobs)
    problem = ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
    return ht.HessianOperator(problem, memory="4GiB"), ht.partition(problem.model, "weights")


def reference(
    model: str,
    knobs: dict[str, int],
    setting: dict[str, Any],
    out: Path,
) -> list[Quadrature]:
    """The blocks of the reference run."""
    config = {"command": "tolerance", "seed": REFERENCE_SEED, **knobs, **setting}
    folder = RunFolder(out / "reference" / model, config)
    if not folder.result:
        hessian, blocks = operator(model, knobs)
        spectra = ht.blockwise_slq(
            hessian,
            blocks,
            seed=REFERENCE_SEED,
            **setting,
            finished=folder.journal.finished,
            on_block=folder.journal.append,
        )
        folder.finish(dict(spectra))
        folder = RunFolder(folder.path, folder.config)  # as it will be read by the next run
    return list((folder.result or {}).values())


def adaptive(
    model: str,
    knobs: dict[str, int],
    seed: int,
    reading: str,
    true: list[Quadrature],
    out: Path,
) -> dict[str, Any]:
    """One run to TOLERANCE of one reading, and what the reference is on its axis."""
    config = {"command": "tolerance", "seed": seed, "reading": reading, **knobs}
    config |= {"tolerance": TOLERANCE}
    folder = RunFolder(out / "adaptive" / f"{model}-{reading}-{seed}", config)
    if not folder.result:
        hessian, blocks = operator(model, knobs)
        result = adaptive_js0(
            hessian,
            blocks,
            tolerance=TOLERANCE,
            reading=reading,
            seed=seed,
            finished=folder.journal.finished,
            on_block=folder.journal.append,
        )
        found, workspace = compared(list(result.spectra.values()), [reading], GridSettings())
        measure = READINGS[reading]
        assert isinstance(measure, Sampled)
        there = measure.sample(Workspace(true, GridSettings(), workspace.axis))
        folder.finish(
            {
                "estimate": found[reading].mean,
                "low": found[reading].low,
                "high": found[reading].high,
                "met": result.met,
                "matvecs": result.spectra.num_matvecs,
                "reference": there.mean,
                "reference_interval": list(there.interval(0.0)),
                "linear_below": workspace.axis.linthresh,
            }
        )
        folder = RunFolder(folder.path, folder.config)
    return folder.result or {}


def summary(reading: str, runs: list[dict[str, Any]], products: int) -> dict[str, Any]:
    """Errors and cost of the adaptive runs of one network and reading."""
    least = READINGS[reading].least
    deviations = [
        (run["estimate"] - run["reference"]) / max(abs(run["reference"]), least) for run in runs
    ]
    overlap = [
        run["low"] <= run["reference_interval"][1] and run["reference_interval"][0] <= run["high"]
        for run in runs
    ]
    return {
        "deviations": deviations,
        "error": float(np.sqrt(np.mean(np.square(deviations)))),
        "share": [run["matvecs"] / products for run in runs],
        "met": [run["met"] for run in runs],
        "overlap": overlap,
        "runs": runs,
    }


def row_of(model: str, reading: str, found: dict[str, Any]) -> list[str]:
    first = found["runs"][0]
    shares = [100 * share for share in found["share"]]
    met = found["met"]
    claim = "not met, and told"
    if all(met):
        claim = "yes" if found["error"] <= TOLERANCE and all(found["overlap"]) else "no"
    return [
        model,
        reading,
        interval(first["reference"], *first["reference_interval"]),
        f"{100 * found['error']:.1f} %",
        f"{min(shares):.1f} to {max(shares):.1f} %",
        f"{sum(met)} of {len(met)}",
        f"{sum(found['overlap'])} of {len(met)}",
        claim,
    ]


def measured(run: Run, models: dict[str, dict[str, int]]) -> dict[str, Any]:
    setting = SMOKE_REFERENCE if run.smoke else REFERENCE
    seeds = 1 if run.smoke else SEEDS
    result: dict[str, Any] = {}
    for (model, knobs), reading in tqdm([*product(models.items(), ASKED)], disable=None):
        true = reference(model, knobs, setting, run.out)
        runs = [adaptive(model, knobs, seed, reading, true, run.out) for seed in range(seeds)]
        products = sum(block.num_matvecs for block in true)
        result.setdefault(model, {})[reading] = summary(reading, runs, products)
    return result


def main() -> None:
    script = Script(__doc__, OUT, smoke="one small network, one seed: under a minute")
    script.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all"
    )
    run = script.run()
    models = SMOKE if run.smoke else {name: MODELS[name] for name in run.options.models}
    result = measured(run, models)
    run.save(result, {"models": models, "tolerance": TOLERANCE})
    rows = [
        row_of(model, reading, found)
        for model, readings in result.items()
        for reading, found in readings.items()
    ]
    run.print_table(report.table(HEADER, rows, left=2))


if __name__ == "__main__":
    main()
