"""What :func:`hessian_tools.structure.check.check_partition` reports, and how it reads."""

import textwrap
from dataclasses import dataclass

from hessian_tools.blocks.param_groups import StateSavings
from hessian_tools.blocks.partition import Partition
from hessian_tools.results import registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.structure.cuttings import WHOLE
from hessian_tools.structure.judgement import (
    CONTRADICTED,
    FOLLOWS,
    VERDICTS,
    Levels,
    Statement,
    error_rates,
)
from hessian_tools.tables import plus_minus, table

_WIDTH = 118  # columns of reasons
_TITLES = (
    "tensor",
    "cut",
    "blocks",
    "mass inside",
    "unstructured",
    "contrast",
    "best cut",
    "its mass",
    "verdict",
)


@registered
@dataclass(frozen=True)
class CutEvidence:
    """One way to cut a tensor.

    Masses are squared Frobenius norms within the tensor's own Hessian.
    """

    cut: str  # "whole" | "rows" | "columns" | "heads" | "roles" | "elements" | ... | "claimed"
    num_blocks: int
    share: float  # of the mass, inside blocks
    share_error: float  # standard errors; 0 when exact
    expected: float  # the share without structure
    excess: float  # (share - expected) / (1 - expected); nan for "whole"
    excess_error: float
    contrast: float  # odds of off-diagonal mass to lie inside, over those without structure
    verdict: str  # on this cut, had it been claimed
    likely: str  # by the estimates alone


@registered
@dataclass(frozen=True)
class TensorReport:
    """The verdict on the blocks of one tensor, or of one role of a fused one."""

    name: str
    parameter: str
    size: int
    claim: str  # the name of its cut
    verdict: str  # "follows" | "too coarse" | "too fine" | "wrong axis" | "undecided"
    reason: str
    likely: str  # by the estimates alone
    # The cut to take: one that follows, or the claim, or where that is contradicted what likely
    # follows.
    suggested: str
    evidence: tuple[CutEvidence, ...]
    tests: tuple[Statement, ...]  # all that the verdict on the claim rests on
    norm: float  # |H_tt|_F of the mean loss
    exact: bool
    num_matvecs: int

    def __getitem__(self, cut: str) -> CutEvidence:
        for evidence in self.evidence:
            if evidence.cut == cut:
                return evidence
        cuts = ", ".join(evidence.cut for evidence in self.evidence)
        raise KeyError(f"{self.name} has no cut {cut!r}; its cuts are {cuts}")

    @property
    def claimed(self) -> CutEvidence:
        return self[self.claim]


@registered
@dataclass(frozen=True)
class PartitionReport(Tabular, Drawable):
    """Verdicts on a partition.

    Indexed by the tensor's name: ``report["transformer.wte.weight"].verdict``.
    """

    tensors: tuple[TensorReport, ...]
    preset: str  # "" for own blocks
    levels: Levels
    seed: int
    num_matvecs: int
    suggestion: Partition  # the cut that suits each tensor
    savings: StateSavings  # of the suggestion
    notes: tuple[str, ...]
    route: str
    curvature: str = "Hessian"  # which matrix, in words

    def __getitem__(self, name: str) -> TensorReport:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        names = ", ".join(tensor.name for tensor in self.tensors[:8])
        raise KeyError(f"no tensor is named {name!r}; the report has {names}, ...")

    def records(self) -> list[Record]:
        """A row a tensor and cut; ``claimed`` is the partition's own."""
        return [
            {
                "tensor": tensor.name,
                "size": tensor.size,
                "cut": cut.cut,
                "claimed": cut.cut == tensor.claim,
                "blocks": cut.num_blocks,
                "share": cut.share,
                "share_error": cut.share_error,
                "expected": cut.expected,
                "contrast": cut.contrast,
                "verdict": cut.verdict,
            }
            for tensor in self.tensors
            for cut in tensor.evidence
        ]

    @property
    def verdict(self) -> dict[str, str]:
        """By tensor."""
        return {tensor.name: tensor.verdict for tensor in self.tensors}

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by verdict."""
        verdicts = [tensor.verdict for tensor in self.tensors]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}

    @property
    def reliability(self) -> str:
        """The level of the tests, and the error rates measured, in words."""
        return f"each tensor's verdict at level {self.levels.alpha:g}; {error_rates()}"

    @property
    def contradicted(self) -> tuple[str, ...]:
        """Tensors whose blocks are too coarse, too fine or along the wrong axis."""
        return tuple(t.name for t in self.tensors if t.verdict in CONTRADICTED)

    def __str__(self) -> str:
        """A row a tensor, then the reasons of all verdicts but "follows".

        A row holds the cut, its share with its error, what is expected, the best cut ("?": by
        estimates alone, not significantly) and the verdict.
        """
        rows = [_row(tensor) for tensor in self.tensors]
        reasons = [
            textwrap.fill(f"{t.name}: {t.verdict}: {t.reason}", _WIDTH, subsequent_indent="    ")
            for t in self.tensors
            if t.verdict != FOLLOWS
        ]
        counted = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)
        lines = [
            table(_TITLES, rows, left=2),
            *reasons,
            *(f"note: {note}" for note in self.notes),
            f"{counted}; {self.num_matvecs} {self.curvature}-vector products",
            textwrap.fill(self.reliability, _WIDTH),
        ]
        return "\n".join(lines)


def _row(tensor: TensorReport) -> list[str]:
    claimed = tensor.claimed
    best = tensor[tensor.suggested]
    best_cells = ["", ""]
    if best is not claimed:
        doubt = "" if best.verdict == FOLLOWS else "?"
        best_cells = [f"{best.cut}{doubt}", _share(best)]
    return [
        tensor.name,
        claimed.cut,
        f"{claimed.num_blocks:,}",
        _share(claimed),
        f"{claimed.expected:.1%}",
        "" if claimed.cut == WHOLE else f"{claimed.contrast:.3g}",
        *best_cells,
        tensor.verdict,
    ]


def _share(evidence: CutEvidence) -> str:
    if not evidence.share_error:
        return f"{evidence.share:.1%}"
    return f"{plus_minus(100 * evidence.share, 100 * evidence.share_error)} %"
