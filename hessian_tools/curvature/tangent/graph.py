"""The gradient of a Problem's loss on one batch as a flat graph of ATen operations, ready to be linearised.

One pass of the model with fake tensors (no memory, no arithmetic) records forward and backward together. Composite
operations that are awkward to differentiate once more (normalisations, losses, softmax' backward) are replaced by sums
and elementwise operations on the way; operations in place by their ordinary forms.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hessian_tools.problem.batches import tensors_of, with_tensors
from hessian_tools.problem.problem import Problem

_ATEN = torch.ops.aten
# kept whole: linearised.py has a better rule for them than for their pieces
_KEPT = ("_softmax", "_log_softmax", "gelu", "gelu_backward", "embedding_dense_backward")
_REPLACED = (
    "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
    "native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "cudnn_batch_norm_backward", "_softmax_backward_data", "_log_softmax_backward_data",
    "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward", "t", "addmm", "baddbmm",
    "mse_loss", "mse_loss_backward",
)  # fmt: skip


class Untraceable(Exception):
    """The gradient cannot be written as such a graph; products must be computed by double backward."""


class _Loss(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self._loss_fn = problem.model, problem.loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn(self.model, batch)


def traced_gradient(problem: Problem, batch: Any) -> fx.Graph:
    """A graph from (parameters in ``problem.parameters``' order, tensors of ``batch``) to the gradients, None where
    the loss does not depend on a parameter. Shapes and dtypes are in each node's ``meta["val"]``.

    Raises:
        Untraceable: with the reason.
    """
    loss, names = _Loss(problem), list(problem.parameters)

    def gradient(
        parameters: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        state = {f"model.{name}": p for name, p in zip(names, parameters, strict=True)}
        value = functional_call(loss, state, (with_tensors(batch, tensors),), tie_weights=True)
        return torch.autograd.grad(value, parameters, allow_unused=True)

    try:
        with problem.evaluating(), torch.enable_grad():
            traced = make_fx(
                gradient, _decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True
            )(list(problem.parameters.values()), tensors_of(batch))
    except (
        Exception
    ) as error:  # a model may do anything; double backward then shows what is really wrong
        raise Untraceable(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        ) from error
    graph = traced.graph
    graph.set_codegen(
        fx.graph.CodeGen()
    )  # inputs and outputs one after the other, not as they were nested
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["constant"] = getattr(traced, node.target)
    _make_functional(graph)
    graph.eliminate_dead_code()
    return graph


def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    packets = [getattr(_ATEN, name) for name in _REPLACED if hasattr(_ATEN, name)]
    table.update(get_decompositions(packets))
    for name in _KEPT:
        packet = getattr(_ATEN, name)
        for overload in packet.overloads():
            table.pop(getattr(packet, overload), None)
    return table | {
        _ATEN.var_mean.correction: _var_mean,
        _ATEN.var.correction: lambda *a, **k: _var_mean(*a, **k)[0],
        _ATEN.convolution.default: _convolution,
        _ATEN.convolution_backward.default: _convolution_backward,
    }


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim)) if dim is None or len(dim) == 0 else [d % x.ndim for d in dim]
    number = math.prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).sum(dims, keepdim=keepdim) / max(
        number - (1 if correction is None else correction), 0
    )
    return variance, mean if keepdim else mean.squeeze(dims)


def _seen_taps(
    x: Tensor, weight: Tensor, geometry: Sequence[Any]
) -> tuple[list[int], list[int]] | None:
    """First and last + 1 of the kernel's taps that a convolution with a single output position holds against its input
    (the others only ever see padding), by axis; None for all other convolutions.
    """
    stride, padding, dilation, transposed, _, groups = geometry
    sizes, kernel = x.shape[2:], weight.shape[2:]
    if transposed or groups != 1 or any(d != 1 for d in dilation):
        return None
    if any((n + 2 * p - k) // s for n, p, k, s in zip(sizes, padding, kernel, stride, strict=True)):
        return None
    first = list(padding)
    last = [min(k, p + n) for n, p, k in zip(sizes, padding, kernel, strict=True)]
    whole = all(
        p + n <= k for n, p, k in zip(sizes, padding, kernel, strict=True)
    )  # else some input is seen by no tap
    return (first, last) if whole and all(a < b for a, b in zip(first, last, strict=True)) else None


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Any:
    """With a single output position it is a matrix product, without the multiplications by padding."""
    if (taps := _seen_taps(x, weight, geometry)) is None:
        return NotImplemented
    out = x.flatten(1) @ _seen(weight, *taps).T
    out = out if bias is None else out + bias
    return out.view(*out.shape, *[1] * (x.ndim - 2))


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *geometry: Any
) -> Any:
    *shape, mask = geometry
    if (taps := _seen_taps(x, weight, shape)) is None:
        return NotImplemented
    flat = gradient.flatten(1)
    to_input = (flat @ _seen(weight, *taps)).view(x.shape) if mask[0] else None
    to_weight = None
    if mask[1]:
        to_weight = (flat.T @ x.flatten(1)).view(*weight.shape[:2], *x.shape[2:])
        ends = zip(*taps, weight.shape[2:], strict=True)
        to_weight = nn.functional.pad(
            to_weight, [n for a, b, k in reversed([*ends]) for n in (a, k - b)]
        )
    return to_input, to_weight, flat.sum(0) if mask[2] else None


def _seen(weight: Tensor, first: Sequence[int], last: Sequence[int]) -> Tensor:
    for axis, (a, b) in enumerate(zip(first, last, strict=True), 2):
        weight = weight.narrow(axis, a, b - a)
    return weight.flatten(1)


def _make_functional(graph: fx.Graph) -> None:
    """Operations in place become ordinary ones; later readers of what was written read the result instead.

    Only where the written tensor is nobody's view: writing through a view would have to be followed into its base.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        if not schema.is_mutable:
            continue
        name, written = node.target._opname, node.args[0]
        functional = getattr(_ATEN, name.removesuffix("_"), None)
        storage = (
            node.meta["val"].untyped_storage()._cdata
            if isinstance(node.meta.get("val"), Tensor)
            else None
        )
        aliases = [
            other for other in graph.nodes
            if other is not node and other is not written and isinstance(other.meta.get("val"), Tensor)
            and other.meta["val"].untyped_storage()._cdata == storage
            and any(order[user] > order[node] for user in other.users)
            and order.get(other, 0) < order[node]
        ]  # fmt: skip
        overload = node.target._overloadname
        if (
            not name.endswith("_")
            or functional is None
            or aliases
            or not hasattr(functional, overload)
        ):
            raise Untraceable(f"{node.target} writes into memory that others see")
        node.target = getattr(functional, overload)
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
