"""Blocks: named, disjoint parts of a model's parameter tensors.

A *block* is a part of one tensor, or of several together. Blocks of one size that lie in the same
tensors form a *cut*: they are stored as one object and go through the engine together. A list of
disjoint cuts is a partition (:mod:`hessian_tools.blocks.partition`).

Letters: B blocks of a cut, n entries of a block; ``...`` are leading batch axes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hessian_tools.results import registered


@registered
@dataclass(frozen=True)
class Part:
    """A region of one tensor, cut into B equal pieces.

    The tensor is viewed in another shape, a box is picked from that view, and some axes of the box
    enumerate the pieces. The heads of the query in a fused (3 d, d) matrix: ``view`` (3, H, h, d),
    ``index`` 0:1 of the first axis and all of the others, ``axes`` (1,).
    """

    parameter: str  # name in model.named_parameters()
    shape: tuple[int, ...]  # of the tensor
    view: tuple[int, ...]  # axes of ``shape``, some split or merged
    # The region inside the view, one slice of step 1 an axis. Slices cannot be hashed.
    index: tuple[slice, ...] = field(hash=False)
    axes: tuple[int, ...] = ()  # of the view; they enumerate pieces, row-major. () is one piece
    window: tuple[int, int] | None = None  # the run of these pieces that is meant, if not all

    @property
    def _region(self) -> tuple[int, ...]:
        """The shape of the region inside the view."""
        return tuple(picked.stop - picked.start for picked in self.index)

    @property
    def _grid(self) -> tuple[int, ...]:
        """How many pieces there are along each of ``axes``, whatever the window."""
        return tuple(self._region[axis] for axis in self.axes)

    @property
    def num_blocks(self) -> int:
        """B."""
        if self.window is not None:
            return self.window[1] - self.window[0]
        return math.prod(self._grid)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of one piece."""
        return tuple(size for axis, size in enumerate(self._region) if axis not in self.axes)

    @property
    def block_size(self) -> int:
        """n."""
        return math.prod(self.block_shape)

    @property
    def numel(self) -> int:
        """Entries of all pieces, B n."""
        return self.num_blocks * self.block_size

    def rows(self, tensor: Tensor) -> Tensor:
        """The pieces of ``tensor``, (..., *shape) -> (..., B, n); a view where torch allows it.

        Raises:
            ValueError: for a tensor of another shape.
        """
        batch = self._batch_shape(tensor)
        pieces = self._pieces(tensor.reshape((*batch, *self.view)))
        picked = pieces[self._picked(len(batch), tensor.device)]
        return picked.reshape((*batch, self.num_blocks, self.block_size))

    def place(self, rows: Tensor, out: Tensor) -> None:
        """Writes ``rows``, (..., B, n), to their places in ``out``, (..., *shape).

        The other entries of ``out`` stay. Raises ValueError for an ``out`` of another shape.
        """
        batch = self._batch_shape(out)
        # view, not reshape: what is written into a copy would be lost.
        pieces = self._pieces(out.view((*batch, *self.view)))
        grid = self._grid if self.window is None else (self.num_blocks,)
        shape = (*rows.shape[:-2], *grid, *self.block_shape)
        picked = self._picked(len(batch), out.device)
        pieces[picked] = rows.reshape(shape).to(out.dtype)

    def chunk(self, first: int, last: int) -> "Part":
        """Pieces ``first`` to ``last - 1`` alone."""
        if last - first == self.num_blocks:
            return self
        start = self.window[0] if self.window else 0
        return replace(self, window=(start + first, start + last))

    def _batch_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The leading axes of ``tensor``, (..., *shape)."""
        rank = tensor.ndim - len(self.shape)
        if rank < 0 or tuple(tensor.shape[rank:]) != self.shape:
            raise ValueError(
                f"tensor has shape {tuple(tensor.shape)}; {self.parameter} has shape {self.shape}"
            )
        return tuple(tensor.shape[:rank])

    def _pieces(self, viewed: Tensor) -> Tensor:
        """All pieces, whatever the window: (..., *view) -> (..., *grid, *block_shape), a view."""
        rank = viewed.ndim - len(self.view)
        whole = (slice(None),) * rank
        region = viewed[(*whole, *self.index)]
        enumerating = [rank + axis for axis in self.axes]
        front = list(range(rank, rank + len(self.axes)))
        return region.movedim(enumerating, front)

    def _picked(self, rank: int, device: torch.device) -> tuple[slice | Tensor, ...]:
        """The index of the window in :meth:`_pieces` with ``rank`` batch axes."""
        if self.window is None:
            return ()
        batch = (slice(None),) * rank
        if len(self.axes) == 1:
            return (*batch, slice(*self.window))
        # A run of pieces in a grid of several axes is no box: it is picked one by one, by a copy.
        rest = torch.arange(*self.window, device=device)
        places: list[Tensor] = []
        for size in reversed(self._grid):  # torch.unravel_index would wait for the device
            places.insert(0, rest % size)
            rest = rest // size
        return (*batch, *places)


@registered
@dataclass(frozen=True)
class Cut:
    """B blocks of one size; block i is the concatenation of the i-th pieces of all parts.

    Names are made on demand, since a cut may have millions of blocks:
    ``name[label,counter=number]``, with ``per_label`` blocks to each label in turn.
    """

    parts: tuple[Part, ...]  # all with the same num_blocks
    name: str
    labels: tuple[str, ...] = ("",)
    counter: str = ""
    per_label: int = 1
    first: int = 0  # this cut's first block in the enumeration of labels and numbers

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.parts[0].num_blocks

    @property
    def block_size(self) -> int:
        """n."""
        return sum(part.block_size for part in self.parts)

    @property
    def numel(self) -> int:
        """Entries of all blocks, B n."""
        return self.num_blocks * self.block_size

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that every block lies in."""
        return tuple(dict.fromkeys(part.parameter for part in self.parts))

    @property
    def names(self) -> tuple[str, ...]:
        """(B,) names of all blocks."""
        return tuple(self.block_name(position) for position in range(self.num_blocks))

    def block_name(self, position: int) -> str:
        """The name of block ``position``, 0 <= position < B."""
        label, number = divmod(self.first + position, self.per_label)
        inside = self.labels[label]
        if self.counter:
            counted = f"{self.counter}={number}"
            inside = f"{inside},{counted}" if inside else counted
        return f"{self.name}[{inside}]" if inside else self.name

    def __getitem__(self, position: int) -> "Block":
        if not -self.num_blocks <= position < self.num_blocks:
            raise IndexError(
                f"position is {position}; {self.name} is cut into {self.num_blocks} blocks"
            )
        return Block(self, position % self.num_blocks)

    def chunk(self, first: int, last: int) -> "Cut":
        """Blocks ``first`` to ``last - 1`` as a cut of their own, with their names.

        Raises:
            ValueError: unless 0 <= first < last <= B.
        """
        if not 0 <= first < last <= self.num_blocks:
            raise ValueError(
                f"first, last are {first}, {last}; 0 <= first < last <= {self.num_blocks} is needed"
            )
        parts = tuple(part.chunk(first, last) for part in self.parts)
        return replace(self, parts=parts, first=self.first + first)

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(B, n) from tensors by parameter name, each (*shape)."""
        pieces = [part.rows(tensors[part.parameter]) for part in self.parts]
        return torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class Block:
    """One named block: the one at ``position`` of ``cut``."""

    cut: Cut
    position: int

    @property
    def name(self) -> str:
        """The parameter's name, with the part in brackets if it is not the whole tensor."""
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
        """Its shape in its tensor; (n,) if it is made of several parts."""
        if len(self.cut.parts) > 1:
            return (self.numel,)
        return self.cut.parts[0].block_shape

    @property
    def numel(self) -> int:
        """n."""
        return self.cut.block_size

    def select(self, tensor: Tensor) -> Tensor:
        """Its entries of a tensor shaped like the parameter: (..., *parameter shape) -> (...,
        *shape).

        Raises:
            ValueError: for a block over several tensors, or a tensor of another shape.
        """
        parts = {part.parameter: part for part in self.as_cut().parts}
        rows = parts[self.parameter].rows(tensor)  # (..., 1, n)
        return rows.reshape((*rows.shape[:-2], *self.shape))

    def as_cut(self) -> Cut:
        """The cut that holds this block alone."""
        return self.cut.chunk(self.position, self.position + 1)

    def __repr__(self) -> str:
        return f"Block({self.name!r}, shape={self.shape})"
