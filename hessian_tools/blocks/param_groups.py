"""A partition in the words of optimizers: torch's param groups, and the state that it saves.

Letters: P parameters, B blocks.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.ownership import check_trained, trained_parameters
from hessian_tools.blocks.partition import Partition
from hessian_tools.results import registered

# What torch.optim takes as a group; its values are of many types.
ParamGroup = dict[str, Any]


def param_groups(model: nn.Module, partition: Partition) -> list[ParamGroup]:
    """Groups for ``torch.optim``, so that a block never spans two groups.

    A block of whole tensors is one group: ``params``, ``names``, ``block`` (its name), ``cuts``
    empty. A tensor that is cut is one group as well, whose ``cuts`` say how, one dict each in plain
    numbers: ``view`` (the shape to view the tensor as), ``index`` ((start, stop) an axis of the
    view), ``axes`` (those that enumerate blocks; the others are averaged over), ``num_blocks``. Any
    optimizer of torch takes the groups as they are (one rate a group); one that keeps a second
    moment a block reads ``cuts``. Trainable tensors in no block come last, named "(no block)".

    Raises:
        ValueError: a block that joins parts of several tensors, or a part of a tensor that is not
            whole in its cuts.
    """
    parameters = trained_parameters(model)
    check_trained(partition.cuts, parameters, "partition")
    parts: dict[str, list[Part]] = {}  # by tensor that is cut
    groups: list[ParamGroup] = []
    for cut in partition.cuts:
        if _holds_whole_tensors(cut):
            groups.append(_group(cut.block_name(0), cut.parameters, parameters))
            continue
        if len(cut.parts) > 1:
            raise ValueError(
                f"partition has {cut.name!r}, whose blocks join parts of several tensors; no group "
                "can say so"
            )
        name = cut.parameters[0]
        if name not in parts:
            parts[name] = []
            groups.append(_group(name, [name], parameters))
        parts[name].append(cut.parts[0])
    for group in groups:
        cut_parts = parts.get(group["block"], [])
        group["cuts"] = [_plain(part) for part in cut_parts]
    grouped = {name for group in groups for name in group["names"]}
    left = [name for name in parameters if name not in grouped]
    if left:
        groups.append(_group("(no block)", left, parameters))
    return groups


def _group(
    block: str,
    names: Iterable[str],
    parameters: Mapping[str, nn.Parameter],
) -> ParamGroup:
    names = list(names)
    return {
        "params": [parameters[name] for name in names],
        "names": names,
        "block": block,
        "cuts": [],
    }


def _plain(part: Part) -> dict[str, object]:
    plain: dict[str, object] = {
        "view": part.view,
        "index": [(picked.start, picked.stop) for picked in part.index],
        "axes": part.axes,
        "num_blocks": part.num_blocks,
    }
    if part.window is not None:
        plain["window"] = part.window
    return plain


def _holds_whole_tensors(cut: Cut) -> bool:
    """Whether the cut is one block of whole tensors."""
    if cut.num_blocks > 1:
        return False
    return all(part.block_size == math.prod(part.shape) for part in cut.parts)


@registered
@dataclass(frozen=True)
class StateSavings:
    """Optimizer state with one second moment a block, against Adam's two numbers a parameter."""

    num_parameters: int  # P, trainable
    # B learning rates: blocks, and the entries that are in none (they keep Adam's own)
    num_blocks: int
    adam_bytes: int  # first and second moments, 2 P
    state_bytes: int  # first moments and a number a block, P + B

    @property
    def saved_bytes(self) -> int:
        return self.adam_bytes - self.state_bytes

    @property
    def saved_percent(self) -> float:
        return 100 * self.saved_bytes / self.adam_bytes

    def __str__(self) -> str:
        return (
            f"{self.num_blocks:,} learning rates for {self.num_parameters:,} parameters; optimizer "
            f"state {self.state_bytes:,} bytes, {self.saved_percent:.1f} % less than Adam's "
            f"{self.adam_bytes:,}"
        )


def state_savings(model: nn.Module, partition: Partition) -> StateSavings:
    """What Adam-mini on this partition keeps, in the dtype of the parameters (arXiv 2406.16793).

    A block over tensors of several dtypes counts in that of the first.
    """
    parameters = trained_parameters(model)
    check_trained(partition.cuts, parameters, "partition")
    left = {name: p.numel() for name, p in parameters.items()}
    blocks = 0
    moments = 0
    for cut in partition.cuts:
        blocks += cut.num_blocks
        moments += cut.num_blocks * parameters[cut.parameters[0]].element_size()
        for part in cut.parts:
            left[part.parameter] -= part.numel
    first_moments = 0
    for name, p in parameters.items():
        first_moments += p.numel() * p.element_size()
        # Entries in no block keep a second moment each.
        moments += left[name] * p.element_size()
    return StateSavings(
        num_parameters=sum(p.numel() for p in parameters.values()),
        num_blocks=blocks + sum(left.values()),
        adam_bytes=2 * first_moments,
        state_bytes=first_moments + moments,
    )


def patterns(partition: Partition) -> dict[str, str]:
    """{regular expression over whole parameter names: how these tensors are cut}.

    Layer numbers become ``\\d+``. The way is what the blocks count: "whole", "role", "head", "row",
    "column", "element" ..., several joined by "+". Expressions that would stand for several ways
    keep their layer numbers.
    """
    ways: dict[str, set[str]] = {}
    for cut in partition.cuts:
        for name in cut.parameters:
            ways.setdefault(name, set()).add(_counted(cut))
    by_name = {name: "+".join(sorted(way)) for name, way in ways.items()}
    by_expression: dict[str, set[str]] = {}
    for name, way in by_name.items():
        by_expression.setdefault(_expression(name), set()).add(way)
    shown = {}
    for name, way in by_name.items():
        expression = _expression(name)
        is_clear = len(by_expression[expression]) == 1
        shown[expression if is_clear else f"^{re.escape(name)}$"] = way
    return shown


def _counted(cut: Cut) -> str:
    """What the blocks of a cut count."""
    if cut.counter:
        return cut.counter
    if any("head=" in label for label in cut.labels):
        return "head"
    return "role" if len(cut.labels) > 1 or cut.labels[0] else "whole"


def _expression(name: str) -> str:
    """``name`` as a regular expression, with any number in place of a number."""
    pieces = []
    for piece in name.split("."):
        pieces.append(r"\d+" if piece.isdigit() else re.escape(piece))
    return "^" + r"\.".join(pieces) + "$"
