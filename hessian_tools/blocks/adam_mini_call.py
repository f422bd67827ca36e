"""Arguments that bring the published Adam-mini 1.1.1 closest to a partition."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import nn

from hessian_tools.blocks.adam_mini import ATTRIBUTES, Keywords, adam_mini_names
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.ownership import check_trained
from hessian_tools.blocks.partition import Partition
from hessian_tools.results import registered


@registered
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
    :func:`hessian_tools.blocks.adam_mini`, not assumed.

    Raises:
        ValueError: for a partition of another model.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trained(partition.cuts, trained, "partition")
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
