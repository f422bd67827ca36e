"""No entry of a tensor may lie in two blocks."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, combinations

import torch

from hessian_tools.blocks.block import Cut, Part

MOST_PAIRED = 64  # parts of one tensor that are compared in pairs; more are compared entry by entry


def check_disjoint(cuts: Sequence[Cut], source: str = "spec") -> None:
    """Raises ValueError, naming two blocks of ``source``, if an entry lies in both."""
    by_tensor: dict[str, list[tuple[Cut, Part]]] = {}
    for cut in cuts:
        for part in cut.parts:
            by_tensor.setdefault(part.parameter, []).append((cut, part))
    for found in by_tensor.values():
        if len(found) > MOST_PAIRED or any(
            _may_overlap(a, b) for (_, a), (_, b) in combinations(found, 2)
        ):
            _check_entries(found, source)


def _may_overlap(a: Part, b: Part) -> bool:
    """Whether two parts of a tensor may share an entry; exact for parts with the same view, True for others."""
    if a.view != b.view:
        return True
    if any(
        max(s.start, t.start) >= min(s.stop, t.stop) for s, t in zip(a.index, b.index, strict=True)
    ):
        return False
    alike = a.index == b.index and a.axes == b.axes and a.window and b.window
    return not alike or max(a.window[0], b.window[0]) < min(a.window[1], b.window[1])  # type: ignore[index]


def _check_entries(found: Sequence[tuple[Cut, Part]], source: str) -> None:
    owner = torch.zeros(
        found[0][1].shape, dtype=torch.int32
    )  # the number of the block that has an entry; 0 is none
    starts = [1, *accumulate((part.num_blocks for _, part in found), initial=1)][1:]
    for (cut, part), start in zip(found, starts[:-1], strict=True):
        earlier, position = part.rows(owner).amax(dim=1).max(dim=0)
        if earlier:
            number = bisect_right(starts, int(earlier)) - 1
            both = f"{found[number][0].block_name(int(earlier) - starts[number])!r} and {cut.block_name(int(position))!r}"
            raise ValueError(f"{source} has blocks {both}, which overlap; blocks must be disjoint")
        part.place(
            torch.arange(start, start + part.num_blocks)[:, None].expand(-1, part.block_size), owner
        )
