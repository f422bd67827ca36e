"""What must hold of blocks: they lie in trained tensors, no two share an entry, no two a name."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Protocol

import torch
from torch import nn

from hessian_tools.blocks.block import Cut, Part

# Parts of one tensor that are compared in pairs; for more, comparing entries is faster.
MOST_PAIRED = 64
# of DistributedDataParallel (and others) and of torch.compile
WRAPPERS = ("module.", "_orig_mod.")


class Shaped(Protocol):
    """A tensor, or whatever else stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that blocks may lie in, by name; a tied one has its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_blocks(cuts: Sequence[Cut], trained: Mapping[str, Shaped], source: str) -> None:
    """Raises ValueError unless the blocks of ``cuts`` lie in ``trained`` and are disjoint.

    No two may have the same name either. ``trained``: by parameter name. ``source`` starts the
    message: where the blocks come from.
    """
    check_trained(cuts, trained, source)
    check_disjoint(cuts, source)
    check_names(cuts, source)


def check_trained(cuts: Iterable[Cut], trained: Mapping[str, Shaped], source: str) -> None:
    """Raises ValueError, naming a cut of ``source``, if it lies in no tensor of ``trained``."""
    for cut in cuts:
        for part in cut.parts:
            parameter = trained.get(part.parameter)
            if parameter is None:
                has = _instead(part.parameter, trained)
            elif tuple(parameter.shape) != part.shape:
                has = f"has it in shape {tuple(parameter.shape)}"
            else:
                continue
            raise ValueError(
                f"{source} holds {cut.name!r}, which lies in no trainable parameter of this model: "
                f"it cuts {part.parameter!r} of shape {part.shape}, and the model {has}"
            )


def _instead(name: str, trained: Iterable[str]) -> str:
    """What a model has in place of a tensor called ``name``: nothing, or one in a wrapper."""
    for present in trained:
        if _unwrapped(present) == _unwrapped(name):
            return (
                f"has it as {present!r}; take both, partition and model, with their wrapper "
                "(DistributedDataParallel, torch.compile) or both without it"
            )
    return "does not train such a tensor"


def _unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of the whole model put in front."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def check_names(cuts: Iterable[Cut], source: str) -> None:
    """Raises ValueError if two blocks of ``source`` have the same name."""
    by_stem: defaultdict[str, list[Cut]] = defaultdict(list)
    for cut in cuts:
        by_stem[cut.name.partition("[")[0]].append(cut)
    counts = Counter[str]()
    for sharing in by_stem.values():
        for cut in sharing:
            # Millions of names take seconds: those that differ by their number alone are not made.
            is_numbered = bool(cut.counter) and len(cut.labels) == 1
            if len(sharing) > 1 or not is_numbered:
                counts.update(cut.names)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"{source} has several blocks named {name!r}; give them different names"
            )


def check_disjoint(cuts: Iterable[Cut], source: str = "spec") -> None:
    """Raises ValueError, naming two blocks of ``source``, if an entry lies in both."""
    by_tensor: defaultdict[str, list[tuple[Cut, Part]]] = defaultdict(list)
    for cut in cuts:
        for part in cut.parts:
            by_tensor[part.parameter].append((cut, part))
    for owners in by_tensor.values():
        pairs = combinations((part for _, part in owners), 2)
        if len(owners) > MOST_PAIRED or any(_may_overlap(a, b) for a, b in pairs):
            _check_entries(owners, source)


def _may_overlap(a: Part, b: Part) -> bool:
    """Whether two parts of a tensor may share an entry: exact if their views agree, else True."""
    if a.view != b.view:
        return True
    pairs = zip(a.index, b.index, strict=True)
    if not all(_meet(s.start, s.stop, t.start, t.stop) for s, t in pairs):
        return False
    # Windows of one enumeration can be compared; those of two cannot.
    is_same_grid = a.index == b.index and a.axes == b.axes
    if is_same_grid and a.window and b.window:
        return _meet(*a.window, *b.window)
    return True


def _meet(start: int, stop: int, other_start: int, other_stop: int) -> bool:
    """Whether two ranges have a number in common."""
    return max(start, other_start) < min(stop, other_stop)


def _check_entries(owners: Sequence[tuple[Cut, Part]], source: str) -> None:
    """:func:`check_disjoint` for parts of one tensor, entry by entry."""
    # Blocks are numbered from 1 across all parts; an entry holds the number of its block, or 0.
    shape = owners[0][1].shape
    numbers = torch.zeros(shape, dtype=torch.int32)
    starts: list[int] = []  # the number of each part's first block
    start = 1
    for cut, part in owners:
        taken, position = part.rows(numbers).amax(dim=1).max(dim=0)
        if taken:
            number = bisect_right(starts, int(taken)) - 1
            earlier, _ = owners[number]
            first = earlier.block_name(int(taken) - starts[number])
            second = cut.block_name(int(position))
            raise ValueError(
                f"{source} has blocks {first!r} and {second!r}, which overlap; blocks must be "
                "disjoint, and each is passed once"
            )
        mine = torch.arange(start, start + part.num_blocks)[:, None]
        part.place(mine.expand(-1, part.block_size), numbers)
        starts.append(start)
        start += part.num_blocks
