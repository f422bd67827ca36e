"""Which blocks does the checker suggest for the decoders whose training is compared?

Protocol: the "standard" decoders of experiments/decoders at initialisation (seed 0), 8 windows of
128 tokens of the packaged plays, Algorithm 3's blocks held against the Hessian with the checker's
defaults. Measured before any training, and not again.

`python experiments/decoder_suggestions.py [--smoke] [--sizes 1M 6M] [--device cuda]` writes
results/decoder_suggestions: suggestion_SIZE.json, the partition, evidence_SIZE.txt, the checker's
table. What was judged is kept, and the same command goes on.
"""

from pathlib import Path

import torch
from decoders.networks import CONTEXT, SIZES, decoder, tokenizer
from script import Run, Script

import hessian_tools as ht
from hessian_tools.problem.data import language_batches, text_tokens
from hessian_tools.results import Journal
from hessian_tools.structure.report import PartitionReport

OUT = Path("results/decoder_suggestions")
WINDOWS = 8
SMOKE_WINDOWS = 1
PROBES, SMOKE_PROBES = 8, 3
SMOKE_TENSORS = 4
CHARACTERS = 8  # at most, that a token takes on average


def problem(size: str, num_windows: int, device: str) -> ht.Problem:
    text = bytes(text_tokens("byte").tolist()).decode()
    coded = tokenizer().encode(text[: CHARACTERS * CONTEXT * (num_windows + 1)]).ids
    batches = language_batches(
        torch.tensor(coded),
        num_examples=num_windows,
        batch_size=min(4, num_windows),
        context=CONTEXT,
    )
    model = decoder(size, "standard", 0).to(device)
    moved = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    return ht.Problem(model, ht.cross_entropy, moved)


def suggest(run: Run, size: str) -> PartitionReport:
    """Judges every tensor, and writes the partition and the table."""
    run.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(run.out / f"judged_{size}.jsonl")
    windows = SMOKE_WINDOWS if run.smoke else WINDOWS
    checked = problem(size, windows, run.options.device)
    blocks = ht.partition(checked.model, "adam_mini")
    if run.smoke:
        blocks = ht.Partition(blocks.cuts[-SMOKE_TENSORS:])
    report = ht.check_partition(
        checked,
        blocks,
        num_probes=SMOKE_PROBES if run.smoke else PROBES,
        finished=journal.finished,
        on_tensor=journal.append,
    )
    report.suggestion.to_json(run.out / f"suggestion_{size}.json")
    (run.out / f"evidence_{size}.txt").write_text(f"{report}\n")
    print(f"{size}\n{report}")
    return report


def main() -> None:
    script = Script(__doc__, OUT, smoke="one window, four tensors, three probes: seconds")
    script.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    script.add_argument("--device", default="cpu")
    run = script.run()
    sizes = run.options.sizes[:1] if run.smoke else run.options.sizes
    reports = {size: suggest(run, size) for size in sizes}
    run.save(reports, {"windows": SMOKE_WINDOWS if run.smoke else WINDOWS})


if __name__ == "__main__":
    main()
