"""The rule for elementwise operations: df(x, y) = f_x dx + f_y dy, coefficients multiplied out.

The tangents of the arguments are combinations themselves
(:mod:`hessian_tools.curvature.tangent.forms`), so a chain of elementwise operations stays one
combination of the tangents at its beginning.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.forms import Coefficient, Form
from hessian_tools.curvature.tangent.graph import (
    Node,
    Untraceable,
    arguments,
    name_of,
    shape_of,
    value_of,
)


def elementwise(builder: Builder, node: Node) -> None:
    form: Form = {}
    for index, argument in enumerate(node.args):
        if not builder.moves(argument):
            continue
        outer = _derivative(builder, node, index)
        for tangent, inner in builder.form_of(argument).items():
            term = _times(builder, outer, inner, node)
            if tangent in form:
                term = _plus(builder, form[tangent], term, node)
            form[tangent] = term
    if builder.moving(node.kwargs.values()):
        raise Untraceable(f"{node.target} has a differentiable keyword")
    builder.combine(node, form)


def _derivative(
    builder: Builder,
    node: Node,
    index: int,
) -> Coefficient:
    """d node / d args[index]: a number where it is one, else a constant computed by autograd."""
    name = name_of(node)
    args = arguments(node)
    if name in ("add", "sub", "rsub"):
        alpha = node.kwargs.get("alpha", 1)
        assert isinstance(alpha, int | float)
        # a + alpha b, a - alpha b, b - alpha a
        slopes = {
            "add": (1, alpha),
            "sub": (1, -alpha),
            "rsub": (-alpha, 1),
        }
        return Coefficient(float(slopes[name][index]))
    if name == "neg":
        return Coefficient(-1.0)
    if name == "mul":
        other = args[1 - index]
        if isinstance(other, Node):
            return Coefficient(1.0, other)
        return Coefficient(float(other))
    by_a_number = name == "div" and not isinstance(args[1], Node)
    if by_a_number and not node.kwargs:  # a keyword asks for rounding
        return Coefficient(1.0 / float(args[1]))
    if name.endswith("_backward") and index == 0:
        # linear in the gradient it is given, so any values do: those at hand need no backward pass
        given, *others = args
        at_hand = next((other for other in others if _is_like(other, given)), given)
        args = (at_hand, *others)
    call = (node.target, index, args, dict(node.kwargs))
    values = builder.constant(_derivative_values, call, node)
    return Coefficient(1.0, values)


def _is_like(argument: object, node: Node) -> bool:
    """Whether it is a value of the node's shape and dtype."""
    if not isinstance(argument, Node):
        return False
    same_shape = shape_of(argument) == shape_of(node)
    return same_shape and value_of(argument).dtype == value_of(node).dtype


def _derivative_values(
    op: Callable[..., Tensor],
    index: int,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Tensor:
    """Derivative of an elementwise operation in one argument, in the result's shape."""
    with torch.enable_grad():
        shapes = [a.shape for a in args if isinstance(a, Tensor)]
        shape = torch.broadcast_shapes(*shapes)
        given = args[index]
        assert isinstance(given, Tensor)
        # in the result's shape, so that the gradient of the sum is each entry's derivative
        argument = given.expand(shape).detach().requires_grad_()
        result = op(*args[:index], argument, *args[index + 1 :], **kwargs)
        if not result.requires_grad:  # as of a comparison or a sign
            return torch.zeros_like(argument)
        (derivative,) = torch.autograd.grad(result, argument, torch.ones_like(result))
        return derivative


def _times(
    builder: Builder,
    outer: Coefficient,
    inner: Coefficient,
    node: Node,
) -> Coefficient:
    factor = outer.factor * inner.factor
    if outer.node is None:
        return Coefficient(factor, inner.node)
    if inner.node is None:
        return Coefficient(factor, outer.node)
    product = builder.constant_product(outer.node, inner.node, node)
    return Coefficient(factor, product)


def _plus(
    builder: Builder,
    one: Coefficient,
    two: Coefficient,
    node: Node,
) -> Coefficient:
    if one.node is two.node:
        return Coefficient(one.factor + two.factor, one.node)
    shapes = [() if c.node is None else shape_of(c.node) for c in (one, two)]
    shape = torch.broadcast_shapes(*shapes)
    terms = (one.factor, one.node, two.factor, two.node)
    total = builder.constant(_weighted_sum, terms, node, shape)
    return Coefficient(1.0, total)


def _weighted_sum(
    factor: float,
    value: Tensor | None,
    other_factor: float,
    other: Tensor | None,
) -> Tensor | float:
    """factor * value + other_factor * other, a value 1 where it is None."""
    one = factor if value is None else factor * value
    return one + (other_factor if other is None else other_factor * other)
