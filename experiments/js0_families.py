"""Which reading of heterogeneity separates CNNs from Transformers at initialisation?

Every family is computed with the same probes and steps on real data, weight matrices only, query,
key and value apart. Readings with an interval are given with it, or as not resolved; the
literature's (arXiv 2402.16788: ResNet and VGG near 0.1; MLP-mixer, BERT, GPT-2 and ViT from 35 to
286) with what blocks of one and the same spectrum would read.

`python experiments/js0_families.py [--smoke]` writes all readings to results/js0_families, and the
spectra they are read from; the same command goes on where it was stopped.
`python figures/js0_families.py` draws the readings.
"""

from pathlib import Path

from script import Script

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import pair_readings
from hessian_tools.problem import zoo

# name -> knobs of zoo.load; ResNet-18 at full size on small images, so that minutes suffice
MODELS: dict[str, dict[str, int]] = {"resnet18": {"image_size": 32, "num_examples": 32}}
FAMILIES = ("resnet", "vgg", "mixer", "vit", "bert", "gpt2", "gpt")
MODELS |= {f"{family}-nano": {} for family in FAMILIES}
MODELS |= {"mlp": {}}
PROBES, STEPS = 4, 40  # the literature: 10 and 100
SMOKE_MODELS = {"vgg-nano": {"num_examples": 2}, "mlp": {"num_examples": 2}}
SMOKE_PROBES, SMOKE_STEPS = 2, 6
SEED = 0
# reading -> heading
COLUMNS = {
    "scale": "scale",
    "curvature": "curvature",
    "log": "log",
    "wasserstein": "Wasserstein",
    "unnormalised": "JS0 (literature)",
}
OUT = Path("results/js0_families")


def block_spectra(
    name: str, knobs: dict[str, int], probes: int, steps: int, out: Path
) -> ht.BlockSpectra:
    """Spectra of one network's weight blocks; those that an earlier run has finished are read."""
    config = {
        "command": "js0_families",
        "model": name,
        **knobs,
        "probes": probes,
        "steps": steps,
        "seed": SEED,
    }
    folder = RunFolder(out / "spectra" / name, config)
    if folder.result:
        return folder.result["spectra"]
    made = zoo.load(name, seed=SEED, **knobs)
    problem = ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
    blocks = ht.partition(problem.model, "weights")
    spectra = ht.blockwise_slq(
        problem,
        blocks,
        num_probes=probes,
        num_steps=steps,
        seed=SEED,
        finished=folder.journal.finished,
        on_block=folder.journal.append,
    )
    folder.finish({"spectra": spectra})
    return spectra


def table(families: dict[str, JSHeterogeneity]) -> str:
    header = ("network", *COLUMNS.values(), "linear below")
    rows = []
    for name, js in families.items():
        cells = [js.told(reading) for reading in COLUMNS]
        rows.append([name, *cells, f"{js.linthresh:.1e}"])
    return report.table(header, rows)


def main() -> None:
    run = Script(__doc__, OUT, smoke="two families, few products: under a minute").run()
    models = SMOKE_MODELS if run.smoke else MODELS
    probes = SMOKE_PROBES if run.smoke else PROBES
    steps = SMOKE_STEPS if run.smoke else STEPS
    families = {}
    for name, knobs in models.items():
        found = block_spectra(name, knobs, probes, steps, run.out)
        families[name] = ht.js_heterogeneity(found, readings=pair_readings())
        print(f"{name}: {families[name].verdict}\n", flush=True)
    config = {"models": models, "probes": probes, "steps": steps, "seed": SEED, "blocks": "weights"}
    run.save(families, config)
    run.print_table(table(families))


if __name__ == "__main__":
    main()
