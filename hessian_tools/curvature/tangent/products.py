"""Rules: matrix products and convolutions, by the product rule.

Both halves of d(A B) = dA B + A dB are accumulated into one result, all probes in one call where
the constant operand is shared.

Letters: k probes; ``moved`` is a tangent, (k, *shape), None where it is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.graph import Node, arguments, shape_of, value_of
from hessian_tools.curvature.tangent.program import Tangents, Values

_ATEN = torch.ops.aten


def matrix_product(builder: Builder, node: Node) -> None:
    """d(A B) = dA B + A dB, A (n, p), B (p, q)."""
    left, right = arguments(node)
    n, p = shape_of(left)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved_left, moved_right = tangents
        a, b = values
        out = None
        if moved_right is not None:
            out = torch.bmm(a.expand(k, n, p), moved_right)
        if moved_left is not None:
            out = _add_left(moved_left, b, out)
        return _not_zero(out)

    builder.bilinear(node, (left, right), (left, right), call)


def _add_left(moved: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """out + moved @ b, into ``out`` if given, but not by addmm_, which no counter counts."""
    k, n, p = moved.shape
    q = b.shape[1]
    if moved.is_contiguous():  # one large product
        rows = moved.view(k * n, p)
        if out is None:
            return torch.mm(rows, b).view(k, n, q)
        flat = out.view(k * n, q)
        return torch.addmm(flat, rows, b, out=flat).view(k, n, q)
    shared = b.expand(k, p, q)
    if out is None:
        return torch.bmm(moved, shared)
    return torch.baddbmm(out, moved, shared, out=out)


def batched_product(builder: Builder, node: Node) -> None:
    """d(A B) = dA B + A dB for a batch of matrices."""
    left, right = arguments(node)
    shape = shape_of(node)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved_left, moved_right = tangents
        a, b = values
        out = a.new_empty(k, *shape)
        for i in range(k):  # no copies of the shared operand for every probe
            if moved_right is not None:
                torch.bmm(a, moved_right[i], out=out[i])
            if moved_left is None:
                continue
            if moved_right is None:
                torch.bmm(moved_left[i], b, out=out[i])
            else:
                torch.baddbmm(out[i], moved_left[i], b, out=out[i])
        return out

    builder.bilinear(node, (left, right), (left, right), call)


def convolution(builder: Builder, node: Node) -> None:
    """d(x * w + b) = dx * w + x * dw + db."""
    x, weight, bias, *geometry = arguments(node)
    shape = shape_of(node)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved, moved_weight, moved_bias = tangents
        image, kernel = values
        out = None
        if moved is not None:  # the probes are further images
            images = moved.flatten(0, 1)
            out = torch.convolution(images, kernel, None, *geometry).unflatten(0, (k, -1))
        if moved_weight is not None:
            each = [torch.convolution(image, moved_weight[i], None, *geometry) for i in range(k)]
            out = torch.stack(each) if out is None else _added_each(out, each)
        if moved_bias is not None:
            rows = moved_bias.view(k, 1, -1, *[1] * (image.ndim - 2))
            out = rows.expand(k, *shape) if out is None else out.add_(rows)
        return _not_zero(out)

    builder.bilinear(node, (x, weight, bias), (x, weight), call)


def convolution_gradient(builder: Builder, node: Node) -> None:
    """One of the three gradients of a convolution: to its input, its weight or its bias."""
    source, index = arguments(node)
    rule = (_gradient_to_input, _gradient_to_weight, _gradient_to_bias)[index]
    rule(builder, node, source)


def _gradient_to_input(builder: Builder, node: Node, source: Node) -> None:
    """Bilinear in the result's gradient g and the weight; of the input only the shape is read."""
    gradient, x, weight, _, *geometry, _ = arguments(source)

    def backward(g: Tensor, image: Tensor, kernel: Tensor) -> Tensor:
        mask = [True, False, False]
        return _ATEN.convolution_backward(g, image, kernel, None, *geometry, mask)[0]

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved, moved_weight = tangents
        g, image, kernel = values
        out = None
        if moved is not None:  # the probes are further images
            images = image.new_empty(1).expand(k * image.shape[0], *image.shape[1:])
            out = backward(moved.flatten(0, 1), images, kernel).unflatten(0, (k, -1))
        if moved_weight is not None:
            each = [backward(g, image, moved_weight[i]) for i in range(k)]
            out = torch.stack(each) if out is None else _added_each(out, each)
        return _not_zero(out)

    builder.bilinear(node, (gradient, weight), (gradient, x, weight), call)


def _gradient_to_weight(builder: Builder, node: Node, source: Node) -> None:
    """Bilinear in the result's gradient g and the input; of the weight only the shape is read."""
    gradient, x, weight, _, *geometry, _ = arguments(source)

    def backward(g: Tensor, image: Tensor, kernel: Tensor) -> Tensor:
        mask = [False, True, False]
        return _ATEN.convolution_backward(g, image, kernel, None, *geometry, mask)[1]

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        moved, moved_image = tangents
        g, image, kernel = values
        out = None
        if moved is not None:
            out = torch.stack([backward(moved[i], image, kernel) for i in range(k)])
        if moved_image is not None:
            each = [backward(g, moved_image[i], kernel) for i in range(k)]
            out = torch.stack(each) if out is None else _added_each(out, each)
        return _not_zero(out)

    builder.bilinear(node, (gradient, x), (gradient, x, weight), call)


def _gradient_to_bias(builder: Builder, node: Node, source: Node) -> None:
    """The sum of the result's gradient over images and positions."""
    gradient = arguments(source)[0]
    axes = [1, *range(3, value_of(gradient).ndim + 1)]
    builder.linear(node, gradient, lambda moved: moved.sum(axes))


def _added_each(total: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    for place, piece in zip(total, pieces, strict=True):
        place.add_(piece)
    return total


def _not_zero(out: Tensor | None) -> Tensor:
    assert out is not None  # a step runs only where one of its tangents is not zero
    return out
