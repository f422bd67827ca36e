"""Blocks: named, disjoint parts of a model's parameter tensors.

A *block* is a part of one tensor (or of several together). Blocks of one size that lie in the same tensors form a *cut*
and go through the engine together. A *partition* is disjoint blocks in order.

Letters: B blocks of a cut, n entries of a block; ``...`` are leading batch axes.
"""

import json
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1  # of the JSON
MOST_PAIRED = 64  # parts of one tensor that are compared in pairs; more are compared entry by entry


@dataclass(frozen=True)
class Part:
    """A region of one tensor, cut into B equal pieces."""

    parameter: str  # name in model.named_parameters()
    shape: tuple[int, ...]  # of the tensor
    view: tuple[int, ...]  # the shape to view it as: axes of ``shape``, some split or merged
    index: tuple[slice, ...] = field(
        hash=False
    )  # the region inside the view, one slice an axis, step 1
    axes: tuple[int, ...] = ()  # axes of the view that enumerate pieces, row-major; () is one piece
    window: tuple[int, int] | None = None  # the run of these pieces that is meant, if not all

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(self.index[axis].stop - self.index[axis].start for axis in self.axes)

    @property
    def num_blocks(self) -> int:
        return self.window[1] - self.window[0] if self.window else math.prod(self._grid)

    @property
    def block_shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for axis, s in enumerate(self.index) if axis not in self.axes)

    @property
    def block_size(self) -> int:
        return math.prod(self.block_shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """The pieces of ``tensor``, (..., *shape) -> (..., B, n); a view where torch allows it."""
        pieces, picked = self._pieces(tensor, Tensor.reshape)
        return pieces[picked].reshape(
            *tensor.shape[: tensor.ndim - len(self.shape)], self.num_blocks, self.block_size
        )

    def place(self, rows: Tensor, out: Tensor) -> None:
        """Writes ``rows``, (..., B, n), to their places in ``out``, (..., *shape); the rest of ``out`` stays."""
        pieces, picked = self._pieces(out, Tensor.view)
        grid = (self.num_blocks,) if self.window else self._grid
        pieces[picked] = rows.reshape(*rows.shape[:-2], *grid, *self.block_shape).to(out.dtype)

    def chunk(self, first: int, last: int) -> "Part":
        """Pieces ``first`` to ``last - 1`` alone."""
        if last - first == self.num_blocks:
            return self
        start = self.window[0] if self.window else 0
        return replace(self, window=(start + first, start + last))

    def _pieces(
        self, tensor: Tensor, viewed: Callable[..., Tensor]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """(..., *grid, *block_shape) of the tensor as ``viewed``, and the index that picks the window from it."""
        rank = tensor.ndim - len(self.shape)
        if rank < 0 or tuple(tensor.shape[rank:]) != self.shape:
            raise ValueError(
                f"tensor has shape {tuple(tensor.shape)}; {self.parameter} has shape {self.shape}"
            )
        every = (slice(None),) * rank
        region = viewed(tensor, (*tensor.shape[:rank], *self.view))[(*every, *self.index)]
        pieces = region.movedim(
            [rank + axis for axis in self.axes], list(range(rank, rank + len(self.axes)))
        )
        if self.window is None:
            return pieces, (...,)
        if len(self.axes) == 1:
            return pieces, (*every, slice(*self.window))
        numbers = torch.arange(*self.window, device=tensor.device)
        return pieces, (*every, *torch.unravel_index(numbers, self._grid))


@dataclass(frozen=True)
class Cut:
    """B blocks of one size; block i is the concatenation of the i-th pieces of all parts.

    Names are made on demand: ``name[label,counter=number]``, with ``per_label`` blocks to each label in turn.
    """

    parts: tuple[Part, ...]  # all with the same num_blocks
    name: str
    labels: tuple[str, ...] = ("",)
    counter: str = ""
    per_label: int = 1
    first: int = 0  # this cut's first block in the enumeration of labels and numbers

    @property
    def num_blocks(self) -> int:
        return self.parts[0].num_blocks

    @property
    def block_size(self) -> int:
        return sum(part.block_size for part in self.parts)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.parameter for part in self.parts))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(self.block_name, range(self.num_blocks)))

    def block_name(self, position: int) -> str:
        label, number = divmod(self.first + position, self.per_label)
        inside = ",".join(
            filter(None, (self.labels[label], f"{self.counter}={number}" if self.counter else ""))
        )
        return f"{self.name}[{inside}]" if inside else self.name

    def __getitem__(self, position: int) -> "Block":
        if not -self.num_blocks <= position < self.num_blocks:
            raise IndexError(
                f"position is {position}; {self.name} is cut into {self.num_blocks} blocks"
            )
        return Block(self, position % self.num_blocks)

    def chunk(self, first: int, last: int) -> "Cut":
        """Blocks ``first`` to ``last - 1`` as a cut of their own, with their names."""
        if not 0 <= first < last <= self.num_blocks:
            raise ValueError(
                f"first, last are {first}, {last}; 0 <= first < last <= {self.num_blocks} is needed"
            )
        return replace(
            self,
            parts=tuple(part.chunk(first, last) for part in self.parts),
            first=self.first + first,
        )

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(B, n) from tensors by parameter name, each (*shape)."""
        return torch.cat([part.rows(tensors[part.parameter]) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class Block:
    """One named block: the one at ``position`` of ``cut``."""

    cut: Cut
    position: int

    @property
    def name(self) -> str:
        return self.cut.block_name(self.position)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors it lies in."""
        return self.cut.parameters

    @property
    def parameter(self) -> str:
        """Name of its tensor. Raises ValueError for a block over several tensors."""
        if len(self.parameters) > 1:
            raise ValueError(
                f"block {self.name!r} lies in several tensors; take .parameters and .as_cut().rows"
            )
        return self.parameters[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.parts[0].block_shape if len(self.cut.parts) == 1 else (self.numel,)

    @property
    def numel(self) -> int:
        return self.cut.block_size

    def select(self, tensor: Tensor) -> Tensor:
        """Its entries of a tensor shaped like the parameter, (..., *parameter shape) -> (..., *shape)."""
        rows = {part.parameter: part for part in self.as_cut().parts}[self.parameter].rows(tensor)
        return rows.reshape((*rows.shape[:-2], *self.shape))

    def as_cut(self) -> Cut:
        """The cut that holds this block alone."""
        return self.cut.chunk(self.position, self.position + 1)

    def __repr__(self) -> str:
        return f"Block({self.name!r}, shape={self.shape})"


@dataclass(frozen=True)
class Partition:
    """Disjoint blocks in order: iterates over Blocks, indexed by name."""

    cuts: tuple[Cut, ...]
    preset: str = ""  # "" for own blocks
    notes: tuple[str, ...] = ()  # what was left whole or out and why, one line each

    def __post_init__(self) -> None:
        for name in ("cuts", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for cut in self.cuts for name in cut.names)

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self}

    def __len__(self) -> int:
        return sum(cut.num_blocks for cut in self.cuts)

    def __iter__(self) -> Iterator[Block]:
        return (cut[i] for cut in self.cuts for i in range(cut.num_blocks))

    def __contains__(self, item: object) -> bool:
        return (item.name if isinstance(item, Block) else item) in self._by_name

    def __getitem__(self, name: str) -> Block:
        if name not in self._by_name:
            raise KeyError(f"no block is named {name!r}{close_names(name, examples(self.cuts))}")
        return self._by_name[name]

    def to_json(self, path: str | os.PathLike) -> Path:
        """Writes the cuts (no values of parameters) to ``path``, a readable JSON file; returns the path."""
        document = {
            "format": FORMAT,
            "preset": self.preset,
            "notes": self.notes,
            "cuts": list(map(_plain, self.cuts)),
        }
        path, temporary = Path(path), Path(f"{path}.tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(temporary, path)
        return path

    @classmethod
    def from_json(cls, path: str | os.PathLike, model: nn.Module) -> "Partition":
        """The partition in a file of :meth:`to_json`, for ``model``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other content, a tensor that ``model`` does not have trainable or has in another shape, a cut
                that does not fit its tensor, blocks of one name, or overlapping blocks.
        """
        try:
            document = json.loads(Path(path).read_bytes())
            if document["format"] != FORMAT:
                raise ValueError(f"format is {document['format']!r}, not {FORMAT}")
            cuts = [_cut(plain) for plain in document["cuts"]]
            partition = cls(
                tuple(cuts), str(document["preset"]), tuple(map(str, document["notes"]))
            )
            repeated = _repeated_name(cuts)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} is no partition written by Partition.to_json: {error!r}"
            ) from error
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        for part in (part for cut in cuts for part in cut.parts):
            if shapes.get(part.parameter) != part.shape:
                has = (
                    f"has it in shape {shapes[part.parameter]}"
                    if part.parameter in shapes
                    else "has no such tensor"
                )
                raise ValueError(
                    f"{path} cuts {part.parameter!r} of shape {part.shape}, but the model {has} to train"
                )
        if repeated:
            raise ValueError(f"{path} has several blocks named {repeated!r}; names must differ")
        check_disjoint(cuts, str(path))
        return partition

    def __repr__(self) -> str:
        return (
            f"Partition({self.preset or 'own blocks'}: {len(self)} blocks in {len(self.cuts)} cuts)"
        )


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


