"""Rules: how the tangent of one operation's result follows from the tangents of its arguments.

A rule is ``rule(linearisation, node)``, which adds steps for ``node``; to teach the package another operation, write
one and enter it in ``RULES``. Elementwise operations need none, nor those that torch itself differentiates forward.

Letters: k probes; "moved" is a tangent, (k, *shape), None where it is zero.
"""

import math
from collections.abc import Callable, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.graph import Untraceable

if TYPE_CHECKING:
    from hessian_tools.curvature.tangent.linearize import Linearisation

_ATEN = torch.ops.aten
Node = Any  # fx.Node, whose arguments have too many types to be of use


def _matrix_product(program: "Linearisation", node: Node) -> None:
    left, right = node.args
    n, p = left.meta["val"].shape
    q = right.meta["val"].shape[1]

    def call(k: int, tangents: Sequence[Tensor | None], values: list[Any]) -> Tensor:
        (moved_left, moved_right), (a, b) = tangents, values
        out = None if moved_right is None else torch.bmm(a.expand(k, n, p), moved_right)
        if moved_left is None:
            assert out is not None
            return out
        if moved_left.is_contiguous():  # one large product
            rows = moved_left.view(k * n, p)
            if out is None:
                return torch.mm(rows, b).view(k, n, q)
            flat = out.view(k * n, q)
            return torch.addmm(flat, rows, b, out=flat).view(
                k, n, q
            )  # into itself; not by addmm_, which none counts
        shared = b.expand(k, p, q)
        return (
            torch.bmm(moved_left, shared)
            if out is None
            else torch.baddbmm(out, moved_left, shared, out=out)
        )

    program.bilinear(node, (left, right), (left, right), call)


def _batched_product(program: "Linearisation", node: Node) -> None:
    left, right = node.args
    shape = tuple(node.meta["val"].shape)

    def call(k: int, tangents: Sequence[Tensor | None], values: list[Any]) -> Tensor:
        (moved_left, moved_right), (a, b) = tangents, values
        out = a.new_empty(k, *shape)
        for i in range(k):  # the constant operand is shared: no copies of it for every probe
            if moved_right is not None:
                torch.bmm(a, moved_right[i], out=out[i])
                if moved_left is not None:
                    torch.baddbmm(out[i], moved_left[i], b, out=out[i])
            elif moved_left is not None:
                torch.bmm(moved_left[i], b, out=out[i])
        return out

    program.bilinear(node, (left, right), (left, right), call)


def _convolution(program: "Linearisation", node: Node) -> None:
    x, weight, bias, *geometry = node.args

    def call(k: int, tangents: Sequence[Tensor | None], values: list[Any]) -> Tensor:
        (moved, moved_weight, moved_bias), (image, kernel) = tangents, values
        out = None
        if moved is not None:
            out = torch.convolution(moved.flatten(0, 1), kernel, None, *geometry).unflatten(
                0, (k, -1)
            )
        if moved_weight is not None:
            each = [torch.convolution(image, moved_weight[i], None, *geometry) for i in range(k)]
            out = torch.stack(each) if out is None else _added_each(out, each)
        if moved_bias is not None:
            rows = moved_bias.view(k, 1, -1, *[1] * (image.ndim - 2))
            out = rows.expand(k, *node.meta["val"].shape) if out is None else out.add_(rows)
        assert out is not None
        return out

    program.bilinear(node, (x, weight, bias), (x, weight), call)


def _convolution_gradient(program: "Linearisation", node: Node, source: Node, index: int) -> None:
    """Gradient of a convolution with respect to its input (0), weight (1) or bias (2)."""
    gradient, x, weight, _, *geometry = source.args
    geometry = geometry[:-1]
    if index == 2:
        dims = [1, *range(3, gradient.meta["val"].ndim + 1)]
        program.linear(node, gradient, lambda k, t, c: t[0].sum(dims))
        return
    mask = [index == 0, index == 1, False]

    def backward(g: Tensor, image: Tensor, kernel: Tensor) -> Tensor:
        return _ATEN.convolution_backward(g, image, kernel, None, *geometry, mask)[index]

    def call(k: int, tangents: Sequence[Tensor | None], values: list[Any]) -> Tensor:
        (moved, other), (g, image, kernel) = tangents, values
        each: list[Tensor] = []
        if moved is not None and index == 0:  # shapes of the input are all that is read of it
            shape = (k * image.shape[0], *image.shape[1:])
            whole = backward(
                moved.flatten(0, 1), image.new_empty(1).expand(shape), kernel
            ).unflatten(0, (k, -1))
            return (
                whole
                if other is None
                else _added_each(whole, [backward(g, image, other[i]) for i in range(k)])
            )
        if moved is not None:
            each = [backward(moved[i], image, kernel) for i in range(k)]
        if other is not None:
            more = [
                backward(g, other[i], kernel) if index else backward(g, image, other[i])
                for i in range(k)
            ]
            each = [a.add_(b) for a, b in zip(each, more, strict=True)] if each else more
        return torch.stack(each)

    program.bilinear(node, (gradient, x if index else weight), (gradient, x, weight), call)


