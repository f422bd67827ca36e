"""How often is the partition checker wrong, where the planted structure is the truth?

Claim: at default settings, fewer than 1 % of the wrong claims are accepted ("follows"), fewer than
1 % of the right ones contradicted, and fewer than 15 % of all are left undecided.

A weight of 24 x 16 entries gets a Hessian of one of 18 planted kinds, below. What is planted says
which claims are right, which are wrong, and which the definition (one dense sub-block a block, the
smallest such) leaves open; no rule of the checker takes part in that. Entries inside planted blocks
are CONTRAST times as large in mean square as those outside. A weight is judged from products and
from its dense matrix, with the defaults of ``ht.check_partition``. Seeds are told before the run:
SEEDS matrices of each kind, the seed of the matrix also that of the products.

Counted for each kind: right claims that are contradicted (false rejects), wrong ones that follow
(false accepts), and undecided verdicts among right and wrong claims. What becomes of claims that
are open is written down, but counts as neither.

`python experiments/partition_error_rates.py [--smoke]` writes results/partition_error_rates: how
often which verdict, and table.txt. `python figures/partition_error_rates.py` draws it.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from script import Script
from torch import Generator, Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report as reports
from hessian_tools.blocks.block import Cut, Part

OUTPUTS, INPUTS = 24, 16
SIZE = OUTPUTS * INPUTS
CONTRAST = 10.0  # in mean square; the checker's level is 4
RANK = 3  # of a block, and of all that is outside
FREEDOM = 3  # of the t-distribution of heavy tails: the fourth moment is infinite
SPREAD = 1.0  # standard deviation of the log of the mean square of a row
GROUP = 4  # rows, or columns, of a group
BAND = 3  # neighbours on each side
SEEDS, SMOKE_SEEDS = 50, 1
CONTRADICTED = {"too coarse", "too fine", "wrong axis"}
HEADER = (
    "planted",
    "right claims",
    "contradicted",
    "wrong claims",
    "accepted",
    "undecided",
    "exact: contradicted",
    "accepted",
    "undecided",
)
OUT = Path("results/partition_error_rates")

ENTRIES = torch.arange(SIZE).view(OUTPUTS, INPUTS)
ROW = torch.arange(SIZE) // INPUTS  # of each entry
COLUMN = torch.arange(SIZE) % INPUTS


class Planted(nn.Module):
    """Its Hessian with respect to ``layer.weight`` is ``matrix``."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, OUTPUTS, bias=False).double()
        self.matrix = matrix


def loss(model: Planted, batch: Tensor) -> Tensor:
    w = model.layer.weight.flatten()
    return w @ model.matrix @ w / 2


# --- textures: symmetric, with a mean square of 1 ---


def normal(stream: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=stream, dtype=torch.float64)


def scaled(matrix: Tensor) -> Tensor:
    return matrix / matrix.square().mean().sqrt()


def independent(size: int, stream: Generator) -> Tensor:
    """Normal entries, those on the diagonal no larger than the others."""
    upper = normal(stream, size, size).triu()
    return scaled(upper + upper.triu(1).T)


def heavy(size: int, stream: Generator) -> Tensor:
    """Entries of Student's t-distribution."""
    squares = sum(normal(stream, size, size).square() for _ in range(FREEDOM))
    upper = (normal(stream, size, size) / squares.sqrt()).triu()
    return scaled(upper + upper.triu(1).T)


def low_rank(size: int, stream: Generator) -> Tensor:
    return of_rank(RANK, size, stream)


def rank_one(size: int, stream: Generator) -> Tensor:
    return of_rank(1, size, stream)


def of_rank(rank: int, size: int, stream: Generator) -> Tensor:
    factors = normal(stream, size, rank)
    signs = normal(stream, rank).sign()
    return scaled((factors * signs) @ factors.T)


# --- kinds of Hessians ---

Texture = Callable[[int, Generator], Tensor]


