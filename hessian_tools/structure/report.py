"""What :func:`hessian_tools.structure.check.check_partition` finds, and how it reads."""

import textwrap
from dataclasses import dataclass

from hessian_tools.blocks.param_groups import StateSavings
from hessian_tools.blocks.partition import Partition
from hessian_tools.structure.judgement import CONTRADICTED, VERDICTS, Levels, Statement, error_rates
from hessian_tools.structure.mass import WHOLE
from hessian_tools.tables import plus_minus, table


@dataclass(frozen=True)
class CutEvidence:
    """One way to cut a tensor. Masses are squared Frobenius norms within the tensor's own Hessian."""

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
    suggested: str  # the cut to take: one that follows, or the claim, or where that is contradicted what likely follows
    evidence: tuple[CutEvidence, ...]
    tests: tuple[Statement, ...]  # all that the verdict on the claim rests on
    norm: float  # |H_tt|_F of the mean loss
    exact: bool
    num_matvecs: int

    def __getitem__(self, cut: str) -> CutEvidence:
        for found in self.evidence:
            if found.cut == cut:
                return found
        raise KeyError(
            f"{self.name} has no cut {cut!r}; its cuts are {', '.join(e.cut for e in self.evidence)}"
        )

    @property
    def claimed(self) -> CutEvidence:
        return self[self.claim]


@dataclass(frozen=True)
class PartitionReport:
    """Verdicts on a partition; indexed by the tensor's name, ``report["transformer.wte.weight"].verdict``."""

    tensors: tuple[TensorReport, ...]
    preset: str  # "" for own blocks
    levels: Levels
    seed: int
    num_matvecs: int
    suggestion: Partition  # the cut that suits each tensor
    savings: StateSavings  # of the suggestion
    notes: tuple[str, ...]
    route: str

    def __getitem__(self, name: str) -> TensorReport:
        for found in self.tensors:
            if found.name == name:
                return found
        raise KeyError(
            f"no tensor is named {name!r}; the report has {', '.join(t.name for t in self.tensors[:8])}, ..."
        )

    @property
    def verdict(self) -> dict[str, str]:
        """By tensor."""
        return {tensor.name: tensor.verdict for tensor in self.tensors}

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by verdict."""
        return {verdict: sum(t.verdict == verdict for t in self.tensors) for verdict in VERDICTS}

    @property
    def reliability(self) -> str:
        """The level of the tests, and the error rates measured, in words."""
        return f"each tensor's verdict at level {self.levels.alpha:g}; {error_rates()}"

    @property
    def contradicted(self) -> tuple[str, ...]:
        """Tensors whose blocks are too coarse, too fine or along the wrong axis."""
        return tuple(t.name for t in self.tensors if t.verdict in CONTRADICTED)

    def __str__(self) -> str:
        """A row a tensor: its cut, share inside with its error, what is expected, the best cut ("?": by estimates
        alone, not significantly), the verdict; then the reasons."""
        titles = (
            "tensor,cut,blocks,mass inside,unstructured,contrast,best cut,its mass,verdict".split(
                ","
            )
        )
        rows = []
        for tensor in self.tensors:
            own, best = tensor.claimed, tensor[tensor.suggested]
            doubt = "" if best.verdict == "follows" else "?"
            rows.append([
                tensor.name, own.cut, f"{own.num_blocks:,}", _share(own.share, own.share_error), f"{own.expected:.1%}",
                "" if own.cut == WHOLE else f"{own.contrast:.3g}", f"{best.cut}{doubt}" if best is not own else "",
                _share(best.share, best.share_error) if best is not own else "", tensor.verdict,
            ])  # fmt: skip
        reasons = [
            textwrap.fill(f"{tensor.name}: {tensor.verdict}: {tensor.reason}", 118, subsequent_indent="    ")
            for tensor in self.tensors if tensor.verdict != "follows"
        ]  # fmt: skip
        counted = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items() if count)
        products = f"{self.num_matvecs} Hessian-vector products"
        return "\n".join(
            [
                table(titles, rows, left=2),
                *reasons,
                *(f"note: {n}" for n in self.notes),
                f"{counted}; {products}",
                textwrap.fill(self.reliability, 118),
            ]
        )


def _share(share: float, error: float) -> str:
    return f"{share:.1%}" if not error else f"{plus_minus(100 * share, 100 * error)} %"
