"""A checked partition as text and as plain numbers: what the command line prints."""

import math
from typing import Any

import numpy as np

from hessian_tools.blocks.adam_mini_call import AdamMiniArguments, adam_mini_arguments
from hessian_tools.blocks.param_groups import patterns
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.conditioning import BlockConditioning, BlockExtremes
from hessian_tools.structure.report import PartitionReport
from hessian_tools.tables import table

Conditions = tuple[BlockConditioning | None, BlockExtremes]
Json = dict[str, Any]  # what json.dumps takes


def suggestion_text(problem: Problem, report: PartitionReport, full: bool = False) -> str:
    """The suggestion in the words of optimizers.

    ``full``: with the published Adam-mini's lists of names.
    """
    changed = sum(tensor.suggested != tensor.claim for tensor in report.tensors)
    lines = [f"suggestion ({changed} of {len(report.tensors)} tensors changed): {report.savings}"]
    lines += [f"  {way:9s} {pattern}" for pattern, way in patterns(report.suggestion).items()]
    arguments = adam_mini_arguments(problem.model, report.suggestion)
    judged = {tensor.parameter for tensor in report.tensors}
    cannot = {name: why for name, why in arguments.inexpressible.items() if name in judged}
    if full:
        return "\n".join([*lines, *_adam_mini_lines(arguments, cannot)])
    expressed = f"{len(judged) - len(cannot)} of these {len(judged)} tensors' cuts"
    lines.append(
        f"the published Adam-mini 1.1.1 can express {expressed}; --out writes its arguments"
    )
    return "\n".join(lines)


def _adam_mini_lines(arguments: AdamMiniArguments, cannot: dict[str, str]) -> list[str]:
    lines = ["for the published Adam-mini 1.1.1:"]
    lines += [f"  {line}" for line in arguments.code.splitlines()]
    if cannot:
        lines.append(f"which cannot express {len(cannot)} tensors:")
        lines += [f"  {name}: {why}" for name, why in cannot.items()]
    return lines


def conditioning_table(small: BlockConditioning | None, extremes: BlockExtremes) -> str:
    """A row a block that was solved exactly, then the extreme eigenvalues of all by tensor."""
    lines = [] if small is None else _conditioning_lines(small)
    tensor_of = [name.partition("[")[0] for name in extremes.names]
    rows = []
    for tensor in dict.fromkeys(tensor_of):
        blocks = [i for i, name in enumerate(tensor_of) if name == tensor]
        ends = (
            extremes.largest[blocks].max(),
            extremes.largest[blocks].min(),
            extremes.smallest[blocks].min(),
        )
        rows.append([tensor, str(len(blocks)), *(f"{end:.3g}" for end in ends)])
    titles = ("tensor", "blocks", "highest lambda_max", "lowest lambda_max", "lowest lambda_min")
    return "\n".join([*lines, table(titles, rows)])


def _conditioning_lines(small: BlockConditioning) -> list[str]:
    values = small.values
    rows = []
    for i, (name, size) in enumerate(zip(small.names, small.sizes, strict=True)):
        numbers = (values.kappa[i], values.kappa_adam[i], values.r[i], values.tau[i])
        cells = [f"{number:.3g}" for number in numbers]
        rows.append([name, str(size), *cells, str(values.negative[i])])
    header = ("block", "size", "kappa", "with Adam's", "r", "tau", "negative")
    return [table(header, rows), *(f"note: {note}" for note in small.notes), ""]


def summary(report: PartitionReport) -> Json:
    """All numbers, JSON-able (non-finite ones as words)."""
    tensors = []
    for tensor in report.tensors:
        evidence = [vars(cut) for cut in tensor.evidence]
        tests = [vars(test) for test in tensor.tests]
        tensors.append({**vars(tensor), "evidence": evidence, "tests": tests})
    return _jsonable(
        {
            "preset": report.preset,
            "matrix": report.curvature,
            "counts": report.counts,
            "contradicted": report.contradicted,
            "tensors": tensors,
            "suggestion": patterns(report.suggestion),
            "savings": vars(report.savings),
            "levels": vars(report.levels),
            "matvecs": report.num_matvecs,
            "route": report.route,
            "reliability": report.reliability,
            "notes": report.notes,
        }
    )


def conditioning_summary(measured: Conditions | None) -> Json:
    """The same numbers as :func:`conditioning_table`, JSON-able."""
    if measured is None:
        return {}
    small, extremes = measured
    numbers: Json = {"extremes": vars(extremes)}
    if small is not None:
        numbers["conditioning"] = {
            "names": small.names,
            "sizes": small.sizes,
            **vars(small.values),
            "notes": small.notes,
        }
    return _jsonable(numbers)


def _jsonable(value: Any) -> Any:  # any nesting of dicts, lists, arrays and plain values
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
