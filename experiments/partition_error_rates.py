"""How often is the partition checker wrong? Planted Hessians, estimated verdicts against those of the exact matrix.

Claim: a verdict that is not "undecided" is wrong less often than alpha says. A weight of 24 x 16 entries gets a Hessian
whose entries inside rows, columns, single entries or nothing (dense) are ``contrast`` times as large in mean square as
those outside, in four textures: independent entries, low rank, blocks of uneven scale, and both. Every way to cut it is
judged from products and from the dense matrix, with the same levels. `python figures/partition_error_rates.py` draws.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report

OUTPUTS, INPUTS = 24, 16
KINDS = ("rows", "columns", "elements", "dense")
CONTRASTS = (2.0, 3.0, 6.0, 10.0, 30.0, 100.0)  # in mean square; the checker's level is 4
TEXTURES = ("independent", "low rank", "uneven", "uneven low rank")
RANK, SPREAD = (
    3,
    1.0,
)  # of a block, and of all that is outside; standard deviation of the log of a block's scale
PROBES, BLOCKS, ALPHA = 8, 32, 0.05  # the checker's defaults
SEEDS, SMOKE_SEEDS = 25, 1
OUT = Path("results/partition_error_rates")


class Planted(nn.Module):
    """Its Hessian with respect to ``layer.weight`` is ``matrix``."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.matrix = nn.Linear(INPUTS, OUTPUTS, bias=False).double(), matrix


def loss(model: Planted, batch: torch.Tensor) -> torch.Tensor:
    w = model.layer.weight.flatten()
    return w @ model.matrix @ w / 2


def textured(size: int, low_rank: bool, stream: torch.Generator) -> torch.Tensor:
    """(size, size) symmetric with a mean square of 1: independent entries, or of RANK."""
    if low_rank and size > RANK:
        factors = torch.randn(size, RANK, generator=stream, dtype=torch.float64)
        signs = torch.randn(RANK, generator=stream, dtype=torch.float64).sign()
        matrix = (factors * signs) @ factors.T
    else:
        half = torch.randn(size, size, generator=stream, dtype=torch.float64)
        matrix = half + half.T
    return matrix / matrix.square().mean().sqrt()


def planted(kind: str, contrast: float, texture: str, seed: int) -> ht.Problem:
    """A Problem of one weight whose Hessian has the structure."""
    stream = torch.Generator().manual_seed(seed)
    entries = torch.arange(OUTPUTS * INPUTS).view(OUTPUTS, INPUTS)
    groups = {
        "rows": entries,
        "columns": entries.T,
        "elements": entries.view(-1, 1),
        "dense": entries.view(1, -1),
    }[kind]
    low_rank, uneven = "low rank" in texture, "uneven" in texture
    matrix = textured(entries.numel(), low_rank, stream)
    for group in groups:
        matrix[group[:, None], group] = contrast**0.5 * textured(len(group), low_rank, stream)
    if uneven:
        scales = torch.ones(entries.numel(), dtype=torch.float64)
        for group in groups if kind != "dense" else entries:
            scales[group] = torch.exp(
                SPREAD / 2 * torch.randn((), generator=stream, dtype=torch.float64)
            )
        matrix = scales[:, None] * matrix * scales
    return ht.Problem(Planted(matrix), loss, [torch.zeros(1)])


def verdicts(problem: ht.Problem, seed: int, exact: bool) -> dict[str, str]:
    """The verdict on every way to cut the weight."""
    (found,) = ht.check_partition(
        problem,
        "tensor",
        seed=seed,
        num_probes=PROBES,
        num_blocks=BLOCKS,
        exact=exact,
        alpha=ALPHA,
        progress=False,
    ).tensors
    return {evidence.cut: evidence.verdict for evidence in found.evidence}


def rate(counts: Counter, exact: set[str], estimated: set[str]) -> tuple[float, int]:
    """The share of verdicts in ``estimated`` among claims whose exact verdict is in ``exact``, and their number."""
    asked = sum(n for (_, _, _, truth, _), n in counts.items() if truth in exact)
    found = sum(
        n for (_, _, _, truth, said), n in counts.items() if truth in exact and said in estimated
    )
    return (found / asked if asked else float("nan")), asked


def table(counts: Counter) -> str:
    contradicted = {"too coarse", "too fine", "wrong axis"}
    rows = []
    slices = [(texture, {c for c in counts if c[0] == texture}) for texture in TEXTURES]
    slices += [
        (f"contrast {contrast:g}", {c for c in counts if c[1] == contrast})
        for contrast in CONTRASTS
    ]
    for label, keys in [*slices, ("all", set(counts))]:
        own = Counter({key: counts[key] for key in keys})
        if not own:
            continue
        positives, follows = rate(own, {"follows"}, contradicted)
        negatives, wrong = rate(own, contradicted, {"follows"})
        other = sum(n for (_, _, _, t, s), n in own.items() if {t, s} <= contradicted and t != s)
        undecided = sum(n for (*_, said), n in own.items() if said == "undecided") / own.total()
        rows.append([
            label, str(follows), f"{positives:.1%}", str(wrong), f"{negatives:.1%}", f"{other / max(1, wrong):.1%}",
            f"{undecided:.0%}",
        ])  # fmt: skip
    header = (
        "planted",
        "right claims",
        "contradicted",
        "wrong claims",
        "accepted",
        "as another wrong",
        "undecided",
    )
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one seed, two textures, two contrasts: seconds"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder of the result (default {OUT}, with --smoke {OUT}/smoke)"
    )
    arguments = parser.parse_args()
    out = arguments.out or (OUT / "smoke" if arguments.smoke else OUT)
    contrasts, textures, seeds = (
        (CONTRASTS[::5], TEXTURES[:2], SMOKE_SEEDS)
        if arguments.smoke
        else (CONTRASTS, TEXTURES, SEEDS)
    )
    cases = [(k, c, t, s) for t in textures for c in contrasts for k in KINDS for s in range(seeds)]
    cases = [
        case for case in cases if case[0] != "dense" or case[1] == contrasts[0]
    ]  # dense has no contrast
    counts: Counter = Counter()
    for kind, contrast, texture, seed in tqdm(cases, unit="matrix", disable=None):
        problem = planted(kind, contrast, texture, seed)
        exact, estimated = verdicts(problem, seed, True), verdicts(problem, seed, False)
        counts.update((texture, contrast, kind, exact[cut], estimated[cut]) for cut in exact)
    records = [
        {"texture": t, "contrast": c, "kind": k, "exact": e, "estimated": s, "count": n}
        for (t, c, k, e, s), n in counts.items()
    ]
    config = {
        "seeds": seeds,
        "probes": PROBES,
        "blocks": BLOCKS,
        "alpha": ALPHA,
        "shape": [OUTPUTS, INPUTS],
    }
    ht.save(records, out / "result", config=config)
    (out / "table.txt").write_text(table(counts) + "\n")
    print(table(counts))


if __name__ == "__main__":
    main()