def _added_each(total: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    for i, piece in enumerate(pieces):
        total[i].add_(piece)
    return total


def _max_pool(program: "Linearisation", node: Node, source: Node, index: int) -> None:
    indices = program.insert(getitem, (source, 1), node)
    shape = tuple(node.meta["val"].shape)

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        places = values[0].flatten(-2).expand(k, *shape[:-2], -1)
        return tangents[0].flatten(-2).gather(-1, places).view(k, *shape)

    program.linear(node, source.args[0], call, [indices])


def _max_pool_gradient(program: "Linearisation", node: Node) -> None:
    gradient, indices, shape = node.args[0], node.args[-1], tuple(node.meta["val"].shape)

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        moved = tangents[0].flatten(-2)
        out = moved.new_zeros(k, *shape[:-2], shape[-2] * shape[-1])
        return out.scatter_add_(-1, values[0].flatten(-2).expand_as(moved), moved).view(k, *shape)

    program.linear(node, gradient, call, [indices])


def _softmax(program: "Linearisation", node: Node) -> None:
    dim = node.args[1] % node.meta["val"].ndim + 1

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        scaled = tangents[0] * values[0]
        return scaled.addcmul_(values[0], scaled.sum(dim, keepdim=True), value=-1)

    program.linear(node, node.args[0], call, [node])


def _log_softmax(program: "Linearisation", node: Node) -> None:
    dim = node.args[1] % node.meta["val"].ndim + 1
    probabilities = program.insert(_ATEN.exp.default, (node,), node)

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        return tangents[0] - (tangents[0] * values[0]).sum(dim, keepdim=True)

    program.linear(node, node.args[0], call, [probabilities])


def _embedding(program: "Linearisation", node: Node) -> None:
    weight, indices = node.args[:2]
    shape = tuple(node.meta["val"].shape)

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        return tangents[0].index_select(1, values[0].flatten()).view(k, *shape)

    program.linear(node, weight, call, [indices])


def _embedding_gradient(program: "Linearisation", node: Node) -> None:
    gradient, indices, _, padding, by_frequency = node.args
    if by_frequency:
        program.mapped_linear(node)
        return
    shape = tuple(node.meta["val"].shape)

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        places, rows = values[0].flatten(), tangents[0].reshape(k, -1, shape[1])
        if padding >= 0:
            rows = rows * (places != padding)[:, None]
        out = rows.new_zeros(k, *shape)
        for i in range(k):
            out[i].index_add_(0, places, rows[i])
        return out

    program.linear(node, gradient, call, [indices])


def _permute(program: "Linearisation", node: Node) -> None:
    axes = [d % len(node.args[1]) + 1 for d in node.args[1]]
    program.linear(node, node.args[0], lambda k, t, c: t[0].permute(0, *axes), view=True)


def _transpose(program: "Linearisation", node: Node) -> None:
    one, two = (d % node.meta["val"].ndim + 1 for d in node.args[1:])
    program.linear(node, node.args[0], lambda k, t, c: t[0].transpose(one, two), view=True)


def _expand(program: "Linearisation", node: Node) -> None:
    shape = tuple(node.meta["val"].shape)
    before = tuple(node.args[0].meta["val"].shape)
    aligned = (*[1] * (len(shape) - len(before)), *before)
    program.linear(
        node, node.args[0], lambda k, t, c: t[0].reshape(k, *aligned).expand(k, *shape), view=True
    )


def _slice_scatter(program: "Linearisation", node: Node) -> None:
    into, piece = node.args[:2]
    given = list(node.args[2:])
    dim, *between = given + [0, None, None, 1][len(given) :]
    place = [slice(None)] * (dim % node.meta["val"].ndim + 1) + [slice(*between)]
    active = [argument in program.forms for argument in (into, piece)]
    shape, like = tuple(node.meta["val"].shape), node.meta["val"]

    def call(k: int, tangents: list[Tensor | None], values: list[Any]) -> Tensor:
        given = iter(tangents)
        moved, moved_piece = (next(given) if present else None for present in active)
        out = (
            torch.zeros(k, *shape, dtype=like.dtype, device=like.device)
            if moved is None
            else moved.clone()
        )
        out[tuple(place)] = 0 if moved_piece is None else moved_piece
        return out

    program.several(
        node, [a for a, present in zip((into, piece), active, strict=True) if present], call
    )


def _strided(program: "Linearisation", node: Node) -> None:
    """Only where it is a reshape: strides of a value say nothing about those of its tangent."""
    value, source = node.meta["val"], node.args[0].meta["val"]
    if not (value.is_contiguous() and source.is_contiguous() and value.numel() == source.numel()):
        raise Untraceable(f"no rule for {node.target}")
    shape = tuple(value.shape)
    program.linear(node, node.args[0], lambda k, t, c: t[0].reshape(k, *shape), view=True)


def _reduction(program: "Linearisation", node: Node) -> None:
    ndim, divisor = node.args[0].meta["val"].ndim, 1
    dims = node.args[1] if len(node.args) > 1 and node.args[1] is not None else []
    axes = sorted(d % ndim for d in ([dims] if isinstance(dims, int) else dims)) or list(
        range(ndim)
    )
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if node.target._opname == "mean":
        divisor = math.prod(node.args[0].meta["val"].shape[d] for d in axes)
    shifted, dtype = [d + 1 for d in axes], node.meta["val"].dtype

    def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
        total = (
            tangents[0].sum(shifted, keepdim=keep, dtype=dtype)
            if shifted
            else tangents[0].to(dtype)
        )
        return total if divisor == 1 else total / divisor

    program.linear(node, node.args[0], call)


def _copy(program: "Linearisation", node: Node) -> None:
    shape, dtype = tuple(node.meta["val"].shape), node.meta["val"].dtype
    source = node.args[1]
    aligned = (*[1] * (len(shape) - source.meta["val"].ndim), *source.meta["val"].shape)
    if source in program.forms:
        program.linear(
            node, source, lambda k, t, c: t[0].reshape(k, *aligned).expand(k, *shape).to(dtype)
        )


def _cat(program: "Linearisation", node: Node) -> None:
    pieces = [
        piece for piece in node.args[0] if piece.meta["val"].shape != (0,)
    ]  # an empty cache, which cat ignores
    dim = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].ndim + 1
    active = [i for i, piece in enumerate(pieces) if piece in program.forms]
    shapes = [tuple(piece.meta["val"].shape) for piece in pieces]
    dtype, device = node.meta["val"].dtype, node.meta["val"].device

    def call(k: int, tangents: list[Tensor | None], values: list[Any]) -> Tensor:
        given = dict(zip(active, tangents, strict=True))
        whole = []
        for i, shape in enumerate(shapes):
            moved = given.get(i)
            whole.append(
                torch.zeros(1, dtype=dtype, device=device).expand(k, *shape)
                if moved is None
                else moved
            )
        return torch.cat(whole, dim)

    program.several(node, [pieces[i] for i in active], call)


RULES: dict[str, Callable[["Linearisation", Node], None]] = {
    "mm": _matrix_product, "bmm": _batched_product, "convolution": _convolution, "_softmax": _softmax,
    "_log_softmax": _log_softmax, "embedding": _embedding, "embedding_dense_backward": _embedding_gradient,
    "permute": _permute, "transpose": _transpose, "expand": _expand, "sum": _reduction, "mean": _reduction,
    "cat": _cat, "copy": _copy, "as_strided": _strided, "slice_scatter": _slice_scatter,
    "max_pool2d_with_indices_backward": _max_pool_gradient,
}  # fmt: skip
# operations with several results, each differentiated as it is picked: rule(linearisation, node, source, index)
PICKED: dict[str, Callable[["Linearisation", Node, Node, int], None]] = {
    "convolution_backward": _convolution_gradient, "max_pool2d_with_indices": _max_pool,
}  # fmt: skip
