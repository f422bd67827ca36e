"""Which reading of heterogeneity separates CNNs from Transformers at initialisation, and why?

Claim: the published gap (ResNet and VGG near 0.1; MLP-mixer, BERT, GPT-2 and ViT from 35 to 286; arXiv 2402.16788)
rests on an absolute kernel width and an absolute grid. Every family is computed with the same probes and steps on real
data, weight matrices only, query, key and value apart; all readings go to results/js0_families/.
`python figures/js0_families.py` draws them.
"""

import argparse
from pathlib import Path

import hessian_tools as ht
from hessian_tools import report, zoo

MODELS = ("resnet-nano", "vgg-nano", "mlp", "mixer-nano", "vit-nano", "bert-nano", "gpt2-nano", "gpt-nano")
PROBES, STEPS = 4, 40  # the literature: 10 and 100
SMOKE_MODELS, SMOKE_PROBES, SMOKE_STEPS = ("resnet-nano", "gpt-nano"), 2, 6
SEED = 0
OUT = Path("results/js0_families")


def computed(name: str, probes: int, steps: int, examples: int | None) -> tuple[ht.BlockSpectra, ht.JSHeterogeneity]:
    made = zoo.load(name, seed=SEED, num_examples=examples)
    problem = ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
    blocks = ht.partition(problem.model, "weights")
    spectra = ht.blockwise_slq(problem, blocks, num_probes=probes, num_steps=steps, seed=SEED)
    return spectra, ht.js_heterogeneity(spectra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two families, few products: under a minute")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the result (default {OUT})")
    arguments = parser.parse_args()
    models, probes, steps = (SMOKE_MODELS, SMOKE_PROBES, SMOKE_STEPS) if arguments.smoke else (MODELS, PROBES, STEPS)
    spectra, found = {}, {}
    for name in models:
        spectra[name], found[name] = computed(name, probes, steps, 2 if arguments.smoke else None)
        print(f"{name}: {found[name].verdict.decision}", flush=True)
    config = {"models": models, "probes": probes, "steps": steps, "seed": SEED, "blocks": "weights"}
    ht.save({"spectra": spectra, "heterogeneity": found}, arguments.out / "result", config=config)
    text = report.readings_table(found)
    (arguments.out / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
