"""A segment: part of a model that keeps only its boundary, also when it is differentiated twice.

``torch.utils.checkpoint`` saves memory in a first backward pass only: the graph of the gradient
(``create_graph``) keeps every inner tensor. Here a part y = f(x, w) is two autograd Functions, each
of which keeps nothing but its inputs:

    outer: (x, w) -> y,                    its backward is one call of the inner one;
    inner: (x, w, dL/dy) -> J' dL/dy,      its backward runs f and its backward again, then
                                           differentiates that.

So a recorded graph holds x, w and dL/dy of each segment, and a product needs room for the inside of
one at a time; it costs another forward and backward pass of f (3 F against the 6 F of a probe).
Inputs that no parameter asked for lies behind are left out of both passes, as autograd does itself.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Result = TypeVar("Result")
MaybeTensors = Sequence[Tensor | None]  # None: zero, or no tensor

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, type(None))
_TENSOR = object()  # stands for a tensor among leaves


def segment(
    function: Callable[..., Result],
    *args: object,
    parameters: Sequence[Tensor] = (),
    **kwargs: object,
) -> Result:
    """``function(*args, **kwargs)``, of which autograd keeps the arguments only.

    What comes out can be differentiated twice, not a third time. ``function`` must be
    deterministic, must not change its arguments, and must depend on no tensor that requires grad
    but those among its arguments (in nested tuples, lists and dicts as well) and ``parameters``.
    With an argument or result that is neither a tensor nor a plain value (a cache, say) it is
    called as it stands.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + list(parameters)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not differentiable or not _are_plain(leaves):
        return function(*args, **kwargs)
    recipe = _Recipe(function, leaves, spec, parameters)
    outputs = _Outer.apply(recipe, *map(_no_leaf, tensors))
    if not _are_plain(recipe.result_leaves):
        return function(*args, **kwargs)
    return tree_unflatten(_filled(recipe.result_leaves, outputs), recipe.result_spec)


class _Recipe:
    """How to run a segment again.

    The function, its arguments but for tensors, and the parameters that it reads besides.
    """

    result_spec: TreeSpec  # of the last run

    def __init__(
        self,
        function: Callable[..., object],
        leaves: Sequence[object],
        spec: TreeSpec,
        parameters: Sequence[Tensor],
    ) -> None:
        self.function = function
        self.leaves = _without_tensors(leaves)
        self.spec = spec
        self.parameters = list(parameters)
        self.result_leaves: list[object] = []

    def run(self, tensors: Iterable[Tensor | None]) -> list[Tensor]:
        """The result's tensors."""
        args, kwargs = tree_unflatten(_filled(self.leaves, tensors), self.spec)
        leaves, self.result_spec = tree_flatten(self.function(*args, **kwargs))
        self.result_leaves = _without_tensors(leaves)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def arguments(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors among ``inputs`` that are arguments; the parameters come last."""
        return inputs[: len(inputs) - len(self.parameters)]

    def recorded(
        self,
        inputs: Sequence[Tensor],
        live: Collection[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Arguments as new leaves and the parameters themselves; the result's tensors.

        The graph between the two is recorded, for the arguments at the positions ``live``.
        """
        leaves = [
            x.detach().requires_grad_(position in live)
            for position, x in enumerate(self.arguments(inputs))
        ]
        return leaves + self.parameters, self.run(map(_no_leaf, leaves))


class _Context(FunctionCtx):
    """What autograd hands to the Functions below, and what they keep on it."""

    recipe: _Recipe
    wanted: Sequence[int]
    count: int
    saved_tensors: tuple[Tensor, ...]
    next_functions: tuple[tuple[torch.autograd.graph.Node | None, int], ...]


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, recipe: _Recipe, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        outputs = recipe.run(recipe.arguments(inputs))
        ctx.mark_non_differentiable(*(y for y in outputs if not y.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: _Context, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = _asked_for(ctx)
        count = len(ctx.saved_tensors)
        gradients = _Inner.apply(
            ctx.recipe, wanted, count, *ctx.saved_tensors, *map(_no_leaf, cotangents)
        )
        return (None, *_spread(gradients, wanted, count))


class _Inner(torch.autograd.Function):
    """J' dL/dy for the ``wanted`` of ``count`` inputs.

    ``tensors`` are these inputs and dL/dy of each output (None: zero).
    """

    @staticmethod
    def forward(
        ctx: _Context,
        recipe: _Recipe,
        wanted: Sequence[int],
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.recipe = recipe
        ctx.wanted = wanted
        ctx.count = count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)  # type: ignore[arg-type]  # None may be saved, too
        with torch.enable_grad():
            leaves, outputs = recipe.recorded(tensors[:count], wanted)  # type: ignore[arg-type]
            return _gradients(outputs, [leaves[i] for i in wanted], tensors[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = ctx.wanted
        needed = _asked_for(ctx)
        with torch.enable_grad():
            leaves, outputs = ctx.recipe.recorded(tensors[: ctx.count], {*wanted, *needed})
            first = [
                None if t is None else t.detach().requires_grad_(position in needed)
                for position, t in enumerate(tensors[ctx.count :], ctx.count)
            ]
            gradients = _gradients(outputs, [leaves[i] for i in wanted], first, create_graph=True)
            del outputs  # the first pass is over: free what only it needs
            second = _gradients(gradients, [(leaves + first)[i] for i in needed], cotangents)
        return (None, None, None, *_spread(second, needed, len(tensors)))


def _gradients(
    outputs: MaybeTensors,
    inputs: Sequence[Tensor],
    cotangents: MaybeTensors,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """sum of J' c over the outputs that depend on something and have a cotangent c.

    None for inputs without a part in it.
    """
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


def _asked_for(ctx: _Context) -> list[int]:
    """Positions among the saved tensors of those whose gradient the running pass uses."""
    # ``needs_input_grad`` says which inputs require grad, not which this pass is about; only the
    # engine knows that, by node. A tensor has one entry among the next functions, None has none.
    following = iter(ctx.next_functions)
    nodes = [None if tensor is None else next(following)[0] for tensor in ctx.saved_tensors]
    return [
        position
        for position, node in enumerate(nodes)
        if node is not None and torch._C._will_engine_execute_node(node)
    ]


def _no_leaf(tensor: Tensor | None) -> Tensor | None:
    """A view of a leaf, other tensors as they are.

    The engine tells of no leaf whether its gradient is asked for, but it does of a view.
    """
    if tensor is not None and tensor.requires_grad and tensor.is_leaf:
        return tensor.view_as(tensor)
    return tensor


def _spread(values: MaybeTensors, places: Sequence[int], count: int) -> list[Tensor | None]:
    """A list of ``count`` with the values at their places, None elsewhere."""
    spread: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread


def _are_plain(leaves: Sequence[object]) -> bool:
    """Whether all leaves are tensors or values without a state."""
    return all(leaf is _TENSOR or isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)


def _without_tensors(leaves: Sequence[object]) -> list[object]:
    return [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _filled(leaves: Sequence[object], tensors: Iterable[Tensor | None]) -> list[object]:
    following = iter(tensors)
    return [next(following) if leaf is _TENSOR else leaf for leaf in leaves]