def _repeated_name(cuts: Sequence[Cut]) -> str:
    """A name of two blocks, or ""; without making the names of every cut, which takes seconds for millions."""
    by_stem: dict[str, list[Cut]] = {}
    for cut in cuts:
        by_stem.setdefault(cut.name.partition("[")[0], []).append(cut)
    counted = [
        c
        for found in by_stem.values()
        for c in found
        if len(found) > 1 or len(c.labels) > 1 or not c.counter
    ]
    names = Counter(name for cut in counted for name in cut.names)
    return next((name for name, count in names.items() if count > 1), "")


def _plain(cut: Cut) -> dict[str, Any]:
    parts = [{**vars(part), "index": [(s.start, s.stop) for s in part.index]} for part in cut.parts]
    return {**vars(cut), "parts": parts}


def _cut(plain: Mapping[str, Any]) -> Cut:
    """Of what JSON holds. Raises ValueError or TypeError where it does not fit together."""
    parts = tuple(map(_part, plain["parts"]))
    cut = Cut(parts, str(plain["name"]), tuple(map(str, plain["labels"])), str(plain["counter"]), plain["per_label"],
              plain["first"])  # fmt: skip
    if not parts or len({part.num_blocks for part in parts}) > 1:
        raise ValueError(f"the parts of {cut.name!r} have different numbers of blocks")
    if (
        cut.first < 0
        or cut.per_label < 1
        or cut.first + cut.num_blocks > len(cut.labels) * cut.per_label
    ):
        raise ValueError(f"{cut.name!r} has fewer labels than blocks")
    return cut


