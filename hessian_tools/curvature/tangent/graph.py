"""The gradient of a Problem's loss on one batch, or J' M J, as a flat graph of ATen operations.

One pass of the model with fake tensors (no memory, no arithmetic) records forward and backward
together. Composite operations are replaced on the way
(:mod:`hessian_tools.curvature.tangent.decompositions`), and operations in place by ordinary ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Trace:
    """A graph from parameters and a batch's tensors to one tensor (or None) for each parameter.

    Inputs are the parameters in ``problem.parameters``' order, if ``twins`` the same ones again,
    then the tensors of the batch. Products are the tangents of its outputs along tangents of the
    first parameters; the twins stand still. Shapes and dtypes are in each node's ``meta["val"]``,
    the values of "get_attr" nodes in ``meta["constant"]``.
    """

    graph: fx.Graph
    twins: bool


class _Asked(nn.Module):
    """What is asked of a model as a module, so that ``functional_call`` can give it parameters."""

    def __init__(self, model: nn.Module, ask: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._ask = ask

    def forward(self, batch: Batch) -> Tensor:
        return self._ask(batch)


Moving = Callable[[Problem, Tensor, Tensor, Batch], Tensor]  # see OutputMatrix.moving


def traced_gradient(problem: Problem, batch: Batch) -> Trace:
    """The gradients; their tangents are products with the Hessian.

    Raises:
        Untraceable: with the reason.
    """
    loss = _with_parameters(problem, problem.batch_loss)

    def gradient(
        parameters: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        value = loss(parameters, with_tensors(batch, tensors))
        return torch.autograd.grad(value, parameters, allow_unused=True)

    parameters = list(problem.parameters.values())
    graph = _traced(problem, gradient, parameters, tensors_of(batch))
    return Trace(graph, twins=False)


def traced_through_outputs(problem: Problem, batch: Batch, moving: Moving) -> Trace:
    """J' c, the outputs' cotangents c moving and J standing still: its tangents are J' M J v.

    ``moving(problem, outputs, fixed, batch)`` gives c; its derivative in the outputs is M.

    Raises:
        Untraceable: with the reason.
    """
    outputs = _with_parameters(problem, problem.batch_outputs)

    def products(
        parameters: Sequence[Tensor],
        twins: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        data = with_tensors(batch, tensors)
        moved = outputs(parameters, data)
        fixed = outputs(twins, data)
        cotangent = moving(problem, moved, fixed.detach(), data)
        return torch.autograd.grad(fixed, twins, cotangent, allow_unused=True)

    parameters = list(problem.parameters.values())
    twins = [p.detach().requires_grad_() for p in parameters]
    graph = _traced(problem, products, parameters, twins, tensors_of(batch))
    return Trace(graph, twins=True)


def _with_parameters(
    problem: Problem,
    ask: Callable[[Batch], Tensor],
) -> Callable[[Sequence[Tensor], Batch], Tensor]:
    """``ask`` as a function of the parameters as well."""
    module = _Asked(problem.model, ask)
    names = [f"model.{name}" for name in problem.parameters]

    def asked(parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return functional_call(module, state, (batch,), tie_weights=True)

    return asked


def _traced(
    problem: Problem,
    function: Callable[..., Sequence[Tensor | None]],
    *inputs: Sequence[Tensor],
) -> fx.Graph:
    """The graph of ``function`` of several lists of tensors."""
    try:
        traced = _trace(problem, function, inputs)
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


def _trace(
    problem: Problem,
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Sequence[Tensor]],
) -> fx.GraphModule:
    tracer = make_fx(
        function,
        decompositions(),  # type: ignore[arg-type]  # torch types its own tables by a base class
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    with problem.evaluating(), torch.enable_grad():
        return tracer(*inputs)


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
