"""Rules from torch itself: ``torch.vmap`` for linear operations, ``torch.func.jvp`` for others.

Letters: k probes.
"""

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.graph import Node, Untraceable, arguments
from hessian_tools.curvature.tangent.program import Tangents, Values


def by_vmap(builder: Builder, node: Node) -> None:
    """An operation linear in its one moving argument, or one of the results of such a one."""
    source = _source(node)
    moving = builder.moving(source.all_input_nodes)
    if len(moving) != 1:
        count = len(moving)
        raise Untraceable(f"no rule for {source.target} with {count} differentiable arguments")
    _mapped(builder, node, moving[0])


def by_vmap_of_first(builder: Builder, node: Node) -> None:
    """An operation linear in its first argument, which reads only the shape of the others."""
    first = arguments(node)[0]
    if builder.moves(first):
        _mapped(builder, node, first)


def _mapped(builder: Builder, node: Node, argument: Node) -> None:
    """The operation itself, applied to the tangent of each probe."""
    others = [other for other in _source(node).all_input_nodes if other is not argument]
    operation = _operation(node)

    def call(moved: Tensor, *values: Tensor) -> Tensor:
        known = dict(zip(others, values, strict=True))

        def of_one_probe(tangent: Tensor) -> Tensor:
            return operation(known | {argument: tangent})

        return torch.vmap(of_one_probe)(moved)

    builder.linear(node, argument, call, others)


def by_jvp(builder: Builder, node: Node) -> None:
    """Any operation with one result, by its forward derivative in the arguments that move."""
    moving = builder.moving(node.all_input_nodes)
    others = [argument for argument in node.all_input_nodes if argument not in moving]
    inputs = [*moving, *others]
    operation = _operation(node)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        known = dict(zip(inputs, values, strict=True))
        # a direction of zeros would cost as much as any other
        pairs = zip(moving, tangents, strict=True)
        live = {argument: tangent for argument, tangent in pairs if tangent is not None}
        primals = tuple(known[argument] for argument in live)

        def function(*moved: Tensor) -> Tensor:
            changed = dict(zip(live, moved, strict=True))
            return operation(known | changed)

        def derivative(*directions: Tensor) -> Tensor:
            return torch.func.jvp(function, primals, directions)[1]

        return torch.vmap(derivative)(*live.values())

    builder.jointly(node, moving, inputs, call)


def _source(node: Node) -> Node:
    """The operation whose result ``node`` is or picks."""
    if node.target is getitem:
        source: Node = arguments(node)[0]
        return source
    return node


def _operation(node: Node) -> Callable[[Mapping[Node, Tensor]], Any]:  # Any: what ATen returns
    """The value of ``node`` as a function of the values of its arguments."""
    if node.target is getitem:
        source, index = arguments(node)
        several = _operation(source)
        return lambda values: several(values)[index]
    # read now: a node that nothing needs loses its arguments
    op = node.target
    args = node.args
    kwargs = node.kwargs
    assert callable(op)

    def operation(values: Mapping[Node, Tensor]) -> Any:
        positional = map_arg(args, values.__getitem__)
        named = map_arg(kwargs, values.__getitem__)
        return op(*positional, **named)

    return operation
