"""Which reading of heterogeneity separates CNNs from Transformers at initialisation, and why?

Claim: the published gap (ResNet and VGG near 0.1; MLP-mixer, BERT, GPT-2 and ViT from 35 to 286; arXiv 2402.16788)
rests on an absolute kernel width and an absolute grid. Every family is computed with the same probes and steps on real
data, weight matrices only, query, key and value apart; all readings go to results/js0_families/.
`python figures/js0_families.py` draws them.
"""

import argparse
from pathlib import Path

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.problem import zoo

# name -> knobs of zoo.load; ResNet-18 at full size on small images, so that minutes suffice
MODELS: dict[str, dict[str, int]] = {"resnet18": {"image_size": 32, "num_examples": 32}}
MODELS |= {
    f"{family}-nano": {} for family in ("resnet", "vgg", "mixer", "vit", "bert", "gpt2", "gpt")
} | {"mlp": {}}
PROBES, STEPS = 4, 40  # the literature: 10 and 100
SMOKE_MODELS, SMOKE_PROBES, SMOKE_STEPS = (
    {"vgg-nano": {"num_examples": 2}, "mlp": {"num_examples": 2}},
    2,
    6,
)
SEED = 0
OUT = Path("results/js0_families")


def block_spectra(
    name: str, knobs: dict[str, int], probes: int, steps: int, out: Path
) -> ht.BlockSpectra:
    """Spectra of one network's weight blocks; blocks that an interrupted run has finished are taken from it."""
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
        problem, blocks, num_probes=probes, num_steps=steps, seed=SEED,
        finished=folder.journal.finished, on_block=folder.journal.append,
    )  # fmt: skip
    folder.finish({"spectra": spectra})
    return spectra


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two families, few products: under a minute"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    models, probes, steps = (
        (SMOKE_MODELS, SMOKE_PROBES, SMOKE_STEPS) if arguments.smoke else (MODELS, PROBES, STEPS)
    )
    found = {}
    for name, knobs in models.items():
        found[name] = ht.js_heterogeneity(block_spectra(name, knobs, probes, steps, out))
        print(f"{name}: {found[name].verdict}\n", flush=True)
    config = {"models": models, "probes": probes, "steps": steps, "seed": SEED, "blocks": "weights"}
    ht.save(found, out / "result", config=config)
    header = (
        "network",
        "JS0 (literature)",
        "bounded",
        "log",
        "Wasserstein",
        "scale spread",
        "verdict",
    )
    order = ("unnormalised", "bounded", "log", "wasserstein")
    rows = []
    for name, js in found.items():
        readings = [*(js.readings[reading] for reading in order), js.scale_spread]
        cells = [report.plus_minus(reading.mean, reading.standard_error) for reading in readings]
        rows.append([name, *cells, js.verdict.decision])
    text = report.table(header, rows)
    (out / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
