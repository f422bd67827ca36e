"""A partition: disjoint, named blocks in order, and the file that keeps one."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.ownership import check_blocks, trained_parameters
from hessian_tools.results import registered, write_atomically

FORMAT = 1  # of the JSON
# Names of one cut that errors look for close ones among: comparing thousands takes seconds.
MOST_EXAMPLES = 32

Plain = dict[str, Any]  # what JSON holds, to be checked


@registered
@dataclass(frozen=True)
class Partition:
    """Disjoint blocks in order: iterates over Blocks, indexed by name."""

    cuts: tuple[Cut, ...]
    preset: str = ""  # "" for a user's own blocks
    notes: tuple[str, ...] = ()  # what was left whole or out and why, one line each

    def __post_init__(self) -> None:
        # Lists are taken as well, but tuples are kept, so that equal partitions compare as equal.
        object.__setattr__(self, "cuts", tuple(self.cuts))
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all blocks, in order."""
        return tuple(name for cut in self.cuts for name in cut.names)

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self}

    def __len__(self) -> int:
        return sum(cut.num_blocks for cut in self.cuts)

    def __iter__(self) -> Iterator[Block]:
        return (cut[position] for cut in self.cuts for position in range(cut.num_blocks))

    def __contains__(self, item: object) -> bool:
        name = item.name if isinstance(item, Block) else item
        return name in self._by_name

    def __getitem__(self, name: str) -> Block:
        if name not in self._by_name:
            raise KeyError(f"no block is named {name!r}{close_names(name, examples(self.cuts))}")
        return self._by_name[name]

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Writes the cuts as readable JSON, no values of parameters; returns the path."""
        document = {
            "format": FORMAT,
            "preset": self.preset,
            "notes": self.notes,
            "cuts": [_plain_cut(cut) for cut in self.cuts],
        }
        text = json.dumps(document, indent=1) + "\n"
        return write_atomically(Path(path), text.encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], model: nn.Module) -> "Partition":
        """The partition in a file of :meth:`to_json`, for ``model``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other content, a tensor that ``model`` does not train or has in another
                shape, a cut that does not fit its tensor, blocks of one name, or overlapping
                blocks.
        """
        try:
            partition = _read(json.loads(Path(path).read_bytes()))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} is no partition written by Partition.to_json: {error!r}"
            ) from error
        check_blocks(partition.cuts, trained_parameters(model), str(path))
        return partition

    def __repr__(self) -> str:
        kind = self.preset or "own blocks"
        return f"Partition({kind}: {len(self)} blocks in {len(self.cuts)} cuts)"


def _plain_cut(cut: Cut) -> Plain:
    parts = []
    for part in cut.parts:
        bounds = [(s.start, s.stop) for s in part.index]
        parts.append({**vars(part), "index": bounds})
    return {**vars(cut), "parts": parts}


def _read(document: Plain) -> Partition:
    """The partition in a document; any error there means that it is none of ours."""
    if document["format"] != FORMAT:
        raise ValueError(f"format is {document['format']!r}, not {FORMAT}")
    cuts = tuple(_read_cut(plain) for plain in document["cuts"])
    notes = tuple(str(note) for note in document["notes"])
    return Partition(cuts, str(document["preset"]), notes)


def _read_cut(plain: Plain) -> Cut:
    cut = Cut(
        parts=tuple(_read_part(part) for part in plain["parts"]),
        name=str(plain["name"]),
        labels=tuple(str(label) for label in plain["labels"]),
        counter=str(plain["counter"]),
        per_label=int(plain["per_label"]),
        first=int(plain["first"]),
    )
    if len({part.num_blocks for part in cut.parts}) != 1:
        raise ValueError(f"the parts of {cut.name!r} have different numbers of blocks")
    last = cut.first + cut.num_blocks
    if cut.first < 0 or cut.per_label < 1 or last > len(cut.labels) * cut.per_label:
        raise ValueError(f"{cut.name!r} has fewer labels than blocks")
    return cut


def _read_part(plain: Plain) -> Part:
    window = None
    if plain["window"]:
        first, last = _integers(plain["window"])
        window = (first, last)
    part = Part(
        parameter=str(plain["parameter"]),
        shape=_integers(plain["shape"]),
        view=_integers(plain["view"]),
        index=tuple(slice(int(start), int(stop)) for start, stop in plain["index"]),
        axes=_integers(plain["axes"]),
        window=window,
    )
    _check_part(part)
    return part


def _integers(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers)


def _check_part(part: Part) -> None:
    """Raises ValueError unless view, index, axes and window fit together."""
    inside = len(part.index) == len(part.view) and all(
        0 <= picked.start < picked.stop <= size
        for picked, size in zip(part.index, part.view, strict=True)
    )
    if not inside or math.prod(part.view) != math.prod(part.shape):
        raise ValueError(
            f"the view {part.view} and index of {part.parameter!r} do not fit its shape "
            f"{part.shape}"
        )
    known = set(range(len(part.view)))
    distinct = set(part.axes)
    if not distinct <= known or len(distinct) < len(part.axes):
        raise ValueError(
            f"{part.axes} are no distinct axes of the view {part.view} of {part.parameter!r}"
        )
    if part.window is None:
        return
    first, last = part.window
    if not 0 <= first < last <= replace(part, window=None).num_blocks:
        raise ValueError(f"the window {part.window} of {part.parameter!r} lies outside its blocks")


def examples(cuts: Iterable[Cut]) -> Iterator[str]:
    """Names of tensors and of some of their blocks, for :func:`close_names`."""
    for cut in cuts:
        yield from cut.parameters
        yield from cut.chunk(0, min(cut.num_blocks, MOST_EXAMPLES)).names


def close_names(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence: those of ``known`` that resemble ``name``."""
    candidates = list(dict.fromkeys(known))
    near = get_close_matches(name, candidates, n=3, cutoff=0.5)
    return f"; close: {', '.join(near)}" if near else ""
