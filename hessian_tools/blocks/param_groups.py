"""A partition in the words of optimizers: torch's param groups, and the published Adam-mini's lists of names.

Letters: P parameters, B blocks.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from hessian_tools.blocks.adam_mini_names import ATTRIBUTES, Keywords, adam_mini_names
from hessian_tools.blocks.block import Cut, Part, Partition


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
    _check(partition, parameters)
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


def _check(partition: Partition, parameters: Mapping[str, nn.Parameter]) -> None:
    for part in (part for cut in partition.cuts for part in cut.parts):
        if (
            part.parameter not in parameters
            or tuple(parameters[part.parameter].shape) != part.shape
        ):
            raise ValueError(
                f"partition has blocks in {part.parameter!r} of shape {part.shape}, which the model does not train; "
                "make the partition of this model"
            )


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
    _check(partition, parameters)
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


@dataclass(frozen=True)
class AdamMiniArguments:
    """Arguments and lists of names that bring the published Adam-mini 1.1.1 closest to a partition."""

    dim: int  # with n_heads: its heads are runs of dim^2 / n_heads entries
    n_heads: int
    keywords: Keywords  # its lists of substrings
    inexpressible: dict[str, str]  # {tensor: how the optimizer will cut it instead, and why}

    @property
    def code(self) -> str:
        """Python that makes the optimizer so."""
        lines = [
            f"optimizer = Adam_mini(model.named_parameters(), lr=lr, dim={self.dim}, n_heads={self.n_heads})"
        ]
        for field, attribute in ATTRIBUTES.items():
            words = ", ".join(f'"{word}"' for word in getattr(self.keywords, field))
            lines.append(
                f"optimizer.{attribute} = {{{words}}}"
                if words
                else f"optimizer.{attribute} = set()"
            )
        return "\n".join(lines)


def adam_mini_arguments(model: nn.Module, partition: Partition) -> AdamMiniArguments:
    """What to give the published Adam-mini 1.1.1 so that it runs on the nearest thing to ``partition``.

    It can cut a tensor into slices of the first axis of a matrix, into runs of entries of one length (the same for the
    whole model: the length that most entries want), into entries, or not at all. A tensor whose blocks are runs of
    several lengths gets the longest if it is that one (heads for a fused value too), one in no block keeps Adam's own,
    any other is not cut; ``inexpressible`` names each with the reason. What it would do is taken from
    :func:`hessian_tools.blocks.adam_mini_names`, not assumed.

    Raises:
        ValueError: for a partition of another model.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(partition, trained)
    parameters = {name: tuple(p.shape) for name, p in trained.items()}
    by_tensor: dict[str, list[Cut]] = {name: [] for name in parameters}
    for cut in partition.cuts:
        for name in cut.parameters:
            by_tensor[name].append(cut)
    runs = {name: _run_lengths(shape, by_tensor[name]) for name, shape in parameters.items()}
    # Heads for query and key, rows for value: the longer runs keep the former exact.
    lengths = {name: max(found, default=0) for name, found in runs.items()}
    rules = {
        name: _rule(shape, lengths[name]) if by_tensor[name] else "adam"
        for name, shape in parameters.items()
    }
    wanted = Counter[int]()
    for name, rule in rules.items():
        wanted[lengths[name] if rule == "query_key" else 0] += math.prod(parameters[name])
    run = max((length for length in wanted if length), key=wanted.__getitem__, default=1)
    rules = {
        name: "" if rule == "query_key" and lengths[name] != run else rule
        for name, rule in rules.items()
    }
    words = {
        rule: _keywords([n for n in rules if rules[n] == rule], rules)
        for rule in ("adam", "query_key", "mlp")
    }
    keywords = Keywords(
        **{field.name: tuple(words.get(field.name, ())) for field in fields(Keywords)}
    )
    done = adam_mini_names(model, dim=run, n_heads=run, keywords=keywords)
    made: dict[str, list[Cut]] = {name: [] for name in parameters}
    for cut in done.cuts:
        made[cut.parameters[0]].append(cut)
    inexpressible = {
        name: _why(cuts, made[name])
        for name, cuts in by_tensor.items()
        if len(runs[name]) != 1 or runs[name] != _run_lengths(parameters[name], made[name])
    }
    return AdamMiniArguments(run, run, keywords, inexpressible)


def _run_lengths(shape: tuple[int, ...], cuts: list[Cut]) -> set[int]:
    """The lengths of the runs of neighbouring entries that the blocks of a tensor are; empty for other blocks."""
    parts = [part for cut in cuts for part in cut.parts]
    covered = sum(cut.num_blocks * cut.block_size for cut in cuts) == math.prod(shape)
    joined = any(len(cut.parts) > 1 for cut in cuts)
    return (
        {part.block_size for part in parts}
        if covered and not joined and all(map(_is_runs, parts))
        else set()
    )


def _is_runs(part: Part) -> bool:
    """Whether every piece is neighbouring entries that start at a multiple of their number."""
    outer = [axis for axis in part.axes if part.view[axis] > 1]
    inner = [
        axis for axis in range(len(part.view)) if axis not in part.axes and part.view[axis] > 1
    ]
    if not inner or min(inner) < max(outer, default=-1):
        return not inner
    first, rest = inner[0], math.prod(part.view[inner[0] + 1 :])
    entire = part.block_size == rest * (part.index[first].stop - part.index[first].start)
    starts = (part.view[first] * rest, part.index[first].start * rest)
    return entire and all(start % part.block_size == 0 for start in starts)


def _rule(shape: tuple[int, ...], length: int) -> str:
    """The published code's rule that makes such runs; "" for one block and for what none of them makes."""
    if length in (0, math.prod(shape)):
        return ""
    if length == 1:
        return "adam"
    return "mlp" if len(shape) == 2 and length == shape[1] else "query_key"


def _keywords(names: list[str], rules: Mapping[str, str]) -> list[str]:
    """Short endings of ``names`` that are part of no name with another rule; the full name where there is none."""
    chosen: list[str] = []
    others = [
        name.lower() for name, rule in rules.items() if rules.get(names[0] if names else "") != rule
    ]
    for name in map(str.lower, names):
        if any(word in name for word in chosen):
            continue
        pieces = name.split(".")
        endings = (
            ".".join(pieces[-count:]) for count in range(min(2, len(pieces)), len(pieces) + 1)
        )
        chosen.append(
            next((word for word in endings if not any(word in other for other in others)), name)
        )
    return chosen


def _why(wanted: list[Cut], made: list[Cut]) -> str:
    got = f"{sum(cut.num_blocks for cut in made)} blocks" if made else "a crash"
    if not wanted:
        return f"in no block of the partition; it gets {got} (Adam's own)"
    if any(len(cut.parts) > 1 for cut in wanted):
        return f"its block joins several tensors; it gets {got} of its own"
    count = sum(cut.num_blocks for cut in wanted)
    return f"its {count} blocks are no rows of a matrix and no runs of the one length that it can have; it gets {got}"


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