def blocks(
    groups: Iterable[Tensor], stream: Generator, inside: Texture, outside: Texture
) -> Tensor:
    """Blocks of one texture in a surrounding of another, CONTRAST times as large in mean square."""
    matrix = outside(SIZE, stream)
    for group in groups:
        matrix[group[:, None], group] = CONTRAST**0.5 * inside(len(group), stream)
    return matrix


def levels(mean_squares: Tensor, stream: Generator) -> Tensor:
    """Independent entries of given (SIZE, SIZE) mean squares."""
    return mean_squares.sqrt() * independent(SIZE, stream)


def where(is_inside: Tensor, stream: Generator) -> Tensor:
    """CONTRAST where (SIZE, SIZE) ``is_inside``, 1 elsewhere."""
    return levels(1 + (CONTRAST - 1) * is_inside.double(), stream)


def same(labels: Tensor) -> Tensor:
    """(SIZE, SIZE): whether two entries have the same label."""
    return labels[:, None] == labels


def apart(labels: Tensor) -> Tensor:
    return (labels[:, None] - labels).abs()


def uneven(matrix: Tensor, stream: Generator) -> Tensor:
    """The rows of the weight scaled by chance."""
    scales = torch.exp(SPREAD / 2 * normal(stream, OUTPUTS)).repeat_interleave(INPUTS)
    return scales[:, None] * matrix * scales


def dense(stream: Generator) -> Tensor:
    return independent(SIZE, stream)


def rows(stream: Generator) -> Tensor:
    return blocks(ENTRIES, stream, independent, independent)


def columns(stream: Generator) -> Tensor:
    return blocks(ENTRIES.T, stream, independent, independent)


def elements(stream: Generator) -> Tensor:
    """The diagonal has CONTRAST times the mass of all that is beside it."""
    matrix = independent(SIZE, stream)
    matrix.diagonal().mul_((CONTRAST * SIZE) ** 0.5)
    return matrix


def low_rank_rows(stream: Generator) -> Tensor:
    return blocks(ENTRIES, stream, low_rank, low_rank)


def uneven_rows(stream: Generator) -> Tensor:
    return uneven(rows(stream), stream)


def uneven_low_rank_rows(stream: Generator) -> Tensor:
    return uneven(low_rank_rows(stream), stream)


def rank_one_rows(stream: Generator) -> Tensor:
    return blocks(ENTRIES, stream, rank_one, independent)


def heavy_tailed_rows(stream: Generator) -> Tensor:
    return blocks(ENTRIES, stream, heavy, heavy)


def block_tridiagonal(stream: Generator) -> Tensor:
    """Rows are coupled to both neighbours exactly as strongly as to themselves."""
    return where(apart(ROW) <= 1, stream)


def banded(stream: Generator) -> Tensor:
    return where(apart(ROW) <= BAND, stream)