def _part(plain: Mapping[str, Any]) -> Part:
    index = tuple(slice(int(start), int(stop)) for start, stop in plain["index"])
    shape, view, axes = (tuple(map(int, plain[key])) for key in ("shape", "view", "axes"))
    window = plain["window"] and (int(plain["window"][0]), int(plain["window"][1]))
    part = Part(str(plain["parameter"]), shape, view, index, axes, window)
    inside = len(index) == len(view) and all(
        0 <= s.start < s.stop <= n for s, n in zip(index, view, strict=True)
    )
    if not inside or math.prod(view) != math.prod(shape) or len(set(axes)) < len(axes):
        raise ValueError(
            f"the view {view} and index of {part.parameter!r} do not fit its shape {shape}"
        )
    if any(not 0 <= axis < len(view) for axis in axes):
        raise ValueError(f"the axes {axes} of {part.parameter!r} are none of its view {view}")
    if window and not 0 <= window[0] < window[1] <= replace(part, window=None).num_blocks:
        raise ValueError(f"the window {window} of {part.parameter!r} lies outside its blocks")
    return part


def examples(cuts: Iterable[Cut]) -> Iterator[str]:
    """Names of tensors and of some of their blocks, to find close ones among."""
    # Comparing thousands of names takes seconds.
    return (
        name
        for cut in cuts
        for name in (*cut.parameters, *cut.chunk(0, min(cut.num_blocks, 32)).names)
    )


def close_names(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence: those of ``known`` that resemble ``name``."""
    near = get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; close: {', '.join(near)}" if near else ""
