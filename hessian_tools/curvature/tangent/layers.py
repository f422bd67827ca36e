"""Rules: sums and means, softmax, embeddings, pooling. All linear in one tangent.

Letters: k probes; ``moved`` is a tangent, (k, *shape).
"""

import math
from operator import getitem

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder, tangent_axis
from hessian_tools.curvature.tangent.generic import by_vmap
from hessian_tools.curvature.tangent.graph import (
    Node,
    arguments,
    keywords,
    name_of,
    shape_of,
    value_of,
)

_ATEN = torch.ops.aten


def reduction(builder: Builder, node: Node) -> None:
    """sum and mean, over some axes or all."""
    source = arguments(node)[0]
    given = keywords(node)
    keep = given.get("keepdim", False)
    dims = given.get("dim")
    if not dims:  # none or an empty list: all
        dims = range(value_of(source).ndim)
    axes = sorted(tangent_axis(source, dim) for dim in dims)
    dtype = value_of(node).dtype
    divisor = 1
    if name_of(node) == "mean":
        divisor = math.prod(shape_of(source)[dim] for dim in dims)

    def call(moved: Tensor) -> Tensor:
        # without axes, as for a scalar, torch would sum over the probes too
        total = moved.sum(axes, keepdim=keep, dtype=dtype) if axes else moved.to(dtype)
        return total if divisor == 1 else total / divisor

    builder.linear(node, source, call)


def softmax(builder: Builder, node: Node) -> None:
    """dy = y dx - y sum(y dx)."""
    source, dim, _ = arguments(node)
    axis = tangent_axis(node, dim)

    def call(moved: Tensor, y: Tensor) -> Tensor:
        scaled = moved * y
        total = scaled.sum(axis, keepdim=True)
        return scaled.addcmul_(y, total, value=-1)

    builder.linear(node, source, call, [node])


def log_softmax(builder: Builder, node: Node) -> None:
    """dy = dx - sum(exp(y) dx)."""
    source, dim, _ = arguments(node)
    axis = tangent_axis(node, dim)
    probabilities = builder.constant(_ATEN.exp.default, (node,), node)

    def call(moved: Tensor, p: Tensor) -> Tensor:
        mean = (moved * p).sum(axis, keepdim=True)
        return moved - mean

    builder.linear(node, source, call, [probabilities])


def embedding(builder: Builder, node: Node) -> None:
    """Rows of the weight, picked by indices."""
    weight, indices, *_ = arguments(node)
    shape = shape_of(node)

    def call(moved: Tensor, indices: Tensor) -> Tensor:
        rows = moved.index_select(1, indices.flatten())
        return rows.view(len(moved), *shape)

    builder.linear(node, weight, call, [indices])


def embedding_gradient(builder: Builder, node: Node) -> None:
    """The rows of the result's gradient, added up by index; those at ``padding`` do not count."""
    gradient, indices, _, padding, by_frequency = arguments(node)
    if by_frequency:
        by_vmap(builder, node)
        return
    shape = shape_of(node)

    def call(moved: Tensor, indices: Tensor) -> Tensor:
        k = len(moved)
        rows = moved.reshape(k, -1, shape[1])
        places = indices.flatten()
        if padding >= 0:
            rows = rows * (places != padding)[:, None]
        out = rows.new_zeros(k, *shape)
        for total, one in zip(out, rows, strict=True):
            total.index_add_(0, places, one)
        return out

    builder.linear(node, gradient, call, [indices])


def max_pool(builder: Builder, node: Node) -> None:
    """The entry at each maximum's place in its plane."""
    pooling, _ = arguments(node)
    source = arguments(pooling)[0]
    places = builder.constant(getitem, (pooling, 1), node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        k = len(moved)
        # torch numbers the entries of a plane, so its two axes are one here
        flat = places.flatten(-2)
        shared = flat.expand(k, *flat.shape)
        maxima = moved.flatten(-2).gather(-1, shared)
        return maxima.view(k, *places.shape)

    builder.linear(node, source, call, [places])


def max_pool_gradient(builder: Builder, node: Node) -> None:
    """The result's gradient, added up at each maximum's place in its plane."""
    gradient, *_, places = arguments(node)
    *outer, height, width = shape_of(node)

    def call(moved: Tensor, places: Tensor) -> Tensor:
        k = len(moved)
        pieces = moved.flatten(-2)
        flat = places.flatten(-2).expand_as(pieces)
        out = pieces.new_zeros(k, *outer, height * width)
        out.scatter_add_(-1, flat, pieces)
        return out.view(k, *outer, height, width)

    builder.linear(node, gradient, call, [places])
