"""The gradient of a Problem's loss on one batch as a flat graph of ATen operations.

One pass of the model with fake tensors (no memory, no arithmetic) records forward and backward
together. Composite operations are replaced on the way
(:mod:`hessian_tools.curvature.tangent.decompositions`), and operations in place by ordinary ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hessian_tools.curvature.tangent.decompositions import decompositions
from hessian_tools.problem.batches import Batch, tensors_of, with_tensors
from hessian_tools.problem.problem import Problem

Node = fx.Node
_ATEN = torch.ops.aten


class Untraceable(Exception):
    """The gradient cannot be written as such a graph, or its graph cannot be differentiated.

    Products must then be computed by double backward.
    """


# ------------------------------------------------------------------------------ reading a node


def arguments(node: Node) -> tuple[Any, ...]:  # Any: values, numbers, lists, as the schema has them
    """The positional arguments of an operation."""
    return node.args


def keywords(node: Node) -> dict[str, Any]:  # Any: as above
    """All arguments of an ATen operation by their names in its schema, defaults filled in."""
    schema = operation_of(node)._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    positional = dict(zip(defaults, node.args, strict=False))
    return defaults | positional | node.kwargs


def value_of(node: Node) -> Tensor:
    """The fake tensor that stands for the value of ``node``: shape, dtype, device, no memory."""
    value: Tensor = node.meta["val"]
    return value


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(value_of(node).shape)


def values_of(node: Node) -> list[Tensor]:
    """All fake tensors among the results of ``node``, which may be one or several or none."""
    value = node.meta.get("val")
    results = value if isinstance(value, tuple | list) else [value]
    return [result for result in results if isinstance(result, Tensor)]


def storage_of(value: Tensor) -> int:
    """The same number for all tensors that share their memory."""
    return value.untyped_storage()._cdata


def name_of(node: Node) -> str:
    """The operation's name in ATen, without its overload: "mm" for aten.mm.default."""
    return operation_of(node)._opname


def operation_of(node: Node) -> OpOverload:
    """The ATen operation; every other node is picked out before this is asked."""
    assert isinstance(node.target, OpOverload)
    return node.target


# --------------------------------------------------------------------------------------- tracing


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` can give it other parameters."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.model
        self._loss_fn = problem.loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def traced_gradient(problem: Problem, batch: Batch) -> fx.Graph:
    """A graph from the parameters and the batch's tensors to the gradients.

    Inputs are the parameters in ``problem.parameters``' order, then the tensors of ``batch``.
    Outputs are the gradients, None where the loss does not depend on a parameter. Shapes and dtypes
    are in each node's ``meta["val"]``, the values of "get_attr" nodes in ``meta["constant"]``.

    Raises:
        Untraceable: with the reason.
    """
    try:
        traced = _trace(problem, batch)
    except Exception as error:
        # a model may do anything; double backward then shows what is really wrong
        first_line = str(error).strip().partition("\n")[0]
        raise Untraceable(f"{type(error).__name__}: {first_line[:160]}") from error
    graph = traced.graph
    # inputs and outputs one after the other, not as they were nested
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.find_nodes(op="get_attr"):
        node.meta["constant"] = getattr(traced, node.target)
    if any(_depends_on_values(value) for node in graph.nodes for value in values_of(node)):
        raise Untraceable("a tensor's shape depends on the values of others")
    _make_functional(graph)
    graph.eliminate_dead_code()
    return graph


def _depends_on_values(value: Tensor) -> bool:
    """Whether a shape is known only once the data is (boolean indexing, nonzero, unique)."""
    return any(isinstance(length, torch.SymInt) for length in value.shape)


def _trace(problem: Problem, batch: Batch) -> fx.GraphModule:
    loss = _Loss(problem)
    names = [f"model.{name}" for name in problem.parameters]

    def gradient(
        parameters: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        state = dict(zip(names, parameters, strict=True))
        inputs = (with_tensors(batch, tensors),)
        value = functional_call(loss, state, inputs, tie_weights=True)
        return torch.autograd.grad(value, parameters, allow_unused=True)

    tracer = make_fx(
        gradient,
        decompositions(),  # type: ignore[arg-type]  # torch types its own tables by a base class
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    with problem.evaluating(), torch.enable_grad():
        return tracer(list(problem.parameters.values()), tensors_of(batch))


# --------------------------------------------------------------------------- operations in place


def _make_functional(graph: fx.Graph) -> None:
    """Operations in place become ordinary ones; later readers of what was written read the result.

    Only where no other view of the written memory is read later: a write through a view would have
    to be followed into its base.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        op = node.target
        if not isinstance(op, OpOverload) or not op._schema.is_mutable:
            continue
        ordinary = _ordinary_form(op)
        if ordinary is None or _is_seen_through_another(node, order):
            raise Untraceable(f"{op} writes into memory that others see")
        written = node.args[0]
        node.target = ordinary
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)


def _ordinary_form(op: OpOverload) -> OpOverload | None:
    """add for add_, and so on; None where there is none of the same signature."""
    name = op._opname
    if not name.endswith("_"):
        return None
    packet = getattr(_ATEN, name.removesuffix("_"), None)
    return getattr(packet, op._overloadname, None)


def _is_seen_through_another(
    node: Node,
    order: dict[Node, int],
) -> bool:
    """Whether the memory that ``node`` writes is read later through an earlier value."""
    written = node.args[0]
    memory = _memory(node)
    if memory is None:
        return False
    for other in order:
        is_earlier = order[other] < order[node] and other is not written
        read_later = any(order[user] > order[node] for user in other.users)
        if is_earlier and read_later and _memory(other) == memory:
            return True
    return False


def _memory(node: Node) -> int | None:
    value = node.meta.get("val")
    return storage_of(value) if isinstance(value, Tensor) else None
