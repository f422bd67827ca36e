"""Rules from torch itself: ``torch.vmap`` for linear operations, ``torch.func.jvp`` for others."""

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.graph import Node, Untraceable, arguments, name_of
from hessian_tools.curvature.tangent.program import Tangents, Values

# linear in the first argument; of the second only the shape is read
_FIRST_ONLY = ("avg_pool2d_backward", "_adaptive_avg_pool2d_backward")


def by_vmap(builder: Builder, node: Node) -> None:
    """An operation linear in its one moving argument, applied to the tangent of every probe.

    ``node`` is the operation, or picks one of its results.
    """
    source, index = arguments(node) if node.target is getitem else (node, None)
    moving = [argument for argument in source.all_input_nodes if builder.moves(argument)]
    if name_of(source) in _FIRST_ONLY:
        moving = [argument for argument in moving if argument is source.args[0]]
        if not moving:
            return
    if len(moving) != 1:
        raise Untraceable(
            f"no rule for {source.target} with {len(moving)} differentiable arguments"
        )
    (argument,) = moving
    others = [other for other in source.all_input_nodes if other is not argument]
    operation = _operation(source)

    def call(moved: Tensor, *values: Tensor) -> Tensor:
        known = dict(zip(others, values, strict=True))

        def single(tangent: Tensor) -> Tensor:
            result = operation(known | {argument: tangent})
            return result if index is None else result[index]

        return torch.vmap(single)(moved)

    builder.linear(node, argument, call, others)


def by_jvp(builder: Builder, node: Node) -> None:
    """Any operation with one result, by its forward derivative in the arguments that move."""
    moving = [argument for argument in node.all_input_nodes if builder.moves(argument)]
    others = [argument for argument in node.all_input_nodes if argument not in moving]
    inputs = [*moving, *others]
    operation = _operation(node)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        known = dict(zip(inputs, values, strict=True))
        live = {a: t for a, t in zip(moving, tangents, strict=True) if t is not None}
        primals = tuple(known[argument] for argument in live)

        def function(*moved: Tensor) -> Tensor:
            return operation(known | dict(zip(live, moved, strict=True)))

        def derivative(*directions: Tensor) -> Tensor:
            return torch.func.jvp(function, primals, directions)[1]

        return torch.vmap(derivative)(*live.values())

    builder.jointly(node, moving, inputs, call)


def _operation(node: Node) -> Callable[[Mapping[Node, Tensor]], Any]:  # Any: what ATen returns
    """The operation of ``node`` as a function of the values of its arguments."""
    # read now: a node that nothing needs loses its arguments
    op = node.target
    args = node.args
    kwargs = node.kwargs
    assert callable(op)

    def operation(values: Mapping[Node, Tensor]) -> Any:
        return op(*map_arg(args, values.__getitem__), **map_arg(kwargs, values.__getitem__))

    return operation
