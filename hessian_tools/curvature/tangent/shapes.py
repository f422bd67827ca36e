"""Rules: operations that move or copy entries. The tangent's entries go the same way.

Letters: k probes; ``moved`` is a tangent, (k, *shape), None where it is zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder, tangent_axis
from hessian_tools.curvature.tangent.graph import (
    Node,
    Untraceable,
    arguments,
    keywords,
    shape_of,
    value_of,
)
from hessian_tools.curvature.tangent.program import Tangents, Values


def nothing(builder: Builder, node: Node) -> None:
    """The tangent is zero: only the shape of the argument is read."""


def identity(builder: Builder, node: Node) -> None:
    builder.same(node, arguments(node)[0])


def cast(builder: Builder, node: Node) -> None:
    source = arguments(node)[0]
    dtype = value_of(node).dtype
    if dtype == value_of(source).dtype:
        builder.same(node, source)
    else:
        builder.linear(node, source, lambda moved: moved.to(dtype))


def reshape(builder: Builder, node: Node) -> None:
    source = arguments(node)[0]
    shape = shape_of(node)

    def call(moved: Tensor) -> Tensor:
        return moved.reshape(len(moved), *shape)

    builder.linear(node, source, call, view=True)


def strided(builder: Builder, node: Node) -> None:
    """Only where it is a reshape: strides of a value say nothing about those of its tangent."""
    value = value_of(node)
    source = value_of(arguments(node)[0])
    both_contiguous = value.is_contiguous() and source.is_contiguous()
    if not both_contiguous or value.numel() != source.numel():
        raise Untraceable(f"no rule for {node.target}")
    reshape(builder, node)


def permute(builder: Builder, node: Node) -> None:
    source, dims = arguments(node)
    axes = [tangent_axis(node, dim) for dim in dims]

    def call(moved: Tensor) -> Tensor:
        return moved.permute(0, *axes)

    builder.linear(node, source, call, view=True)


def expand(builder: Builder, node: Node) -> None:
    source = arguments(node)[0]
    call = _expanding(source, node)
    builder.linear(node, source, call, view=True)


def copy(builder: Builder, node: Node) -> None:
    """The second argument's values, in the first one's shape and dtype."""
    source = arguments(node)[1]
    if not builder.moves(source):
        return
    expanded = _expanding(source, node)
    dtype = value_of(node).dtype
    builder.linear(node, source, lambda moved: expanded(moved).to(dtype))


def _expanding(source: Node, node: Node) -> Callable[[Tensor], Tensor]:
    """From a tangent of ``source`` to its broadcast against the shape of ``node``."""
    before = shape_of(source)
    shape = shape_of(node)
    # axes that the value gains come after the probes', not before
    gained = [1] * (len(shape) - len(before))

    def expanded(moved: Tensor) -> Tensor:
        k = len(moved)
        aligned = moved.reshape(k, *gained, *before)
        return aligned.expand(k, *shape)

    return expanded


def slice_scatter(builder: Builder, node: Node) -> None:
    """A copy of ``into`` with ``piece`` in the place of one of its slices."""
    into, piece, *_ = arguments(node)
    given = keywords(node)
    part = slice(given["start"], given["end"], given["step"])
    before = [slice(None)] * tangent_axis(node, given["dim"])
    place = (*before, part)
    zeros = _zeros(node)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved, moved_piece = tangents
        out = zeros(k).clone() if moved is None else moved.clone()
        out[place] = 0 if moved_piece is None else moved_piece
        return out

    builder.jointly(node, [into, piece], [], call)


def cat(builder: Builder, node: Node) -> None:
    """The pieces' tangents, one after the other, zeros for those that do not move."""
    given = keywords(node)
    # torch ignores an empty cache, whatever its number of axes
    pieces = [piece for piece in given["tensors"] if shape_of(piece) != (0,)]
    axis = tangent_axis(node, given["dim"])
    zeros = [_zeros(piece) for piece in pieces]

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        whole = [
            zero(k) if moved is None else moved for zero, moved in zip(zeros, tangents, strict=True)
        ]
        return torch.cat(whole, axis)

    builder.jointly(node, pieces, [], call)


def _zeros(node: Node) -> Callable[[int], Tensor]:
    """From k to a tangent of zeros for the value of ``node``, without memory of its own."""
    value = value_of(node)
    shape = tuple(value.shape)
    dtype = value.dtype
    device = value.device

    def zeros(k: int) -> Tensor:
        zero = torch.zeros(1, dtype=dtype, device=device)
        return zero.expand(k, *shape)

    return zeros
