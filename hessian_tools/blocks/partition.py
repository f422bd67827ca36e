"""A partition: disjoint, named blocks in order, and its JSON."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.ownership import check_disjoint
from hessian_tools.results import registered, write_atomically

FORMAT = 1  # of the JSON


@registered
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
        text = json.dumps(document, indent=1) + "\n"
        return write_atomically(Path(path), text.encode())

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
