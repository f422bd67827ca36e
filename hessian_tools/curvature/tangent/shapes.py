"""Rules: operations that move or copy entries. The tangent's entries go the same way.

A tangent has the probes' axis in front, so axis d of a value is axis d + 1 of its tangent.

Letters: k probes; ``moved`` is a tangent, (k, *shape), None where it is zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.graph import (
    Node,
    Untraceable,
    arguments,
    shape_of,
    value_of,
)
from hessian_tools.curvature.tangent.program import Tangents, Values


def identity(builder: Builder, node: Node) -> None:
    builder.same(node, arguments(node)[0])


def constant(builder: Builder, node: Node) -> None:
    """Only the argument's shape is read: the tangent is zero, so there is nothing to say."""


def cast(builder: Builder, node: Node) -> None:
    source = arguments(node)[0]
    dtype = value_of(node).dtype
    if dtype == value_of(source).dtype:
        builder.same(node, source)
    else:
        builder.linear(node, source, lambda moved: moved.to(dtype))


def reshape(builder: Builder, node: Node) -> None:
    shape = shape_of(node)
    source = arguments(node)[0]
    builder.linear(node, source, lambda moved: moved.reshape(len(moved), *shape), view=True)


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
    axes = [dim % len(dims) + 1 for dim in dims]
    builder.linear(node, source, lambda moved: moved.permute(0, *axes), view=True)


def transpose(builder: Builder, node: Node) -> None:
    source, *dims = arguments(node)
    one, two = (dim % value_of(node).ndim + 1 for dim in dims)
    builder.linear(node, source, lambda moved: moved.transpose(one, two), view=True)


def expand(builder: Builder, node: Node) -> None:
    source = arguments(node)[0]
    builder.linear(node, source, _expanding(source, node), view=True)


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
    aligned = (*[1] * (len(shape) - len(before)), *before)

    def expanded(moved: Tensor) -> Tensor:
        k = len(moved)
        return moved.reshape(k, *aligned).expand(k, *shape)

    return expanded


def slice_scatter(builder: Builder, node: Node) -> None:
    """A copy of ``into`` with ``piece`` in the place of one of its slices."""
    into, piece, *given = arguments(node)
    defaults = [0, None, None, 1]
    dim, *between = given + defaults[len(given) :]
    axis = dim % value_of(node).ndim + 1
    place = (*[slice(None)] * axis, slice(*between))
    shape = shape_of(node)
    like = value_of(node)
    dtype, device = like.dtype, like.device

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved, moved_piece = tangents
        zeros = torch.zeros(1, dtype=dtype, device=device).expand(k, *shape)
        out = zeros.clone() if moved is None else moved.clone()
        out[place] = 0 if moved_piece is None else moved_piece
        return out

    builder.jointly(node, (into, piece), (), call)


def cat(builder: Builder, node: Node) -> None:
    """The pieces' tangents, one after the other, zeros for those that do not move."""
    given, *rest = arguments(node)
    dim = rest[0] if rest else 0
    pieces = [piece for piece in given if shape_of(piece) != (0,)]  # cat ignores an empty cache
    axis = dim % value_of(node).ndim + 1
    shapes = [shape_of(piece) for piece in pieces]
    dtype, device = value_of(node).dtype, value_of(node).device

    def zeros(k: int, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=device).expand(k, *shape)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        each = zip(tangents, shapes, strict=True)
        whole = [zeros(k, shape) if moved is None else moved for moved, shape in each]
        return torch.cat(whole, axis)

    builder.jointly(node, pieces, (), call)
