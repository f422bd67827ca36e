"""Rules: matrix products and convolutions, by the product rule.

A product has a :class:`~hessian_tools.curvature.tangent.builder.Half` for each of its operands. So
both halves of d(A B) = A dB + dA B are accumulated into one result, and either can be left out.

Letters: k probes; ``moved`` is an operand's tangent, (k, *shape).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Addition, Builder, Half
from hessian_tools.curvature.tangent.graph import Node, arguments, shape_of, value_of

_ATEN = torch.ops.aten


# --------------------------------------------------------------------------------------- matrices


def matrix_product(builder: Builder, node: Node) -> None:
    """d(A B) = A dB + dA B."""
    left, right = arguments(node)
    halves = [
        Half(right, _matrix_times_moved, [left]),
        Half(left, _moved_times_matrix, [right]),
    ]
    builder.product(node, halves)


def _matrix_times_moved(
    out: Tensor | None,
    moved: Tensor,
    a: Tensor,
) -> Tensor:
    """A dB, always the first half."""
    shared = a.expand(len(moved), *a.shape)  # the same for all probes, not copied
    return torch.bmm(shared, moved)


def _moved_times_matrix(
    out: Tensor | None,
    moved: Tensor,
    b: Tensor,
) -> Tensor:
    """dA B, added by addmm and baddbmm: their forms in place are not counted as operations."""
    k, n, p = moved.shape
    q = b.shape[1]
    if not moved.is_contiguous():
        shared = b.expand(k, p, q)
        if out is None:
            return torch.bmm(moved, shared)
        return torch.baddbmm(out, moved, shared, out=out)
    rows = moved.view(k * n, p)  # one large product
    if out is None:
        return torch.mm(rows, b).view(k, n, q)
    flat = out.view(k * n, q)
    torch.addmm(flat, rows, b, out=flat)
    return out


def batched_product(builder: Builder, node: Node) -> None:
    """d(A B) = A dB + dA B for a batch of matrices."""
    left, right = arguments(node)
    halves = [
        Half(right, _batch_times_moved, [left]),
        Half(left, _moved_times_batch, [right]),
    ]
    builder.product(node, halves)


def _batch_times_moved(
    out: Tensor | None,
    moved: Tensor,
    a: Tensor,
) -> Tensor:
    """A dB, always the first half; one product a probe, for which A need not be copied."""
    k, batch, _, q = moved.shape
    out = moved.new_empty(k, batch, a.shape[1], q)
    for total, one in zip(out, moved, strict=True):
        torch.bmm(a, one, out=total)
    return out


def _moved_times_batch(
    out: Tensor | None,
    moved: Tensor,
    b: Tensor,
) -> Tensor:
    """dA B; one product a probe, for which B need not be copied."""
    if out is None:
        k, batch, n, _ = moved.shape
        out = moved.new_empty(k, batch, n, b.shape[2])
        for total, one in zip(out, moved, strict=True):
            torch.bmm(one, b, out=total)
        return out
    for total, one in zip(out, moved, strict=True):
        torch.baddbmm(total, one, b, out=total)
    return out


# ----------------------------------------------------------------------------------- convolutions


def convolution(builder: Builder, node: Node) -> None:
    """d(x * w + b) = dx * w + x * dw + db."""
    x, weight, bias, *geometry = arguments(node)
    shape = shape_of(node)

    def convolved(image: Tensor, kernel: Tensor) -> Tensor:
        return torch.convolution(image, kernel, None, *geometry)

    def by_input(
        out: Tensor | None,
        moved: Tensor,
        kernel: Tensor,
    ) -> Tensor:
        # always the first half; the probes are further images
        images = moved.flatten(0, 1)
        return convolved(images, kernel).unflatten(0, (len(moved), -1))

    def by_weight(moved: Tensor, image: Tensor) -> Tensor:
        return convolved(image, moved)

    def by_bias(out: Tensor | None, moved: Tensor) -> Tensor:
        k = len(moved)
        positions = [1] * (len(shape) - 2)
        channels = moved.view(k, 1, -1, *positions)
        if out is None:  # the same at all positions of all images, so without memory for each
            return channels.expand(k, *shape)
        return out.add_(channels)

    halves = [
        Half(x, by_input, [weight]),
        Half(weight, _each_probe(by_weight), [x]),
        Half(bias, by_bias),
    ]
    builder.product(node, halves)


def convolution_gradient(builder: Builder, node: Node) -> None:
    """One of the three gradients of a convolution: to its input, its weight or its bias."""
    source, index = arguments(node)
    rules = [_gradient_to_input, _gradient_to_weight, _gradient_to_bias]
    rules[index](builder, node, source)


def _gradient_to_input(
    builder: Builder,
    node: Node,
    source: Node,
) -> None:
    """A product of the result's gradient g and the weight; of the input only the shape is read."""
    gradient, x, weight, _, *geometry, _ = arguments(source)
    number, *shape = shape_of(x)
    backward = _backward(0, geometry)

    def by_gradient(
        out: Tensor | None,
        moved: Tensor,
        kernel: Tensor,
    ) -> Tensor:
        # always the first half; the probes are further images
        k = len(moved)
        images = kernel.new_empty(1).expand(k * number, *shape)
        gradients = moved.flatten(0, 1)
        return backward(gradients, images, kernel).unflatten(0, (k, -1))

    def by_weight(moved: Tensor, g: Tensor) -> Tensor:
        images = g.new_empty(1).expand(number, *shape)
        return backward(g, images, moved)

    halves = [
        Half(gradient, by_gradient, [weight]),
        Half(weight, _each_probe(by_weight), [gradient]),
    ]
    builder.product(node, halves)


