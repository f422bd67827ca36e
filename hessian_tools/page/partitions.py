"""A checked partition on the page: a row a tensor, with the evidence for and against every cut."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hessian_tools.blocks.param_groups import patterns
from hessian_tools.page.scales import Scale
from hessian_tools.page.views import (
    NUMBERS,
    Cell,
    Column,
    Headline,
    Row,
    Table,
    Unfolded,
    number,
)
from hessian_tools.page.words import counted, plus_minus, sentence, shown
from hessian_tools.structure.cuttings import WHOLE
from hessian_tools.structure.judgement import FOLLOWS, UNDECIDED, VERDICTS
from hessian_tools.structure.report import CutEvidence, PartitionReport, TensorReport
from hessian_tools.tables import shortened

SIGNS = {
    FOLLOWS: "✓",
    "too coarse": "⊖",
    "too fine": "⊕",
    "wrong axis": "⇄",
    UNDECIDED: "?",
}
MOST_NAMED = 6  # tensors in a sentence
# of the marks of cuts, around their middle
SHAPES = {
    "rows": "M-4-4h8v8h-8z",
    "columns": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "heads": "M0-5L5 4h-10z",
    "roles": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "elements": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "experts": "M-5 4h10L0-5zM-5-1h10",
}
OTHER = "M-4.5 0L-1.5-1.5L0-5L1.5-1.5L4.5 0L1.5 1.5L0 5L-1.5 1.5z"
_EXCESS = Scale(-0.25, 1.1, 2.0, 198.0)
_COLUMNS = (
    Column("tensor", "name"),
    Column("verdict", "verdict", "unfolds to the reason and the numbers of every cut"),
    Column("claimed cut"),
    Column("best cut", "text", "?: by estimates alone, not significantly"),
    Column("evidence", "evidence", "excess of mass inside each cut's blocks", is_sortable=False),
    Column("mass inside", NUMBERS, "share of the squared entries inside the claim's blocks"),
    Column("unstructured", NUMBERS, "what a matrix without structure would have inside"),
    Column("contrast", NUMBERS, "odds of mass to lie inside, over those without structure"),
    Column("blocks", NUMBERS, "that the claim cuts the tensor into"),
)


@dataclass(frozen=True)
class Mark:
    """A cut's excess of mass in the small picture: places, and two errors each way."""

    shape: str
    place: float
    low: float
    high: float
    is_claim: bool
    told: str


@dataclass(frozen=True)
class Evidence:
    """The small picture: marks, and the places of an excess of 0 and of 1."""

    marks: tuple[Mark, ...]
    zero: float
    one: float


@dataclass(frozen=True)
class PartitionView:
    """The table of tensors, and what would suit them.

    Attributes:
        shapes: marks of the cuts that occur, by name.
        suggested: {expression over parameters' names: the cut to take}.
        savings: of the suggestion, in words.
    """

    table: Table
    shapes: dict[str, str]
    suggested: dict[str, str]
    savings: str
    notes: tuple[str, ...]


def partition_view(report: PartitionReport, most: int) -> PartitionView:
    """All that a finished check has found, of at most ``most`` tensors."""
    notes = (*report.notes, sentence(report.reliability))
    suggested = patterns(report.suggestion)
    view = _view(_most_telling(report.tensors, most), suggested, str(report.savings), notes)
    return view if len(report.tensors) <= most else _cut_short(view, len(report.tensors))


def unfinished_view(tensors: Sequence[TensorReport], most: int) -> PartitionView:
    """The tensors that an interrupted check has judged."""
    return _view(_most_telling(tensors, most), {}, "", ())


def _most_telling(tensors: Sequence[TensorReport], most: int) -> list[TensorReport]:
    """At most so many, those that do not follow first, in the network's order."""
    if len(tensors) <= most:
        return list(tensors)
    first = sorted(tensors, key=lambda tensor: tensor.verdict == FOLLOWS)[:most]
    return [tensor for tensor in tensors if any(tensor is kept for kept in first)]


def _cut_short(view: PartitionView, total: int) -> PartitionView:
    note = f"{len(view.table.rows):,} of {total:,} tensors are shown; ht.load has all"
    return replace(view, notes=(note, *view.notes))


def _view(
    tensors: Sequence[TensorReport],
    suggested: dict[str, str],
    savings: str,
    notes: tuple[str, ...],
) -> PartitionView:
    labels = shortened([tensor.name for tensor in tensors])
    pairs = zip(tensors, labels, strict=True)
    rows = [_row(place, *pair) for place, pair in enumerate(pairs)]
    verdicts = [tensor.verdict for tensor in tensors]
    counts = [(verdict, verdicts.count(verdict)) for verdict in VERDICTS]
    table = Table(
        "Tensors, and whether their blocks follow the Hessian",
        _COLUMNS,
        tuple(rows),
        filtered="Filter tensors by name, cut or verdict",
        kinds=tuple((verdict, count) for verdict, count in counts if count),
    )
    cuts = dict.fromkeys(
        cut.cut for tensor in tensors for cut in tensor.evidence if math.isfinite(cut.excess)
    )
    shapes = {cut: SHAPES.get(cut, OTHER) for cut in cuts}
    return PartitionView(table, shapes, suggested, savings, notes)


