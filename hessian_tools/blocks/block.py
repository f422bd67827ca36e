"""Blocks: named, disjoint parts of a model's parameter tensors.

A *block* is a part of one tensor (or of several together). Blocks of one size that lie in the same tensors form a *cut*
and go through the engine together. A *partition* is disjoint blocks in order.

Letters: B blocks of a cut, n entries of a block; ``...`` are leading batch axes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hessian_tools.results import registered


@registered
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


@registered
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
