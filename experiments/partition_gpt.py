"""The checker's own verdicts on a small GPT of GPT-2's shape, at initialisation and after training on real text.

Claim: which blocks are dense shows in the Hessian, and a cut along the wrong axis is found out. Hugging Face's GPT-2
stores its weights transposed, (in, out), so cutting rows of what is stored (axis 0), which is what a rule made for
``nn.Linear`` does, makes a block of each *input*. Judged are the presets ``adam_mini``, ``neuron``, ``tensor`` and that
naive cut of c_attn, c_proj and c_fc, all on the same masses, on text that is not trained on.
`python figures/partition_gpt.py` draws.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.partition_text import suggestion_text
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.problem import data, zoo
from hessian_tools.problem.problem import Problem

MODEL, SEQUENCES, CONTEXT, SEED = "gpt2-nano", 4, 64, 0  # byte tokens: 257 classes
TRAINING, BATCH, RATE = 300, 16, 1e-3  # steps, sequences of a step, Adam's learning rate
PROBES, BLOCKS = 8, 32  # the checker's defaults
STEPS = 12  # of Lanczos, for the extreme eigenvalues
NAIVE = {
    f"transformer.h.*.{name}.weight": 0
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}
CLAIMS: dict[str, Any] = {
    "adam_mini": "adam_mini",
    "neuron": "neuron",
    "tensor": "tensor",
    "stored rows": NAIVE,
}
SMOKE = {"training": 2, "sequences": 1, "context": 8, "batch": 2, "probes": 3, "blocks": 4, "steps": 2,
         "only": ["transformer.h.1.attn.c_attn.weight*", "transformer.h.1.mlp.c_fc.weight"]}  # fmt: skip
OUT = Path("results/partition_gpt")


def trained(model: torch.nn.Module, batches: list[data.LabelledBatch]) -> float:
    """Adam on each batch once; the last loss."""
    optimizer, loss = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.95)), torch.zeros(())
    for batch in tqdm(batches, unit="step", disable=None):
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
    return float(loss)


def judged(problem: Problem, time: str, knobs: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Reports by claim, and extreme eigenvalues of the weights; tensors that were finished before are taken."""
    hessian, measured = ht.HessianOperator(problem), {}
    found: dict[str, Any] = {"loss": problem.loss, "reports": {}}
    for name, claim in CLAIMS.items():
        prefix = f"{time}/{name}/"
        journal = folder.journal.finished
        blocks = ht.partition(problem.model, claim, only=knobs["only"])
        found["reports"][name] = ht.check_partition(
            hessian, blocks, seed=SEED, num_probes=knobs["probes"], num_blocks=knobs["blocks"], measured=measured,
            finished={key.removeprefix(prefix): kept for key, kept in journal.items() if key.startswith(prefix)},
            on_tensor=lambda tensor, kept, prefix=prefix: folder.journal.append(prefix + tensor, kept),
        )  # fmt: skip
    weights = ht.partition(problem.model, "weights", only=knobs["only"])
    found["extremes"] = ht.structure.block_extremes(
        hessian, weights, num_steps=knobs["steps"], seed=SEED
    )
    found["suggestions"] = {
        name: suggestion_text(problem, own)
        for name, own in found["reports"].items()
        if name != "stored rows"
    }
    claimed = ht.partition(problem.model, "adam_mini", only=knobs["only"])
    found["savings"] = {"adam_mini": str(ht.blocks.state_savings(problem.model, claimed))}
    found["savings"] |= {
        f"suggested from {name}": str(own.savings) for name, own in found["reports"].items()
    }
    hessian.release()
    return found


def counts_table(result: dict[str, Any]) -> str:
    """A row a time and claim: tensors by verdict."""
    rows = [
        [time, name, *(str(count) for count in own.counts.values())]
        for time, found in result.items() for name, own in found["reports"].items()
    ]  # fmt: skip
    first = next(iter(next(iter(result.values()))["reports"].values()))
    return report.table(("when", "claim", *first.counts), rows, left=2)


def extremes_table(result: dict[str, Any]) -> str:
    """A row a weight: its extreme eigenvalues at both times."""
    ends = [found["extremes"] for found in result.values()]
    rows = [
        [name, *(f"{value:.3g}" for end in ends for value in (end.largest[i], end.smallest[i]))]
        for i, name in enumerate(ends[0].names)
    ]
    header = [f"{side}, {time}" for time in result for side in ("lambda_max", "lambda_min")]
    return report.table(("weight", *header), rows)


def text(result: dict[str, Any]) -> str:
    parts = [counts_table(result), extremes_table(result)]
    for time, found in result.items():
        savings = "\n".join(f"  {name}: {words}" for name, words in found["savings"].items())
        parts.append(f"== {time}, loss {found['loss']:.4g} ==\noptimizer state\n{savings}")
        for name, own in found["reports"].items():
            parts.append(f"-- {name}, {time} --\n{own}")
            if name in found["suggestions"]:
                parts.append(found["suggestions"][name])
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two tensors, two steps of training: seconds"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    knobs: dict[str, Any] = {"training": TRAINING, "sequences": SEQUENCES, "context": CONTEXT, "batch": BATCH,
                             "probes": PROBES, "blocks": BLOCKS, "steps": STEPS, "only": None}  # fmt: skip
    knobs |= SMOKE if arguments.smoke else {}
    folder = RunFolder(
        out, {"command": "partition_gpt", "model": MODEL, "seed": SEED, "rate": RATE, **knobs}
    )
    result = folder.result
    if result is None:
        made = zoo.load(MODEL, seed=SEED, num_examples=knobs["sequences"], context=knobs["context"])
        count = (
            knobs["sequences"] + knobs["training"] * knobs["batch"]
        )  # the first are those of the Problem
        tokens = data.text_tokens("byte")
        ((inputs, targets),) = data.language_batches(
            tokens, num_examples=count, batch_size=count, context=knobs["context"], seed=SEED
        )
        unseen = [part[knobs["sequences"] :].split(knobs["batch"]) for part in (inputs, targets)]
        result = {
            "initial": judged(
                Problem(made.model, made.loss_fn, made.batches), "initial", knobs, folder
            )
        }
        trained(made.model, list(zip(*unseen, strict=True)))
        time = f"after {knobs['training']} steps"
        result[time] = judged(Problem(made.model, made.loss_fn, made.batches), time, knobs, folder)
        folder.finish(result)
    (out / "table.txt").write_text(text(result) + "\n")
    print(text(result))


if __name__ == "__main__":
    main()
