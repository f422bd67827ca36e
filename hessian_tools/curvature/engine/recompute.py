"""Segments: parts of a model that keep only their boundary, also when they are differentiated twice.

``torch.utils.checkpoint`` saves memory in a first backward pass only: the graph of the gradient (``create_graph``)
keeps every inner tensor. Here a part y = f(x, w) is two autograd Functions, each of which keeps nothing but its inputs:

    outer: (x, w) -> y,                    its backward is one call of the inner one;
    inner: (x, w, dL/dy) -> J' dL/dy,      its backward runs f and its backward again, then differentiates that.

So a recorded graph holds x, w and dL/dy of each segment, and a product needs room for the inside of one at a time; it
costs another forward and backward pass of f (3 F against the 6 F of a probe). Inputs that no asked-for parameter lies
behind are left out of both passes, as autograd does itself.

Applied to a model in three ways (see :class:`Segments`): repeated layers, attention by blocks of queries, and
cross-entropy by chunks of rows. The last two make second derivatives linear in the context's length T in memory, where
plain attention's are quadratic. Letters: T queries, S keys, R rows (tokens), C classes.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from hessian_tools.curvature.engine.fake_problem import Imagined
from hessian_tools.problem.problem import Problem

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))


@dataclass(frozen=True)
class Segments:
    """What is computed in segments; nothing by default."""

    layers: bool = False  # each of two or more siblings of one class in a ModuleList or Sequential
    queries: int = 0  # queries in a block of scaled_dot_product_attention; 0: all at once
    logits: int = 0  # about so many logits in a chunk of cross_entropy's rows; 0: all at once

    def __bool__(self) -> bool:
        return self.layers or self.queries > 0 or self.logits > 0

    def __str__(self) -> str:
        parts = ["layers"] * self.layers + [f"attention ({self.queries} queries at a time)"] * (
            self.queries > 0
        )
        return (
            ", ".join(
                parts + [f"cross-entropy ({self.logits:,} logits at a time)"] * (self.logits > 0)
            )
            or "none"
        )


NONE = Segments()
STREAMED = Segments(queries=128, logits=1 << 22)
LAYERED = Segments(layers=True, queries=128, logits=1 << 22)


_TENSOR = object()  # stands for a tensor among leaves


class _Recipe:
    """How to run a segment again: the function, its arguments but for tensors, and the parameters it reads besides."""

    def __init__(
        self,
        function: Callable[..., Any],
        leaves: Sequence[Any],
        spec: Any,
        parameters: Sequence[Tensor],
    ):
        self.function, self.spec, self.parameters = function, spec, list(parameters)
        self.leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.result: tuple[list[Any], Any] = ([], None)  # leaves and structure of what came out

    def run(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The result's tensors."""
        args, kwargs = tree_unflatten(_filled(self.leaves, tensors), self.spec)
        leaves, structure = tree_flatten(self.function(*args, **kwargs))
        self.result = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def recorded(
        self, inputs: Sequence[Tensor], live: Collection[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Arguments as new leaves and the parameters themselves; the result's tensors, recorded between the two."""
        arguments = inputs[: len(inputs) - len(self.parameters)]
        leaves = [x.detach().requires_grad_(i in live) for i, x in enumerate(arguments)]
        return leaves + self.parameters, self.run(map(_no_leaf, leaves))  # type: ignore[arg-type]


def segment(
    function: Callable[..., Any], *args: Any, parameters: Sequence[Tensor] = (), **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)``, of which autograd keeps the arguments only, also for second derivatives.

    ``function`` must be deterministic, must not change its arguments, and must depend on no tensor that requires grad
    but those among its arguments (in nested tuples, lists and dicts as well) and ``parameters``. With an argument or
    result that is neither a tensor nor a plain value (a cache, say) it is called as it stands. What comes out can be
    differentiated twice, not a third time.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + list(parameters)
    plain = all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
    if not plain or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return function(*args, **kwargs)
    recipe = _Recipe(function, leaves, spec, parameters)
    outputs = _Outer.apply(recipe, *map(_no_leaf, tensors))
    found, structure = recipe.result
    if not all(leaf is _TENSOR or isinstance(leaf, _PLAIN) for leaf in found):
        return function(*args, **kwargs)
    return tree_unflatten(_filled(found, outputs), structure)


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        outputs = recipe.run(inputs[: len(inputs) - len(recipe.parameters)])
        ctx.mark_non_differentiable(*(y for y in outputs if not y.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted, count = _asked_for(ctx), len(ctx.saved_tensors)
        found = _Inner.apply(
            ctx.recipe, wanted, count, *ctx.saved_tensors, *map(_no_leaf, cotangents)
        )
        return (None, *_spread(found, wanted, count))


class _Inner(torch.autograd.Function):
    """J' dL/dy for the ``wanted`` of ``count`` inputs; ``tensors`` are these and dL/dy of each output (None: zero)."""

    @staticmethod
    def forward(
        ctx: Any, recipe: _Recipe, wanted: Sequence[int], count: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.recipe, ctx.wanted, ctx.count = recipe, wanted, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            leaves, outputs = recipe.recorded(tensors[:count], wanted)  # type: ignore[arg-type]
            return _gradients(outputs, [leaves[i] for i in wanted], tensors[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, wanted, count = ctx.saved_tensors, ctx.wanted, ctx.count
        needed = _asked_for(ctx)
        with torch.enable_grad():
            leaves, outputs = ctx.recipe.recorded(tensors[:count], {*wanted, *needed})
            first = [
                None if t is None else t.detach().requires_grad_(i in needed)
                for i, t in enumerate(tensors[count:], count)
            ]
            gradients = _gradients(outputs, [leaves[i] for i in wanted], first, create_graph=True)
            del outputs
            found = _gradients(gradients, [(leaves + first)[i] for i in needed], cotangents)
        return (None, None, None, *_spread(found, needed, len(tensors)))


def _gradients(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """sum of J' c over the outputs that depend on something and have a cotangent c; None for inputs without a part."""
    pairs = [
        (y, c)
        for y, c in zip(outputs, cotangents, strict=True)
        if y is not None and c is not None and y.requires_grad
    ]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True
    )


def _asked_for(ctx: Any) -> list[int]:
    """Positions among the saved tensors of those whose gradient the running backward pass uses."""
    following = iter(ctx.next_functions)  # one entry a tensor; None was none
    nodes = [None if tensor is None else next(following)[0] for tensor in ctx.saved_tensors]
    return [
        i
        for i, node in enumerate(nodes)
        if node is not None and torch._C._will_engine_execute_node(node)
    ]


def _no_leaf(tensor: Tensor | None) -> Tensor | None:
    """A view of a leaf, of which the engine tells whether it is asked for; other tensors as they are."""
    return (
        tensor.view_as(tensor)
        if tensor is not None and tensor.requires_grad and tensor.is_leaf
        else tensor
    )


def _spread(
    values: Sequence[Tensor | None], places: Sequence[int], count: int
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def _filled(leaves: Sequence[Any], tensors: Iterable[Tensor]) -> list[Any]:
    following = iter(tensors)
    return [next(following) if leaf is _TENSOR else leaf for leaf in leaves]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules, made of parts, that have a sibling of their class in a ModuleList or Sequential."""
    found: list[nn.Module] = []
    for child in model.children():
        alike = [
            m
            for m in model.children()
            if type(m) is type(child) and any(True for _ in m.children())
        ]
        if isinstance(model, nn.ModuleList | nn.Sequential) and len(alike) > 1 and child in alike:
            found.append(child)
        else:
            found += repeated_layers(child)
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def recomputing(
    problem: Problem | Imagined, segments: Segments = NONE, live: Collection[str] | None = None
) -> Iterator[None]:
    """``problem.evaluating()`` in segments; passes over what is recorded inside belong inside, too.

    ``live``: names of the only parameters to require grad; autograd then keeps nothing that only the others would need.
    Everything is put back on leaving, also after an exception.
    """
    frozen = [p for name, p in problem.parameters.items() if live is not None and name not in live]
    with contextlib.ExitStack() as stack:
        for parameter in frozen:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        if segments.layers:
            stack.enter_context(_without_cache(problem.model))
        stack.enter_context(problem.evaluating())
        stack.enter_context(applied(segments, problem.model))
        yield


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache in models of transformers: a segment that runs again would meet its own keys there."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def applied(segments: Segments, model: nn.Module) -> Iterator[None]:
    """``model`` computes in segments; everything is put back on leaving, also after an exception.

    Attention and cross-entropy are met where they are called through ``torch.nn.functional``, as modules and libraries
    do. The backward passes of what is recorded inside must run inside as well.
    """
    layers = repeated_layers(model) if segments.layers else []
    own = [(layer, layer.__dict__.get("forward")) for layer in layers]
    kept = F.scaled_dot_product_attention, F.cross_entropy
    try:
        for layer in layers:
            layer.forward = _in_segment(layer)
        if segments.queries:
            F.scaled_dot_product_attention = partial(_attention, kept[0], segments.queries)
        if segments.logits:
            F.cross_entropy = partial(_cross_entropy, kept[1], segments.logits)
        yield
    finally:
        F.scaled_dot_product_attention, F.cross_entropy = kept
        for layer, forward in own:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _in_segment(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        live = [p for p in layer.parameters() if p.requires_grad]
        return segment(forward, *args, parameters=live, **kwargs)

    return recomputed


def _attention(
    whole: Callable[..., Tensor], block: int, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention, (..., T, E) x (..., S, E) x (..., S, Ev) -> (..., T, Ev), by blocks."""
    length, keys = query.shape[-2], key.shape[-2]
    if length <= block or dropout_p > 0 or (is_causal and attn_mask is not None):
        return whole(query, key, value, attn_mask, dropout_p, is_causal, **options)

    def rows(first: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if is_causal:  # query i sees keys 0 to i
            mask = torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril(first)
        return whole(query, key, value, mask, **options)

    found = []
    for number, part in enumerate(query.split(block, dim=-2)):
        first = number * block
        seen = min(first + part.shape[-2], keys) if is_causal else keys
        cut = attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] == length
        mask = attn_mask[..., first : first + block, :] if cut else attn_mask  # type: ignore[index]
        found.append(segment(rows, first, part, key[..., :seen, :], value[..., :seen, :], mask))
    return torch.cat(found, dim=-2)


def _cross_entropy(
    whole: Callable[..., Tensor], logits: int, input: Tensor, target: Tensor, weight: Tensor | None = None,
    size_average: None = None, ignore_index: int = -100, reduce: None = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """cross_entropy of (R, C) logits and (R,) classes by chunks of rows; any other kind as it stands."""
    rows = max(1, logits // max(1, input.shape[-1]))
    plain = (
        input.ndim != 2
        or target.ndim != 1
        or target.is_floating_point()
        or weight is not None
        or label_smoothing
    )
    if (
        plain
        or size_average is not None
        or reduce is not None
        or reduction not in ("mean", "sum")
        or len(input) <= rows
    ):
        return whole(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    parts = zip(input.split(rows), target.split(rows), strict=True)
    total = torch.stack(
        [segment(whole, x, y, ignore_index=ignore_index, reduction="sum") for x, y in parts]
    ).sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total
