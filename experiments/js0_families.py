"""Which reading of heterogeneity separates CNNs from Transformers at initialisation, and why?

Claim: the published gap (ResNet and VGG near 0.1; MLP-mixer, BERT, GPT-2 and ViT from 35 to 286; arXiv 2402.16788) rests on
an absolute kernel width summed over an absolute grid. Every family is computed with the same probes and steps on real data,
weight matrices only, query, key and value apart; all four readings and the spread of block scales are written to
results/js0_families/. `python figures/js0_families.py` draws them.
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


def heterogeneity(name: str, probes: int, steps: int, examples: int | None) -> ht.JSHeterogeneity:
    made = zoo.load(name, seed=SEED, num_examples=examples)
    problem = ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
    blocks = ht.partition(problem.model, "weights")
    return ht.js_heterogeneity(ht.blockwise_slq(problem, blocks, num_probes=probes, num_steps=steps, seed=SEED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two families, few products: under a minute")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the result (default {OUT})")
    arguments = parser.parse_args()
    models, probes, steps = (
        (SMOKE_MODELS, SMOKE_PROBES, SMOKE_STEPS) if arguments.smoke else (MODELS, PROBES, STEPS)
    )
    found = {}
    for name in models:
        found[name] = heterogeneity(name, probes, steps, 2 if arguments.smoke else None)
        print(f"{name}: {found[name].verdict.decision}", flush=True)
    config = {"models": models, "probes": probes, "steps": steps, "seed": SEED, "blocks": "weights"}
    ht.save(found, arguments.out / "result", config=config)
    text = report.readings_table(found)
    (arguments.out / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
