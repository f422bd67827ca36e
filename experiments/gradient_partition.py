"""What does the checker say of blocks that squared gradients suggest?

Gefen (arXiv 2606.13894) infers blocks like Adam-mini's from the squared gradients of the first
steps and claims the Hessian for it. The rule below is ours, not its code; the question is the same.

Protocol, fixed before any result.

A decoder, a ResNet with GroupNorm and an MLP of the evidence's suite at initialisation. Squared
gradients are means over 8 batches of 32. A tensor's cut, of all that make sense (whole, rows,
columns, heads; not single entries), is the one with the lowest BIC where log10 of its entries is
normal about a mean a block: n log(residual variance) + B log(n), B blocks, n entries that have a
gradient. The checker, with its defaults and 8 probes, then judges Adam-mini's blocks (Algorithm 3)
and these, against the Hessian of 8 examples.

Told: tensor by tensor both cuts and verdicts; and of the matrices, how many verdicts contradict
each partition (anything but "follows" and "undecided").

`python experiments/gradient_partition.py [--smoke]` writes results/gradient_partition; tensors that
were judged are kept in journals, and the same command goes on.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from evidence import SUITE, Pair
from script import Run, Script
from torch import Tensor

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.presets import alternatives
from hessian_tools.results import Journal
from hessian_tools.structure.report import PartitionReport

OUT = Path("results/gradient_partition")
PAIRS = ("decoder-pre-norm/bytes", "resnet-groupnorm/three-blocks", "mlp/tanh-deep")
BATCHES, EXAMPLES, PROBES = 8, 8, 8
SMOKE_BATCHES, SMOKE_EXAMPLES, SMOKE_PROBES = 1, 1, 3
TOO_FINE = "elements"
SOURCES = ("Adam-mini", "squared gradients")
HEADER = ("tensor", "Adam-mini", "verdict", "squared gradients", "verdict")


def squared_gradients(pair: Pair, num_batches: int) -> dict[str, Tensor]:
    """By tensor, the mean over batches."""
    model = pair.make_model(0)
    stream = pair.stream()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(num_batches):
        model.zero_grad()
        stream.loss_fn(model, stream.batch(step)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square() / num_batches
    return total


def bic(cut: Cut, squares: Mapping[str, Tensor]) -> float:
    """Of a mean a block, in log10 of the squares; entries without gradient are left out."""
    rows = cut.rows(squares).double()
    seen = rows > 0
    n, blocks = int(seen.sum()), int(seen.any(1).sum())
    if n <= blocks:
        return float("inf")
    logs = torch.where(seen, rows, 1.0).log10()
    means = logs.sum(1) / seen.sum(1).clamp(min=1)
    residual = torch.where(seen, logs - means[:, None], 0.0).square().sum() / n
    return float(n * residual.log() + blocks * np.log(n))


def suggested(pair: Pair, squares: Mapping[str, Tensor]) -> ht.Partition:
    """The cut of the lowest BIC of every tensor."""
    model = pair.make_model(0)
    cuts = []
    for name, _ in model.named_parameters():
        possible = {
            what: cut for what, cut in alternatives(model, name).items() if what != TOO_FINE
        }
        cuts.append(min(possible.values(), key=lambda cut: bic(cut, squares)))
    return ht.Partition(tuple(cuts))


def judged(run: Run, pair: Pair, source: str, blocks: ht.Partition) -> PartitionReport:
    stem = f"{pair.name.replace('/', '.')}.{source.replace(' ', '_')}"
    journal = Journal(run.out / f"judged_{stem}.jsonl")
    stream = pair.stream(SMOKE_EXAMPLES if run.smoke else EXAMPLES)
    problem = ht.Problem(
        pair.make_model(0), stream.loss_fn, [stream.batch(0)], batch_stats=stream.batch_stats
    )
    return ht.check_partition(
        problem,
        blocks,
        num_probes=SMOKE_PROBES if run.smoke else PROBES,
        finished=journal.finished,
        on_tensor=journal.append,
    )


def table(reports: Mapping[str, PartitionReport]) -> str:
    """A row a matrix."""
    rows = []
    for tensors in zip(*(reports[source].tensors for source in SOURCES), strict=True):
        if len(tensors[0].evidence) > 1:
            cells = [cell for tensor in tensors for cell in (tensor.claim, tensor.verdict)]
            rows.append([tensors[0].name, *cells])
    return report.table(HEADER, rows, left=5)


def contradicted(found: PartitionReport) -> str:
    judged = [tensor for tensor in found.tensors if len(tensor.evidence) > 1]
    wrong = sum(tensor.verdict not in ("follows", "undecided") for tensor in judged)
    follow = sum(tensor.verdict == "follows" for tensor in judged)
    return f"{wrong} of {len(judged)} contradicted, {follow} follow"


def compared(run: Run, name: str) -> dict[str, PartitionReport]:
    pair = SUITE[name]
    squares = squared_gradients(pair, SMOKE_BATCHES if run.smoke else BATCHES)
    partitions = {
        SOURCES[0]: ht.partition(pair.make_model(0), "adam_mini"),
        SOURCES[1]: suggested(pair, squares),
    }
    return {source: judged(run, pair, source, blocks) for source, blocks in partitions.items()}


def main() -> None:
    script = Script(__doc__, OUT, smoke="an MLP, one example: seconds")
    run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    texts, results = [], {}
    for name in PAIRS[-1:] if run.smoke else PAIRS:
        reports = compared(run, name)
        results[name] = reports
        told = [f"{source}: {contradicted(reports[source])}" for source in SOURCES]
        texts.append("\n".join([name, table(reports), *told]))
    run.save(results, {"batches": BATCHES, "examples": EXAMPLES, "probes": PROBES})
    run.print_table("\n\n".join(texts))


if __name__ == "__main__":
    main()
