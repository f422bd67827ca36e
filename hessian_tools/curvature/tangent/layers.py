"""Rules: sums and means, softmax, embeddings, pooling. All linear in one tangent.

Letters: k probes; ``moved`` is a tangent, (k, *shape).
"""

import math
from operator import getitem

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.generic import by_vmap
from hessian_tools.curvature.tangent.graph import Node, arguments, name_of, shape_of, value_of

_ATEN = torch.ops.aten


def reduction(builder: Builder, node: Node) -> None:
    """sum and mean, over some axes or all."""
    source, dims, keep = (*arguments(node), None, None)[:3]
    if keep is None:
        keep = node.kwargs.get("keepdim", False)
    if isinstance(dims, int):
        dims = [dims]
    shape = shape_of(source)
    axes = sorted(dim % len(shape) for dim in dims or ()) or list(range(len(shape)))
    shifted = [axis + 1 for axis in axes]
    divisor = math.prod(shape[axis] for axis in axes) if name_of(node) == "mean" else 1
    dtype = value_of(node).dtype

    def call(moved: Tensor) -> Tensor:
        # without axes, as for a scalar, torch would sum over the probes too
        total = moved.sum(shifted, keepdim=keep, dtype=dtype) if shifted else moved.to(dtype)
        return total if divisor == 1 else total / divisor

    builder.linear(node, source, call)


def softmax(builder: Builder, node: Node) -> None:
    """dy = y dx - y sum(y dx)."""
    source, dim, _ = arguments(node)
    axis = dim % value_of(node).ndim + 1

    def call(moved: Tensor, y: Tensor) -> Tensor:
        scaled = moved * y
        return scaled.addcmul_(y, scaled.sum(axis, keepdim=True), value=-1)

    builder.linear(node, source, call, [node])


def log_softmax(builder: Builder, node: Node) -> None:
    """dy = dx - sum(exp(y) dx)."""
    source, dim, _ = arguments(node)
    axis = dim % value_of(node).ndim + 1
    probabilities = builder.constant(_ATEN.exp.default, (node,), node)

    def call(moved: Tensor, p: Tensor) -> Tensor:
        return moved - (moved * p).sum(axis, keepdim=True)

    builder.linear(node, source, call, [probabilities])


def embedding(builder: Builder, node: Node) -> None:
    """Rows of the weight, picked by indices."""
    weight, indices = arguments(node)[:2]
    shape = shape_of(node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        return moved.index_select(1, places.flatten()).view(len(moved), *shape)

    builder.linear(node, weight, call, [indices])


def embedding_gradient(builder: Builder, node: Node) -> None:
    """The rows of the result's gradient, added up by index; those at ``padding`` do not count."""
    gradient, indices, _, padding, by_frequency = arguments(node)
    if by_frequency:
        by_vmap(builder, node)
        return
    shape = shape_of(node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        k = len(moved)
        places = places.flatten()
        rows = moved.reshape(k, -1, shape[1])
        if padding >= 0:
            rows = rows * (places != padding)[:, None]
        out = rows.new_zeros(k, *shape)
        for i in range(k):
            out[i].index_add_(0, places, rows[i])
        return out

    builder.linear(node, gradient, call, [indices])


def max_pool(builder: Builder, node: Node) -> None:
    """The entry at each maximum's place."""
    pooling, _ = arguments(node)
    indices = builder.constant(getitem, (pooling, 1), node)
    shape = shape_of(node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        k = len(moved)
        flat = places.flatten(-2).expand(k, *shape[:-2], -1)
        return moved.flatten(-2).gather(-1, flat).view(k, *shape)

    builder.linear(node, arguments(pooling)[0], call, [indices])


def max_pool_gradient(builder: Builder, node: Node) -> None:
    """The result's gradient, added up at the maxima's places."""
    gradient, *_, indices = arguments(node)
    shape = shape_of(node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        k = len(moved)
        flat = moved.flatten(-2)
        out = flat.new_zeros(k, *shape[:-2], shape[-2] * shape[-1])
        return out.scatter_add_(-1, places.flatten(-2).expand_as(flat), flat).view(k, *shape)

    builder.linear(node, gradient, call, [indices])