def _row(place: int, tensor: TensorReport, label: str) -> Row:
    claimed = tensor.claimed
    best = tensor[tensor.suggested]
    doubt = "" if best.verdict == FOLLOWS else "?"
    cells = (
        Cell(label, label, tensor.name),
        Cell(tensor.verdict, VERDICTS.index(tensor.verdict), SIGNS[tensor.verdict]),
        Cell(claimed.cut, claimed.cut),
        Cell("", "") if best is claimed else Cell(f"{best.cut}{doubt}", best.cut),
        Cell("", None, _evidence(tensor)),
        _share(claimed),
        number(claimed.expected, _percent(claimed.expected)),
        number(claimed.contrast) if claimed.cut != WHOLE else Cell(""),
        number(claimed.num_blocks),
    )
    words = f"{tensor.name} {tensor.verdict} {claimed.cut} {tensor.suggested}"
    unfolded = Unfolded(sentence(tensor.reason), _cuts(tensor))
    return Row(cells, words, place, tensor.verdict, unfolded)


def _share(evidence: CutEvidence) -> Cell:
    text = plus_minus(100 * evidence.share, 100 * evidence.share_error)
    return number(evidence.share, f"{text} %")


def _percent(share: float) -> str:
    return f"{shown(100 * share)} %"


def _evidence(tensor: TensorReport) -> Evidence:
    """Of every cut but the whole, the claim last, so that it lies above the others."""
    known = [cut for cut in tensor.evidence if math.isfinite(cut.excess)]
    ordered = sorted(known, key=lambda cut: cut.cut == tensor.claim)
    marks = tuple(_mark(cut, cut.cut == tensor.claim) for cut in ordered)
    zero, one = np.round(_EXCESS.at([0.0, 1.0]), 1).tolist()
    return Evidence(marks, zero, one)


def _mark(cut: CutEvidence, is_claim: bool) -> Mark:
    error = 0.0 if math.isnan(cut.excess_error) else 2 * cut.excess_error
    ends = np.clip([cut.excess, cut.excess - error, cut.excess + error], -0.25, 1.1)
    place, low, high = np.round(_EXCESS.at(ends), 1).tolist()
    told = f"{cut.cut}: excess {plus_minus(cut.excess, cut.excess_error)}, {cut.verdict}"
    shape = SHAPES.get(cut.cut, OTHER)
    return Mark(shape, place, low, high, is_claim, f"{told} (claimed)" if is_claim else told)


def _cuts(tensor: TensorReport) -> Table:
    columns = (
        Column("cut", is_sortable=False),
        Column("blocks", NUMBERS, is_sortable=False),
        Column("mass inside", NUMBERS, is_sortable=False),
        Column("unstructured", NUMBERS, is_sortable=False),
        Column("contrast", NUMBERS, is_sortable=False),
        Column("had it been claimed", is_sortable=False),
    )
    rows = [
        Row(
            (
                Cell(f"{cut.cut} (claimed)" if cut.cut == tensor.claim else cut.cut),
                number(cut.num_blocks),
                _share(cut),
                number(cut.expected, _percent(cut.expected)),
                number(cut.contrast),
                Cell(cut.verdict),
            )
        )
        for cut in tensor.evidence
    ]
    return Table("", columns, tuple(rows))


def partition_headline(report: PartitionReport) -> Headline:
    """Whether the claim holds."""
    total = counted(len(report.tensors), "tensor")
    details = [_named(report.tensors, verdict) for verdict in VERDICTS if verdict != FOLLOWS]
    told = tuple(words for words in details if words)
    claim = f"The partition {report.preset}" if report.preset else "The partition"
    if report.contradicted:
        reason = (
            f"{claim} is contradicted by the {report.curvature} on {len(report.contradicted)} of "
            f"{total}."
        )
        return Headline("bad", "Contradicted", reason, told)
    undecided = report.counts[UNDECIDED]
    if undecided == len(report.tensors):
        return Headline("open", "Undecided", f"None of {total} could be judged.", told)
    judged = len(report.tensors) - undecided
    reason = f"{claim} follows the {report.curvature} on {judged} of {total}; none contradicts it."
    return Headline("good", "Not contradicted", reason, told)


def _named(tensors: Iterable[TensorReport], verdict: str) -> str:
    """Which tensors have a verdict; "" for none."""
    names = [tensor.name for tensor in tensors if tensor.verdict == verdict]
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{len(names)} {verdict}: {', '.join(names[:MOST_NAMED])}{more}."
