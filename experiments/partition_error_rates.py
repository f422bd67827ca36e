"""How often is the partition checker wrong?

Planted Hessians; estimated verdicts are compared with those of the exact matrix.

Claim: a verdict that is not "undecided" is wrong less often than alpha says. A weight of 24 x 16
entries gets a Hessian whose entries inside rows, columns, single entries or nothing (dense) are
``contrast`` times as large in mean square as those outside, in four textures: independent entries,
low rank, blocks of uneven scale, and both. Every way to cut it is judged from products and from the
dense matrix, with the same levels.

`python experiments/partition_error_rates.py [--smoke]` writes results/partition_error_rates: how
often which verdict, and table.txt. `python figures/partition_error_rates.py` draws it.
"""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from script import Script
from torch import nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report as reports

OUTPUTS, INPUTS = 24, 16
KINDS = ("rows", "columns", "elements", "dense")
CONTRASTS = (2.0, 3.0, 6.0, 10.0, 30.0, 100.0)  # in mean square; the checker's level is 4
TEXTURES = ("independent", "low rank", "uneven", "uneven low rank")
RANK = 3  # of a block, and of all that is outside
SPREAD = 1.0  # standard deviation of the log of a block's scale
PROBES, BLOCKS, ALPHA = 8, 32, 0.05  # the checker's defaults
SEEDS, SMOKE_SEEDS = 25, 1
CONTRADICTED = {"too coarse", "too fine", "wrong axis"}
HEADER = (
    "planted",
    "right claims",
    "contradicted",
    "wrong claims",
    "accepted",
    "as another wrong",
    "undecided",
)
OUT = Path("results/partition_error_rates")


class Case(NamedTuple):
    """One planted Hessian."""

    kind: str  # of KINDS
    contrast: float
    texture: str
    seed: int


class Verdict(NamedTuple):
    """What is counted: a kind of Hessian, and what was said of one way to cut it."""

    texture: str
    contrast: float
    kind: str
    exact: str  # verdict from the dense matrix
    estimated: str  # verdict from products


class Planted(nn.Module):
    """Its Hessian with respect to ``layer.weight`` is ``matrix``."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, OUTPUTS, bias=False).double()
        self.matrix = matrix


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
    low_rank = "low rank" in texture
    matrix = textured(entries.numel(), low_rank, stream)
    for group in groups:
        matrix[group[:, None], group] = contrast**0.5 * textured(len(group), low_rank, stream)
    if "uneven" in texture:
        # a dense matrix has no blocks of its own to scale: its rows are scaled
        scaled = entries if kind == "dense" else groups
        scales = torch.ones(entries.numel(), dtype=torch.float64)
        for group in scaled:
            normal = torch.randn((), generator=stream, dtype=torch.float64)
            scales[group] = torch.exp(SPREAD / 2 * normal)
        matrix = scales[:, None] * matrix * scales
    return ht.Problem(Planted(matrix), loss, [torch.zeros(1)])


def verdicts(problem: ht.Problem, seed: int, exact: bool) -> dict[str, str]:
    """The verdict on every way to cut the weight."""
    report = ht.check_partition(
        problem,
        "tensor",
        seed=seed,
        num_probes=PROBES,
        num_blocks=BLOCKS,
        exact=exact,
        alpha=ALPHA,
        progress=False,
    )
    (tensor,) = report.tensors
    return {evidence.cut: evidence.verdict for evidence in tensor.evidence}


def rate(counts: Counter[Verdict], exact: set[str], estimated: set[str]) -> tuple[float, int]:
    """How often claims whose exact verdict is in ``exact`` are estimated as one in ``estimated``.

    Returns the share (nan if there is no such claim) and the number of such claims.
    """
    asked = {key: count for key, count in counts.items() if key.exact in exact}
    total = sum(asked.values())
    hits = sum(count for key, count in asked.items() if key.estimated in estimated)
    share = hits / total if total else float("nan")
    return share, total


def row_of(label: str, counts: Counter[Verdict]) -> list[str]:
    positives, follows = rate(counts, {"follows"}, CONTRADICTED)
    negatives, wrong = rate(counts, CONTRADICTED, {"follows"})
    other = undecided = 0
    for key, count in counts.items():
        both_contradict = {key.exact, key.estimated} <= CONTRADICTED
        if both_contradict and key.exact != key.estimated:
            other += count
        if key.estimated == "undecided":
            undecided += count
    return [
        label,
        str(follows),
        f"{positives:.1%}",
        str(wrong),
        f"{negatives:.1%}",
        f"{other / max(1, wrong):.1%}",
        f"{undecided / counts.total():.0%}",
    ]


def table(counts: Counter[Verdict]) -> str:
    slices = {texture: {key for key in counts if key.texture == texture} for texture in TEXTURES}
    for contrast in CONTRASTS:
        slices[f"contrast {contrast:g}"] = {key for key in counts if key.contrast == contrast}
    slices["all"] = set(counts)
    rows = [
        row_of(label, Counter({key: counts[key] for key in keys}))
        for label, keys in slices.items()
        if keys
    ]
    return reports.table(HEADER, rows)


def cases_of(contrasts: tuple[float, ...], textures: tuple[str, ...], seeds: int) -> list[Case]:
    """All combinations; a dense Hessian has no contrast, so it is taken at the first one only."""
    cases = []
    for texture, contrast, kind in product(textures, contrasts, KINDS):
        if kind != "dense" or contrast == contrasts[0]:
            cases += [Case(kind, contrast, texture, seed) for seed in range(seeds)]
    return cases


def counted(cases: list[Case]) -> Counter[Verdict]:
    counts: Counter[Verdict] = Counter()
    for case in tqdm(cases, unit="matrix", disable=None):
        problem = planted(*case)
        exact = verdicts(problem, case.seed, True)
        estimated = verdicts(problem, case.seed, False)
        for cut, truth in exact.items():
            key = Verdict(case.texture, case.contrast, case.kind, truth, estimated[cut])
            counts[key] += 1
    return counts


def main() -> None:
    run = Script(__doc__, OUT, smoke="one seed, two textures, two contrasts: seconds").run()
    contrasts = CONTRASTS[::5] if run.smoke else CONTRASTS
    textures = TEXTURES[:2] if run.smoke else TEXTURES
    seeds = SMOKE_SEEDS if run.smoke else SEEDS
    counts = counted(cases_of(contrasts, textures, seeds))
    records = [{**key._asdict(), "count": count} for key, count in counts.items()]
    config = {
        "seeds": seeds,
        "probes": PROBES,
        "blocks": BLOCKS,
        "alpha": ALPHA,
        "shape": [OUTPUTS, INPUTS],
    }
    run.save(records, config)
    run.print_table(table(counts))


if __name__ == "__main__":
    main()
