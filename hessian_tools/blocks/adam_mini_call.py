"""Arguments that bring the published Adam-mini 1.1.1 closest to a partition.

It can cut a tensor into slices of the first axis of a matrix, into runs of entries of one length
(the same for the whole model: the length that most entries want), into entries, or not at all.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hessian_tools.blocks.adam_mini import ATTRIBUTES, Keywords, adam_mini_names
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.ownership import check_trained, trained_parameters
from hessian_tools.blocks.partition import Partition
from hessian_tools.results import registered

Shapes = Mapping[str, tuple[int, ...]]  # by parameter
CutsByTensor = dict[str, list[Cut]]


@registered
@dataclass(frozen=True)
class AdamMiniArguments:
    """Arguments and lists of names for the published Adam-mini 1.1.1."""

    dim: int  # with n_heads: its heads are runs of dim^2 / n_heads entries
    n_heads: int
    keywords: Keywords  # its lists of substrings
    inexpressible: dict[str, str]  # {tensor: how the optimizer will cut it instead, and why}

    @property
    def code(self) -> str:
        """Python that makes the optimizer so."""
        arguments = f"lr=lr, dim={self.dim}, n_heads={self.n_heads}"
        lines = [f"optimizer = Adam_mini(model.named_parameters(), {arguments})"]
        for field, attribute in ATTRIBUTES.items():
            words = ", ".join(f'"{word}"' for word in getattr(self.keywords, field))
            names = f"{{{words}}}" if words else "set()"
            lines.append(f"optimizer.{attribute} = {names}")
        return "\n".join(lines)


def adam_mini_arguments(model: nn.Module, partition: Partition) -> AdamMiniArguments:
    """What brings the published Adam-mini 1.1.1 closest to ``partition``.

    A tensor whose blocks are runs of several lengths gets the longest if it is that one (heads for
    a fused value too), one in no block keeps Adam's own, any other is not cut; ``inexpressible``
    names each with the reason. What it would do is taken from :func:`adam_mini_names`, not assumed.

    Raises:
        ValueError: for a partition of another model.
    """
    trained = trained_parameters(model)
    check_trained(partition.cuts, trained, "partition")
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    wanted = _by_tensor(shapes, partition.cuts)
    lengths = {name: _run_lengths(shape, wanted[name]) for name, shape in shapes.items()}
    rules, run = _rules(shapes, wanted, lengths)
    keywords = _keywords(rules)
    done = adam_mini_names(model, dim=run, n_heads=run, keywords=keywords)
    made = _by_tensor(shapes, done.cuts)
    inexpressible = {}
    for name, cuts in wanted.items():
        has_one_length = len(lengths[name]) == 1
        if not has_one_length or lengths[name] != _run_lengths(shapes[name], made[name]):
            inexpressible[name] = _why(cuts, made[name])
    return AdamMiniArguments(run, run, keywords, inexpressible)


def _by_tensor(shapes: Shapes, cuts: Sequence[Cut]) -> CutsByTensor:
    by_tensor: CutsByTensor = {name: [] for name in shapes}
    for cut in cuts:
        for name in cut.parameters:
            by_tensor[name].append(cut)
    return by_tensor


def _rules(
    shapes: Shapes,
    wanted: CutsByTensor,
    lengths: Mapping[str, set[int]],
) -> tuple[dict[str, str], int]:
    """The published code's rule for each tensor, and the one length of runs."""
    # Heads for query and key, rows for value: the longer runs keep the former exact.
    longest = {name: max(several, default=0) for name, several in lengths.items()}
    rules = {
        name: _rule(shape, longest[name]) if wanted[name] else "adam"
        for name, shape in shapes.items()
    }
    entries = Counter[int]()  # that want runs of each length
    for name, rule in rules.items():
        if rule == "query_key":
            entries[longest[name]] += math.prod(shapes[name])
    run = max(entries, key=entries.__getitem__, default=1)
    for name, rule in rules.items():
        if rule == "query_key" and longest[name] != run:
            rules[name] = ""
    return rules, run


def _rule(shape: tuple[int, ...], length: int) -> str:
    """The rule that cuts a tensor into runs of ``length``; "" for one block and where none does."""
    if length in (0, math.prod(shape)):
        return ""
    if length == 1:
        return "adam"
    return "mlp" if len(shape) == 2 and length == shape[1] else "query_key"


def _run_lengths(shape: tuple[int, ...], cuts: list[Cut]) -> set[int]:
    """The lengths of the runs of neighbouring entries that the blocks of a tensor are.

    Empty for other blocks.
    """
    parts = [part for cut in cuts for part in cut.parts]
    covers_all = sum(cut.numel for cut in cuts) == math.prod(shape)
    is_joined = any(len(cut.parts) > 1 for cut in cuts)
    if is_joined or not covers_all or not all(map(_is_runs, parts)):
        return set()
    return {part.block_size for part in parts}


def _is_runs(part: Part) -> bool:
    """Whether every piece is neighbouring entries that start at a multiple of their number."""
    # Axes of one place move nothing.
    moving = [axis for axis, size in enumerate(part.view) if size > 1]
    outer = [axis for axis in moving if axis in part.axes]
    inner = [axis for axis in moving if axis not in part.axes]
    if not inner:
        return True
    first = inner[0]
    if outer and first < outer[-1]:
        return False
    # One place of the first inner axis is a run of ``step`` entries.
    step = math.prod(part.view[first + 1 :])
    span = part.index[first]
    if part.block_size != step * (span.stop - span.start):
        return False
    # The first piece's start, and the distance to the next piece's.
    starts = (span.start * step, part.view[first] * step)
    return all(start % part.block_size == 0 for start in starts)


def _keywords(rules: Mapping[str, str]) -> Keywords:
    """Substrings that pick the tensors of each rule; none where no tensor has it."""
    return Keywords(
        adam=_endings("adam", rules),
        query_key=_endings("query_key", rules),
        embedding=(),
        output=(),
        value=(),
        mlp=_endings("mlp", rules),
        attention_output=(),
    )


def _endings(rule: str, rules: Mapping[str, str]) -> tuple[str, ...]:
    """Short endings of the names with ``rule`` that are part of no name with another rule."""
    # The package lower-cases names before it looks for substrings.
    names = [name.lower() for name in rules if rules[name] == rule]
    others = [name.lower() for name in rules if rules[name] != rule]
    endings: list[str] = []
    for name in names:
        if not any(word in name for word in endings):
            endings.append(_ending(name, others))
    return tuple(endings)


def _ending(name: str, others: Sequence[str]) -> str:
    """The shortest ending of ``name`` that is part of none of ``others``.

    At least two pieces of the name, "o_proj.weight", which is what layers have in common; the full
    name if every ending is part of another.
    """
    pieces = name.split(".")
    for count in range(2, len(pieces)):
        ending = ".".join(pieces[-count:])
        if not any(ending in other for other in others):
            return ending
    return name


def _why(wanted: list[Cut], made: list[Cut]) -> str:
    got = f"{sum(cut.num_blocks for cut in made)} blocks" if made else "a crash"
    if not wanted:
        return f"in no block of the partition; it gets {got} (Adam's own)"
    if any(len(cut.parts) > 1 for cut in wanted):
        return f"its block joins several tensors; it gets {got} of its own"
    count = sum(cut.num_blocks for cut in wanted)
    return (
        f"its {count} blocks are no rows of a matrix and no runs of the one length that it can "
        f"have; it gets {got}"
    )