def _gradient_to_weight(
    builder: Builder,
    node: Node,
    source: Node,
) -> None:
    """A product of the result's gradient g and the input; of the weight only the shape is read."""
    gradient, x, weight, _, *geometry, _ = arguments(source)
    shape = shape_of(weight)
    backward = _backward(1, geometry)

    def by_gradient(moved: Tensor, image: Tensor) -> Tensor:
        kernel = image.new_empty(1).expand(shape)
        return backward(moved, image, kernel)

    def by_input(moved: Tensor, g: Tensor) -> Tensor:
        kernel = g.new_empty(1).expand(shape)
        return backward(g, moved, kernel)

    halves = [
        Half(gradient, _each_probe(by_gradient), [x]),
        Half(x, _each_probe(by_input), [gradient]),
    ]
    builder.product(node, halves)


def _gradient_to_bias(
    builder: Builder,
    node: Node,
    source: Node,
) -> None:
    """The sum of the result's gradient over images and positions."""
    gradient = arguments(source)[0]
    axes = [1, *range(3, value_of(gradient).ndim + 1)]
    builder.linear(node, gradient, lambda moved: moved.sum(axes))


def _backward(
    index: int,
    geometry: Sequence[object],
) -> Callable[..., Tensor]:
    """(g, input, weight) -> one of the gradients of a convolution."""
    mask = [index == place for place in range(3)]

    def backward(g: Tensor, image: Tensor, kernel: Tensor) -> Tensor:
        all_three = _ATEN.convolution_backward(g, image, kernel, None, *geometry, mask)
        return all_three[index]

    return backward


def _each_probe(product: Callable[..., Tensor]) -> Addition:
    """A half whose term of one probe is ``product(tangent, *constants)``."""

    def add(
        out: Tensor | None,
        moved: Tensor,
        *constants: Tensor,
    ) -> Tensor:
        pieces = (product(one, *constants) for one in moved)
        if out is None:
            return torch.stack(list(pieces))
        for total, piece in zip(out, pieces, strict=True):
            total.add_(piece)
        return out

    return add
