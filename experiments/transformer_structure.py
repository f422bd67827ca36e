"""The published picture of a small Transformer's Hessian: as many dense blocks as heads, neurons, tokens?

Claim (Adam-mini, arXiv 2406.16793): in a one-layer Transformer of width 16 with 4 heads the Hessian of query and key
has as many dense blocks as heads, that of value, attention output and both MLP matrices as many as output neurons, that
of token embedding and output layer as many as tokens. Here: characters of Shakespeare in lower case, those that occur
fewer than 5,000 times read as a space, embedding and output layer not tied, dense float64 Hessians of all eight tensors
at initialisation, at 1 % of training and at its end.

The share of a tensor's mass (squared Frobenius norm) inside the claimed blocks, and inside those of every other cut
(``ht.blocks.alternatives``), stands against the permutation null: entries of the same Hessian dealt to blocks of these sizes
at random. Its mean is D + (1 - D) (n - 1) / (N - 1), D being the diagonal's share, N the tensor's entries, n a block's;
its largest of PERMUTATIONS draws is printed. The excess is (share - mean) / (1 - mean): 0 by chance, 1 block-diagonal.
The verdict is that of ``ht.check_partition`` on these matrices. `python figures/transformer_structure.py` draws it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heat_map import heat_map
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.problem import data
from hessian_tools.problem.networks import NanoGPT

WIDTH, HEADS, CONTEXT = 16, 4, 32
RARE = 5000  # occurrences in the text below which a character reads as a space
SEQUENCES = 24  # of which the Hessian is
STEPS, BATCH, RATE, SEED = 2000, 64, 3e-3, 0  # Adam
TIMES = {"initialisation": 0.0, "1 % of training": 0.01, "end of training": 1.0}
PERMUTATIONS = 200
MOST_DRAWN = 256  # rows of a heat map
SMOKE = {"sequences": 1, "steps": 1, "permutations": 5}
TENSORS = {
    "embedding": "tokens.weight", "query": "blocks.0.attention.query.weight", "key": "blocks.0.attention.key.weight",
    "value": "blocks.0.attention.value.weight", "attention output": "blocks.0.attention.proj.weight",
    "MLP, first": "blocks.0.fc.weight", "MLP, second": "blocks.0.proj.weight", "output layer": "head.weight",
}  # fmt: skip
CLAIMS = {name: "heads" if name in ("query", "key") else "rows" for name in TENSORS}
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
    """(when, network) at TIMES; initialised as GPT-2 is, trained on windows of the text in random order."""
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
    """The checker on a quadratic loss of these very Hessians, by parameter: as on the network, in less time."""
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
    diagonal, sizes = squares.trace() / total, np.bincount(labels)
    same = float((sizes * (sizes - 1)).sum() / (len(labels) * (len(labels) - 1)))

    def inside(numbers: np.ndarray) -> float:
        onto = np.eye(len(sizes))[numbers]  # (n, B)
        return float(((squares @ onto) * onto).sum() / total)

    share, mean = inside(labels), float(diagonal + (1 - diagonal) * same)
    largest = max(inside(stream.permutation(labels)) for _ in range(permutations))
    return {"blocks": len(sizes), "share": share, "chance": mean, "largest": largest,
            "excess": (share - mean) / (1 - mean)}  # fmt: skip


def against_chance(
    model: nn.Module, parameter: str, matrix: np.ndarray, permutations: int
) -> dict[str, Any]:
    """For every cut of a tensor into more than one block and fewer than its entries: share, chance, excess."""
    squares, stream, found = np.square(matrix), np.random.default_rng(SEED), {}
    for name, cut in ht.blocks.alternatives(model, parameter).items():
        if name not in ("whole", "elements"):
            part = cut.parts[0]
            owner = torch.zeros(part.shape, dtype=torch.int64)
            part.place(torch.arange(part.num_blocks)[:, None].expand(-1, part.block_size), owner)
            found[name] = chance(squares, owner.flatten().numpy(), permutations, stream)
    return found


def structure(
    model: NanoGPT, batches: list[data.LabelledBatch], permutations: int
) -> dict[str, Any]:
    """All that is drawn and printed of one time, by tensor."""
    problem = ht.Problem(model, ht.cross_entropy, batches)
    tensors = ht.partition(model, "tensor")
    dense = {
        name: ht.dense_block(problem, tensors[name], progress=False) for name in TENSORS.values()
    }
    checked = judged(model, {name: block.matrix for name, block in dense.items()})
    found = {}
    for tensor, name in TENSORS.items():
        matrix, verdict = dense[name].matrix, checked[name]
        assert verdict.claim == CLAIMS[tensor], f"{tensor} is cut into {verdict.claim}"
        found[tensor] = {
            "cuts": against_chance(model, name, matrix, permutations), "verdict": verdict.verdict,
            "reason": verdict.reason, "diagonal": verdict["elements"].share, "norm": verdict.norm,
            "heat map": heat_map(matrix, -(-len(matrix) // MOST_DRAWN)), "symmetry error": dense[name].symmetry_error,
        }  # fmt: skip
    return {"loss": problem.loss, "tensors": found}


def text(found: dict[str, Any], permutations: int) -> str:
    header = ("tensor", "claim", "blocks", "|H|", "inside", "by chance", "largest", "excess", "diagonal",
              "excess of other cuts", "verdict")  # fmt: skip
    lines = []
    for when, at in found.items():
        rows = []
        for tensor, t in at["tensors"].items():
            claim = t["cuts"][CLAIMS[tensor]]
            others = ", ".join(
                f"{cut} {c['excess']:.0%}" for cut, c in t["cuts"].items() if cut != CLAIMS[tensor]
            )
            shares = [f"{claim[key]:.1%}" for key in ("share", "chance", "largest", "excess")]
            rows.append([tensor, CLAIMS[tensor], str(claim["blocks"]), f"{t['norm']:.1e}", *shares,
                         f"{t['diagonal']:.1%}", others, t["verdict"]])  # fmt: skip
        lines += [f"{when}, loss {at['loss']:.3f}", report.table(header, rows, left=2), ""]
    worst = max(t["symmetry error"] for at in found.values() for t in at["tensors"].values())
    lines.append(
        "inside: share of the tensor's squared norm inside the claimed blocks; by chance, largest: mean and largest of "
        f"{permutations} permutations. Asymmetry of the dense Hessians at most {worst:.0e}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one sequence, one step: seconds")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    config = (
        SMOKE
        if arguments.smoke
        else {"sequences": SEQUENCES, "steps": STEPS, "permutations": PERMUTATIONS}
    )
    tokens, alphabet = characters()
    count = config["sequences"]
    batches = data.language_batches(
        tokens, num_examples=count, batch_size=count, context=CONTEXT, seed=SEED
    )
    found = {when: structure(model, batches, config["permutations"])
             for when, model in trained(tokens, len(alphabet), config["steps"])}  # fmt: skip
    knobs = {
        "width": WIDTH,
        "heads": HEADS,
        "context": CONTEXT,
        "batch": BATCH,
        "rate": RATE,
        "seed": SEED,
    }
    ht.save(
        {"times": found, "alphabet": alphabet, "claims": CLAIMS},
        out / "result",
        config={**config, **knobs},
    )
    table = text(found, config["permutations"])
    (out / "table.txt").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
