"""A partition in the words of optimizers: torch's param groups, and the state that a second moment a block saves.

Letters: P parameters, B blocks.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hessian_tools.blocks.block import Part
from hessian_tools.blocks.ownership import check_trained
from hessian_tools.blocks.partition import Partition
from hessian_tools.results import registered


def param_groups(model: nn.Module, partition: Partition) -> list[dict[str, Any]]:
    """Groups for ``torch.optim``, so that a block never spans two groups.

    A block of whole tensors is one group: ``params``, ``names``, ``block`` (its name), ``cuts`` empty. A tensor that is
    cut is one group as well, whose ``cuts`` say how, one dict each in plain numbers: ``view`` (the shape to view the
    tensor as), ``index`` ((start, stop) an axis of the view), ``axes`` (those that enumerate blocks; the others are
    averaged over), ``num_blocks``. Any optimizer of torch takes the groups as they are (one rate a group); one that
    keeps a second moment a block reads ``cuts``. Trainable tensors in no block come last, named "(no block)".

    Raises:
        ValueError: a block that joins parts of several tensors, or a part of a tensor that is not whole in its cuts.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trained(partition.cuts, parameters, "partition")
    by_tensor: dict[str, list[Part]] = {}
    groups: list[dict[str, Any]] = []
    for cut in partition.cuts:
        if cut.num_blocks == 1 and all(_is_whole(part) for part in cut.parts):
            names = cut.parameters
            groups.append(_group(cut.block_name(0), names, parameters, []))
        elif len(cut.parts) > 1:
            raise ValueError(
                f"partition has {cut.name!r}, whose blocks join parts of several tensors; no group can say so"
            )
        elif cut.parameters[0] in by_tensor:
            by_tensor[cut.parameters[0]].append(cut.parts[0])
        else:
            by_tensor[cut.parameters[0]] = [cut.parts[0]]
            groups.append(
                _group(cut.parameters[0], cut.parameters, parameters, by_tensor[cut.parameters[0]])
            )
    for group in groups:
        group["cuts"] = [_plain(part) for part in group["cuts"]]
    left = [name for name in parameters if not any(name in group["names"] for group in groups)]
    return groups + ([_group("(no block)", left, parameters, [])] if left else [])


def _group(
    block: str, names: Iterable[str], parameters: Mapping[str, nn.Parameter], cuts: list[Part]
) -> dict[str, Any]:
    return {
        "params": [parameters[name] for name in names],
        "names": list(names),
        "block": block,
        "cuts": cuts,
    }


def _plain(part: Part) -> dict[str, Any]:
    index = [(s.start, s.stop) for s in part.index]
    window = {"window": part.window} if part.window else {}
    return {
        "view": part.view,
        "index": index,
        "axes": part.axes,
        "num_blocks": part.num_blocks,
    } | window


def _is_whole(part: Part) -> bool:
    return part.num_blocks == 1 and part.block_size == math.prod(part.shape)


@registered
@dataclass(frozen=True)
class StateSavings:
    """Optimizer state with one second moment a block, against Adam's two numbers a parameter."""

    num_parameters: int  # P, trainable
    num_blocks: (
        int  # B learning rates: blocks, and the entries that are in none (they keep Adam's own)
    )
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
            f"{self.num_blocks:,} learning rates for {self.num_parameters:,} parameters; optimizer state "
            f"{self.state_bytes:,} bytes, {self.saved_percent:.1f} % less than Adam's {self.adam_bytes:,}"
        )


def state_savings(model: nn.Module, partition: Partition) -> StateSavings:
    """What Adam-mini on this partition keeps, in the parameters' own dtype (arXiv 2406.16793; a block over tensors of
    several dtypes counts in that of the first).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trained(partition.cuts, parameters, "partition")
    left = {name: p.numel() for name, p in parameters.items()}
    blocks, moments = 0, 0
    for cut in partition.cuts:
        blocks += cut.num_blocks
        moments += cut.num_blocks * parameters[cut.parameters[0]].element_size()
        for part in cut.parts:
            left[part.parameter] -= part.num_blocks * part.block_size
    first = sum(p.numel() * p.element_size() for p in parameters.values())
    rest = sum(count * parameters[name].element_size() for name, count in left.items())
    total = sum(p.numel() for p in parameters.values())
    return StateSavings(total, blocks + sum(left.values()), 2 * first, first + moments + rest)


def patterns(partition: Partition) -> dict[str, str]:
    """{regular expression over whole parameter names: how these tensors are cut}, layer numbers as ``\\d+``.

    The way is what the blocks count: "whole", "role", "head", "row", "column", "element" ..., several joined by "+".
    Expressions that would stand for several ways keep their layer numbers.
    """
    ways: dict[str, set[str]] = {}
    for cut in partition.cuts:
        labelled = "role" if len(cut.labels) > 1 or cut.labels[0] else "whole"
        counted = cut.counter or ("head" if any("head=" in label for label in cut.labels) else "")
        for name in cut.parameters:
            ways.setdefault(name, set()).add(counted or labelled)
    by_name = {name: "+".join(sorted(way)) for name, way in ways.items()}
    general: dict[str, set[str]] = {}
    for name, way in by_name.items():
        general.setdefault(_expression(name), set()).add(way)
    alone = {expression for expression, found in general.items() if len(found) == 1}
    return {
        (_expression(n) if _expression(n) in alone else f"^{re.escape(n)}$"): way
        for n, way in by_name.items()
    }


def _expression(name: str) -> str:
    pieces = (r"\d+" if piece.isdigit() else re.escape(piece) for piece in name.split("."))
    return "^" + r"\.".join(pieces) + "$"