def two_level(stream: Generator) -> Tensor:
    """Rows CONTRAST times their group, which is CONTRAST times what is outside."""
    in_group = same(ROW // GROUP).double()
    in_row = same(ROW).double()
    extra = (CONTRAST - 1) * in_group + CONTRAST * (CONTRAST - 1) * in_row
    return levels(1 + extra, stream)


def groups_of_rows(stream: Generator) -> Tensor:
    return where(same(ROW // GROUP), stream)


def places(seed: int) -> Tensor:
    """(OUTPUTS,) where each row stands along the permuted axis."""
    return torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(seed))


def permuted_groups(stream: Generator) -> Tensor:
    return where(same(places(stream.initial_seed())[ROW] // GROUP), stream)


def groups_of_columns(stream: Generator) -> Tensor:
    return where(same(COLUMN // GROUP), stream)


def kronecker(stream: Generator) -> Tensor:
    return torch.kron(independent(OUTPUTS, stream), independent(INPUTS, stream))


def kronecker_diagonal(stream: Generator) -> Tensor:
    """A row's block is a multiple of the others', and nothing lies between rows."""
    scales = torch.exp(SPREAD / 2 * normal(stream, OUTPUTS))
    return torch.kron(scales.diag(), independent(INPUTS, stream))


def checkerboard(stream: Generator) -> Tensor:
    """Entries of one colour are coupled, which are half of every row and every column."""
    return where(same((ROW + COLUMN) % 2), stream)


# --- what is claimed, and which claims the planted structure makes right ---

STANDARD = ("whole", "rows", "columns", "elements")
GROUPS = "groups"  # a partition into the planted groups


class Kind(NamedTuple):
    """A planted kind; claims that are neither right nor open are wrong."""

    plant: Callable[[Generator], Tensor]
    right: str = ""
    open: str = ""  # claims about which the definition says nothing
    grouped: Callable[[int], list[list[Part]]] | None = None  # seed -> the claim "groups"

    @property
    def name(self) -> str:
        return self.plant.__name__.replace("_", " ")

    def truth(self, claim: str) -> str:
        """Whether it is "right", "wrong" or "open"."""
        if claim == self.right:
            return "right"
        return "open" if claim == self.open else "wrong"


def box(view: tuple[int, ...], *index: slice) -> Part:
    return Part("layer.weight", (OUTPUTS, INPUTS), view, index)


def of_rows(chosen: Iterable[int]) -> list[Part]:
    return [box((OUTPUTS, INPUTS), slice(r, r + 1), slice(0, INPUTS)) for r in map(int, chosen)]


def runs_of_rows(seed: int) -> list[list[Part]]:
    return [of_rows(chosen) for chosen in torch.arange(OUTPUTS).split(GROUP)]


def scattered_rows(seed: int) -> list[list[Part]]:
    return [of_rows(chosen) for chosen in places(seed).argsort().split(GROUP)]


def runs_of_columns(seed: int) -> list[list[Part]]:
    starts = range(0, INPUTS, GROUP)
    everything = slice(0, OUTPUTS)
    return [[box((OUTPUTS, INPUTS), everything, slice(s, s + GROUP))] for s in starts]


def colours(seed: int) -> list[list[Part]]:
    """Entries in even rows and columns and those in odd ones, and the rest."""
    view = (OUTPUTS // 2, 2, INPUTS // 2, 2)
    outer, inner = slice(0, OUTPUTS // 2), slice(0, INPUTS // 2)

    def quarter(i: int, j: int) -> Part:
        return box(view, outer, slice(i, i + 1), inner, slice(j, j + 1))

    return [[quarter(0, 0), quarter(1, 1)], [quarter(0, 1), quarter(1, 0)]]


KINDS = (
    Kind(dense, "whole"),
    Kind(rows, "rows"),
    Kind(columns, "columns"),
    Kind(elements, "elements"),
    Kind(low_rank_rows, "rows"),
    Kind(uneven_rows, "rows"),
    Kind(uneven_low_rank_rows, "rows"),
    Kind(rank_one_rows, "rows"),
    Kind(heavy_tailed_rows, "rows"),
    # all rows hang together, by a chain: no smaller block is closed, but the whole is not dense
    Kind(block_tridiagonal, open="whole"),
    Kind(banded, open="whole"),
    Kind(two_level, "rows", grouped=runs_of_rows),
    Kind(groups_of_rows, "groups", grouped=runs_of_rows),
    Kind(permuted_groups, "groups", grouped=scattered_rows),
    Kind(groups_of_columns, "groups", grouped=runs_of_columns),
    Kind(kronecker, "whole"),
    Kind(kronecker_diagonal, "rows"),
    # among the cuts that are known the whole is the best; the colours are finer
    Kind(checkerboard, "groups", open="whole", grouped=colours),
)


class Verdict(NamedTuple):
    """What is counted."""

    kind: str
    claim: str
    truth: str
    exact: str  # verdict from the dense matrix
    estimated: str  # verdict from products


def verdicts(kind: Kind, seed: int, exact: bool) -> dict[str, str]:
    """The verdict on every claim."""
    matrix = kind.plant(torch.Generator().manual_seed(seed))
    problem = ht.Problem(Planted(matrix), loss, [torch.zeros(1)])
    settings = {"seed": seed, "exact": exact, "progress": False}
    (tensor,) = ht.check_partition(problem, "tensor", **settings).tensors
    found = {evidence.cut: evidence.verdict for evidence in tensor.evidence}
    if kind.grouped is not None:
        cuts = tuple(Cut(tuple(parts), f"group {i}") for i, parts in enumerate(kind.grouped(seed)))
        (tensor,) = ht.check_partition(problem, ht.Partition(cuts), **settings).tensors
        found[GROUPS] = tensor.verdict
    return found


def counted(kinds: Iterable[Kind], seeds: int) -> Counter[Verdict]:
    counts: Counter[Verdict] = Counter()
    cases = [(kind, seed) for kind in kinds for seed in range(seeds)]
    for kind, seed in tqdm(cases, unit="matrix", disable=None):
        exact = verdicts(kind, seed, True)
        estimated = verdicts(kind, seed, False)
        for claim, verdict in exact.items():
            key = Verdict(kind.name, claim, kind.truth(claim), verdict, estimated[claim])
            counts[key] += 1
    return counts


def share(part: int, total: int, digits: int = 1) -> str:
    return f"{part / total:.{digits}%}" if total else ""


def row_of(label: str, counts: Counter[Verdict]) -> list[str]:
    def number(truths: set[str], verdicts: set[str], source: str) -> int:
        asked = [key for key in counts if key.truth in truths and getattr(key, source) in verdicts]
        return sum(counts[key] for key in asked)

    def total(*truths: str) -> int:
        return sum(count for key, count in counts.items() if key.truth in truths)

    right, wrong = total("right"), total("wrong")
    cells = {}
    for source in ("estimated", "exact"):
        rejected = number({"right"}, CONTRADICTED, source)
        accepted = number({"wrong"}, {"follows"}, source)
        undecided = number({"right", "wrong"}, {"undecided"}, source)
        cells[source] = (
            share(rejected, right),
            share(accepted, wrong),
            share(undecided, right + wrong),
        )
    contradicted, accepted_share, undecided_share = cells["estimated"]
    return [
        label,
        str(right),
        contradicted,
        str(wrong),
        accepted_share,
        undecided_share,
        *cells["exact"],
    ]


def table(counts: Counter[Verdict]) -> str:
    kinds = dict.fromkeys(key.kind for key in counts)
    slices = {kind: [key for key in counts if key.kind == kind] for kind in kinds}
    slices["all"] = list(counts)
    rows = [
        row_of(label, Counter({key: counts[key] for key in keys})) for label, keys in slices.items()
    ]
    return f"{reports.table(HEADER, rows)}\n\n{undecided(counts)}"


def undecided(counts: Counter[Verdict]) -> str:
    """How many of the right and of the wrong claims were left undecided from products."""
    told = []
    for truth in ("right", "wrong"):
        claims = {key: count for key, count in counts.items() if key.truth == truth}
        left = sum(count for key, count in claims.items() if key.estimated == "undecided")
        told.append(f"{left} of {sum(claims.values())} {truth} claims")
    return f"undecided: {', '.join(told)}"


def main() -> None:
    run = Script(__doc__, OUT, smoke="one seed: seconds").run()
    seeds = SMOKE_SEEDS if run.smoke else SEEDS
    counts = counted(KINDS, seeds)
    records = [{**key._asdict(), "count": count} for key, count in counts.items()]
    config = {"seeds": seeds, "contrast": CONTRAST, "shape": [OUTPUTS, INPUTS]}
    run.save(records, config)
    run.print_table(table(counts))


if __name__ == "__main__":
    main()
