"""A checked partition as text and as plain numbers: what the command line prints."""

import math
from typing import Any

from hessian_tools.blocks.adam_mini_arguments import adam_mini_arguments
from hessian_tools.blocks.param_groups import patterns
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.conditioning import BlockConditioning, BlockExtremes
from hessian_tools.structure.report import PartitionReport
from hessian_tools.tables import table

Conditions = tuple[BlockConditioning | None, BlockExtremes]


def suggestion_text(problem: Problem, report: PartitionReport, full: bool = False) -> str:
    """The suggestion in the words of optimizers; ``full``: with the published Adam-mini's lists of names."""
    cut = {tensor.parameter for tensor in report.tensors}
    changed = sum(tensor.suggested != tensor.claim for tensor in report.tensors)
    arguments = adam_mini_arguments(problem.model, report.suggestion)
    lines = [f"suggestion ({changed} of {len(report.tensors)} tensors changed): {report.savings}"]
    lines += [f"  {way:9s} {pattern}" for pattern, way in patterns(report.suggestion).items()]
    cannot = {name: why for name, why in arguments.inexpressible.items() if name in cut}
    if not full:
        told = f"can express {len(cut) - len(cannot)} of these {len(cut)} tensors' cuts"
        return "\n".join(
            [*lines, f"the published Adam-mini 1.1.1 {told}; --out writes its arguments"]
        )
    lines += [
        "for the published Adam-mini 1.1.1:",
        *(f"  {line}" for line in arguments.code.splitlines()),
    ]
    if cannot:
        lines.append(f"which cannot express {len(cannot)} tensors:")
        lines += [f"  {name}: {why}" for name, why in cannot.items()]
    return "\n".join(lines)


def conditioning_table(small: BlockConditioning | None, extremes: BlockExtremes) -> str:
    """A row a block that was solved exactly, then the extreme eigenvalues of all by tensor."""
    found = []
    if small is not None:
        header = ("block", "size", "kappa", "with Adam's", "r", "tau", "negative")
        v = small.values
        columns = (v.kappa, v.kappa_adam, v.r, v.tau)
        rows = [
            [name, str(size), *(f"{column[i]:.3g}" for column in columns), str(v.negative[i])]
            for i, (name, size) in enumerate(zip(small.names, small.sizes, strict=True))
        ]
        found += [table(header, rows), *(f"note: {note}" for note in small.notes), ""]
    ends = []
    for name in dict.fromkeys(name.partition("[")[0] for name in extremes.names):
        own = [i for i, other in enumerate(extremes.names) if other.partition("[")[0] == name]
        numbers = (
            extremes.largest[own].max(),
            extremes.largest[own].min(),
            extremes.smallest[own].min(),
        )
        ends.append([name, str(len(own)), *(f"{number:.3g}" for number in numbers)])
    titles = ("tensor", "blocks", "highest lambda_max", "lowest lambda_max", "lowest lambda_min")
    return "\n".join([*found, table(titles, ends)])


def summary(report: PartitionReport) -> dict[str, Any]:
    """All numbers, JSON-able (non-finite ones as words)."""
    plain: Any = {
        "preset": report.preset,
        "counts": report.counts,
        "contradicted": report.contradicted,
        "tensors": [{**vars(t), "evidence": [vars(e) for e in t.evidence], "tests": [vars(s) for s in t.tests]}
                    for t in report.tensors],
        "suggestion": patterns(report.suggestion),
        "savings": vars(report.savings),
        "levels": vars(report.levels),
        "matvecs": report.num_matvecs,
        "route": report.route,
        "reliability": report.reliability,
        "notes": report.notes,
    }  # fmt: skip
    return _plain(plain)


def conditioning_summary(measured: Conditions | None) -> dict[str, Any]:
    """The same numbers, JSON-able."""
    if measured is None:
        return {}
    small, extremes = measured
    found = {
        "extremes": {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in vars(extremes).items()
        }
    }
    if small is not None:
        values = {key: value.tolist() for key, value in vars(small.values).items()}
        found["conditioning"] = {
            "names": small.names,
            "sizes": small.sizes.tolist(),
            **values,
            "notes": small.notes,
        }
    return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
