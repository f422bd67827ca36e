"""What does the partition checker say of a small GPT-2, at initialisation and after training?

Claim: which blocks are dense shows in the Hessian, and a cut along the wrong axis is detected.
Hugging Face's GPT-2 stores its weights transposed, (in, out), so cutting rows of what is stored
(axis 0), which is what a rule made for ``nn.Linear`` does, makes a block of each *input*. Judged
are the presets ``adam_mini``, ``neuron``, ``tensor`` and that naive cut of c_attn, c_proj and c_fc,
all on the same masses, on text that is not trained on.

`python experiments/partition_gpt.py [--smoke]` writes results/partition_gpt: the reports, and
table.txt. `python figures/partition_gpt.py` draws it.
"""

from pathlib import Path
from typing import Any

import torch
from script import Script
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app.partition_text import suggestion_text
from hessian_tools.app.report import table
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.problem import data, zoo
from hessian_tools.problem.problem import Problem
from hessian_tools.structure import PartitionReport

MODEL, SEQUENCES, CONTEXT, SEED = "gpt2-nano", 4, 64, 0  # byte tokens: 257 classes
TRAINING, BATCH, RATE = 300, 16, 1e-3  # steps, sequences of a step, Adam's learning rate
PROBES, BLOCKS = 8, 32  # the checker's defaults
STEPS = 12  # of Lanczos, for the extreme eigenvalues
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NAIVE = {f"transformer.h.*.{name}.weight": 0 for name in TRANSPOSED}
CLAIMS: dict[str, str | dict[str, int]] = {
    "adam_mini": "adam_mini",
    "neuron": "neuron",
    "tensor": "tensor",
    "stored rows": NAIVE,
}
FULL = {
    "training": TRAINING,
    "sequences": SEQUENCES,
    "context": CONTEXT,
    "batch": BATCH,
    "probes": PROBES,
    "blocks": BLOCKS,
    "steps": STEPS,
    "only": None,
}
SMOKE = {
    "training": 2,
    "sequences": 1,
    "context": 8,
    "batch": 2,
    "probes": 3,
    "blocks": 4,
    "steps": 2,
    "only": ["transformer.h.1.attn.c_attn.weight*", "transformer.h.1.mlp.c_fc.weight"],
}
OUT = Path("results/partition_gpt")


def trained(model: torch.nn.Module, batches: list[data.LabelledBatch]) -> float:
    """Adam on each batch once; the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.95))
    loss = torch.zeros(())
    for batch in tqdm(batches, unit="step", disable=None):
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def reports_of(
    hessian: ht.HessianOperator, time: str, knobs: dict[str, Any], folder: RunFolder
) -> dict[str, PartitionReport]:
    """Reports by claim; tensors that an earlier run has finished are read from its journal."""
    model = hessian.problem.model
    measured: dict[str, Any] = {}  # masses, which the claims share
    reports = {}
    for name, claim in CLAIMS.items():
        prefix = f"{time}/{name}/"
        finished = {
            key.removeprefix(prefix): kept
            for key, kept in folder.journal.finished.items()
            if key.startswith(prefix)
        }

        def keep(tensor: str, kept: Any, prefix: str = prefix) -> None:
            folder.journal.append(prefix + tensor, kept)

        reports[name] = ht.check_partition(
            hessian,
            ht.partition(model, claim, only=knobs["only"]),
            seed=SEED,
            num_probes=knobs["probes"],
            num_blocks=knobs["blocks"],
            measured=measured,
            finished=finished,
            on_tensor=keep,
        )
    return reports


def judged(problem: Problem, time: str, knobs: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """All that is saved of one time: reports, eigenvalues, suggestions, savings."""
    hessian = ht.HessianOperator(problem)
    reports = reports_of(hessian, time, knobs, folder)
    weights = ht.partition(problem.model, "weights", only=knobs["only"])
    extremes = ht.structure.block_extremes(hessian, weights, num_steps=knobs["steps"], seed=SEED)
    suggestions = {
        name: suggestion_text(problem, report)
        for name, report in reports.items()
        if name != "stored rows"
    }
    claimed = ht.partition(problem.model, "adam_mini", only=knobs["only"])
    savings = {"adam_mini": str(ht.blocks.state_savings(problem.model, claimed))}
    for name, report in reports.items():
        savings[f"suggested from {name}"] = str(report.savings)
    hessian.release()
    return {
        "loss": problem.loss,
        "reports": reports,
        "extremes": extremes,
        "suggestions": suggestions,
        "savings": savings,
    }


def counts_table(result: dict[str, Any]) -> str:
    """A row a time and claim: tensors by verdict."""
    rows = [
        [time, name, *(str(count) for count in report.counts.values())]
        for time, at in result.items()
        for name, report in at["reports"].items()
    ]
    any_time = next(iter(result.values()))
    any_report = next(iter(any_time["reports"].values()))
    return table(("when", "claim", *any_report.counts), rows, left=2)


def extremes_table(result: dict[str, Any]) -> str:
    """A row a weight: its extreme eigenvalues at both times."""
    ends = [at["extremes"] for at in result.values()]
    rows = []
    for i, name in enumerate(ends[0].names):
        values = [value for end in ends for value in (end.largest[i], end.smallest[i])]
        rows.append([name, *(f"{value:.3g}" for value in values)])
    header = [f"{side}, {time}" for time in result for side in ("lambda_max", "lambda_min")]
    return table(("weight", *header), rows)


def text(result: dict[str, Any]) -> str:
    parts = [counts_table(result), extremes_table(result)]
    for time, at in result.items():
        savings = "\n".join(f"  {name}: {words}" for name, words in at["savings"].items())
        parts.append(f"== {time}, loss {at['loss']:.4g} ==\noptimizer state\n{savings}")
        for name, report in at["reports"].items():
            parts.append(f"-- {name}, {time} --\n{report}")
            if name in at["suggestions"]:
                parts.append(at["suggestions"][name])
    return "\n\n".join(parts)


def training_batches(knobs: dict[str, Any]) -> list[data.LabelledBatch]:
    """Text that follows the sequences which the Hessian is of."""
    sequences = knobs["sequences"]
    count = sequences + knobs["training"] * knobs["batch"]
    ((inputs, targets),) = data.language_batches(
        data.text_tokens("byte"),
        num_examples=count,
        batch_size=count,
        context=knobs["context"],
        seed=SEED,
    )
    unseen = [part[sequences:].split(knobs["batch"]) for part in (inputs, targets)]
    return list(zip(*unseen, strict=True))


def both_times(knobs: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """What is judged at initialisation and after training, by time."""
    made = zoo.load(MODEL, seed=SEED, num_examples=knobs["sequences"], context=knobs["context"])
    batches = training_batches(knobs)
    initial = Problem(made.model, made.loss_fn, made.batches)
    result = {"initial": judged(initial, "initial", knobs, folder)}
    trained(made.model, batches)
    time = f"after {knobs['training']} steps"
    final = Problem(made.model, made.loss_fn, made.batches)
    result[time] = judged(final, time, knobs, folder)
    return result


def main() -> None:
    run = Script(__doc__, OUT, smoke="two tensors, two steps of training: seconds").run()
    knobs: dict[str, Any] = SMOKE if run.smoke else FULL
    config = {"command": "partition_gpt", "model": MODEL, "seed": SEED, "rate": RATE, **knobs}
    folder = RunFolder(run.out, config)
    result = folder.result
    if result is None:
        result = both_times(knobs, folder)
        folder.finish(result)
    run.print_table(text(result))


if __name__ == "__main__":
    main()
