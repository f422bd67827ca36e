"""Does a small Transformer's Hessian have as many dense blocks as heads, neurons and tokens?

Claim (Adam-mini, arXiv 2406.16793): in a one-layer Transformer of width 16 with 4 heads the Hessian
of query and key has as many dense blocks as heads, that of value, attention output and both MLP
matrices as many as output neurons, that of token embedding and output layer as many as tokens.
Here: characters of Shakespeare in lower case, those that occur fewer than 5,000 times read as a
space, embedding and output layer not tied, dense float64 Hessians of all eight tensors at
initialisation, at 1 % of training and at its end.

The share of a tensor's mass (squared Frobenius norm) inside the claimed blocks, and inside those of
every other cut (``ht.blocks.alternatives``), stands against the permutation null: entries of the
same Hessian dealt to blocks of these sizes at random. Its mean is D + (1 - D) (n - 1) / (N - 1), D
being the diagonal's share, N the tensor's entries, n a block's; its largest of PERMUTATIONS draws
is printed. The excess is (share - mean) / (1 - mean): 0 by chance, 1 block-diagonal. The verdict is
that of ``ht.check_partition`` on these matrices.

`python experiments/transformer_structure.py [--smoke]` writes results/transformer_structure:
shares, verdicts, heat maps, and table.txt. `python figures/transformer_structure.py` draws it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heat_map import heat_map
from script import Script
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.blocks.block import Cut
from hessian_tools.problem import data
from hessian_tools.problem.networks import NanoGPT

WIDTH, HEADS, CONTEXT = 16, 4, 32
RARE = 5000  # occurrences in the text below which a character reads as a space
SEQUENCES = 24  # of which the Hessian is
STEPS, BATCH, RATE, SEED = 2000, 64, 3e-3, 0  # Adam
TIMES = {"initialisation": 0.0, "1 % of training": 0.01, "end of training": 1.0}
PERMUTATIONS = 200
MOST_DRAWN = 256  # rows of a heat map
FULL = {"sequences": SEQUENCES, "steps": STEPS, "permutations": PERMUTATIONS}
SMOKE = {"sequences": 1, "steps": 1, "permutations": 5}
TENSORS = {
    "embedding": "tokens.weight",
    "query": "blocks.0.attention.query.weight",
    "key": "blocks.0.attention.key.weight",
    "value": "blocks.0.attention.value.weight",
    "attention output": "blocks.0.attention.proj.weight",
    "MLP, first": "blocks.0.fc.weight",
    "MLP, second": "blocks.0.proj.weight",
    "output layer": "head.weight",
}
CLAIMS = {name: "heads" if name in ("query", "key") else "rows" for name in TENSORS}
HEADER = (
    "tensor",
    "claim",
    "blocks",
    "|H|",
    "inside",
    "by chance",
    "largest",
    "excess",
    "diagonal",
    "excess of other cuts",
    "verdict",
)
OUT = Path("results/transformer_structure")


def characters() -> tuple[Tensor, list[str]]:
    """The text in numbers 0 to V - 1, and the V characters."""
    read = data.text_tokens("byte")
    read = torch.where((read >= ord("A")) & (read <= ord("Z")), read + 32, read)
    counts = torch.bincount(read)
    kept = torch.nonzero(counts >= RARE).flatten()
    numbers = torch.full((len(counts),), int((kept == ord(" ")).nonzero()))
    numbers[kept] = torch.arange(len(kept))
    return numbers[read], [chr(byte) for byte in kept.tolist()]


def trained(tokens: Tensor, vocabulary: int, steps: int) -> Iterator[tuple[str, NanoGPT]]:
    """(when, network) at TIMES; initialised as GPT-2 is, trained on windows of the text in random
    order.
    """
    torch.manual_seed(SEED)
    model = NanoGPT(vocabulary, CONTEXT, layers=1, d=WIDTH, num_heads=HEADS, tied=False).double()
    windows = (len(tokens) - 1) // CONTEXT
    batches = data.language_batches(
        tokens, num_examples=windows, batch_size=BATCH, context=CONTEXT, seed=SEED + 1
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    marks = {round(share * steps): when for when, share in reversed(TIMES.items())}
    for step in tqdm(range(steps + 1), unit="step", disable=None):
        if step in marks:
            yield marks[step], model
        inputs, targets = batches[step % len(batches)]
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def judged(model: nn.Module, matrices: dict[str, np.ndarray]) -> ht.structure.PartitionReport:
    """The checker on a quadratic loss of these very Hessians, by parameter.

    It says what it would say of the network, in less time.
    """
    fixed = {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}

    def quadratic(network: nn.Module, batch: Tensor) -> Tensor:
        flat = {name: p.flatten() for name, p in network.named_parameters() if name in fixed}
        return torch.stack([w @ fixed[name] @ w / 2 for name, w in flat.items()]).sum()

    cuts = ht.partition(model, "adam_mini").cuts
    claims = ht.Partition(tuple(cut for cut in cuts if cut.parameters[0] in fixed))
    return ht.check_partition(
        ht.Problem(model, quadratic, [torch.zeros(1)]), claims, exact=True, progress=False
    )


def chance(
    squares: np.ndarray, labels: np.ndarray, permutations: int, stream: np.random.Generator
) -> dict[str, float]:
    """The share of mass inside blocks, and by chance: mean, and largest of the permutations."""
    total = squares.sum()
    diagonal = squares.trace() / total
    sizes = np.bincount(labels)
    # of two different entries, how likely they are dealt to the same block
    same = float((sizes * (sizes - 1)).sum() / (len(labels) * (len(labels) - 1)))

    def inside(numbers: np.ndarray) -> float:
        onto = np.eye(len(sizes))[numbers]  # (n, B)
        return float(((squares @ onto) * onto).sum() / total)

    share = inside(labels)
    mean = float(diagonal + (1 - diagonal) * same)
    largest = max(inside(stream.permutation(labels)) for _ in range(permutations))
    return {
        "blocks": len(sizes),
        "share": share,
        "chance": mean,
        "largest": largest,
        "excess": (share - mean) / (1 - mean),
    }


def block_numbers(cut: Cut) -> np.ndarray:
    """(n,) the number of the block that each entry of the tensor belongs to."""
    part = cut.parts[0]
    numbers = torch.arange(part.num_blocks)[:, None].expand(-1, part.block_size)
    owner = torch.zeros(part.shape, dtype=torch.int64)
    part.place(numbers, owner)
    return owner.flatten().numpy()


def against_chance(
    model: nn.Module, parameter: str, matrix: np.ndarray, permutations: int
) -> dict[str, dict[str, float]]:
    """Share, chance and excess of each cut into several blocks that are not single entries."""
    squares = np.square(matrix)
    stream = np.random.default_rng(SEED)
    shares = {}
    for name, cut in ht.blocks.alternatives(model, parameter).items():
        if name not in ("whole", "elements"):
            shares[name] = chance(squares, block_numbers(cut), permutations, stream)
    return shares


def structure(
    model: NanoGPT, batches: list[data.LabelledBatch], permutations: int
) -> dict[str, Any]:
    """All that is drawn and printed of one time, by tensor."""
    problem = ht.Problem(model, ht.cross_entropy, batches)
    tensors = ht.partition(model, "tensor")
    dense = {
        name: ht.dense_block(problem, tensors[name], progress=False) for name in TENSORS.values()
    }
    verdicts = judged(model, {name: block.matrix for name, block in dense.items()})
    by_tensor = {}
    for tensor, name in TENSORS.items():
        matrix = dense[name].matrix
        verdict = verdicts[name]
        assert verdict.claim == CLAIMS[tensor], f"{tensor} is cut into {verdict.claim}"
        by_tensor[tensor] = {
            "cuts": against_chance(model, name, matrix, permutations),
            "verdict": verdict.verdict,
            "reason": verdict.reason,
            "diagonal": verdict["elements"].share,
            "norm": verdict.norm,
            "heat map": heat_map(matrix, -(-len(matrix) // MOST_DRAWN)),
            "symmetry error": dense[name].symmetry_error,
        }
    return {"loss": problem.loss, "tensors": by_tensor}


def row_of(name: str, tensor: dict[str, Any]) -> list[str]:
    claim = tensor["cuts"][CLAIMS[name]]
    others = [
        f"{cut} {values['excess']:.0%}"
        for cut, values in tensor["cuts"].items()
        if cut != CLAIMS[name]
    ]
    return [
        name,
        CLAIMS[name],
        str(claim["blocks"]),
        f"{tensor['norm']:.1e}",
        f"{claim['share']:.1%}",
        f"{claim['chance']:.1%}",
        f"{claim['largest']:.1%}",
        f"{claim['excess']:.1%}",
        f"{tensor['diagonal']:.1%}",
        ", ".join(others),
        tensor["verdict"],
    ]


def text(times: dict[str, Any], permutations: int) -> str:
    lines = []
    for when, at in times.items():
        rows = [row_of(name, tensor) for name, tensor in at["tensors"].items()]
        table = report.table(HEADER, rows, left=2)
        lines += [f"{when}, loss {at['loss']:.3f}", table, ""]
    worst = max(t["symmetry error"] for at in times.values() for t in at["tensors"].values())
    lines.append(
        "inside: share of the tensor's squared norm inside the claimed blocks; "
        f"by chance, largest: mean and largest of {permutations} permutations. "
        f"Asymmetry of the dense Hessians at most {worst:.0e}."
    )
    return "\n".join(lines)


def main() -> None:
    run = Script(__doc__, OUT, smoke="one sequence, one step: seconds").run()
    config = SMOKE if run.smoke else FULL
    permutations = config["permutations"]
    count = config["sequences"]
    tokens, alphabet = characters()
    batches = data.language_batches(
        tokens, num_examples=count, batch_size=count, context=CONTEXT, seed=SEED
    )
    times = {}
    for when, model in trained(tokens, len(alphabet), config["steps"]):
        times[when] = structure(model, batches, permutations)
    knobs = {
        "width": WIDTH,
        "heads": HEADS,
        "context": CONTEXT,
        "batch": BATCH,
        "rate": RATE,
        "seed": SEED,
    }
    result = {"times": times, "alphabet": alphabet, "claims": CLAIMS}
    run.save(result, {**config, **knobs})
    run.print_table(text(times, permutations))


if __name__ == "__main__":
    main()
