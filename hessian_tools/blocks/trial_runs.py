"""What is learnt by running parts of a model: output axes of unknown modules, and tables of tokens.

Names play no part. The modules and the caller's random state stay as they are.

An output axis: feature i of the result reaches slice i of an output axis alone; where feature i of
the input is zero, so is the derivative by slice i of an input axis. A table of tokens receives the
token numbers that the model is given; tables of positions, segments or distances do not.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

FEATURE = 1  # whose slices are looked for
IDS = ((2, 0, 3, 1),)  # token numbers that are neither positions nor segments

Weights = Mapping[str, nn.Parameter]
Reached = dict[str, list[Tensor]]  # by weight, for each axis which of its slices are


class _Reached(Exception):
    """The tables have been looked up."""


def output_axes(module: nn.Module) -> dict[str, int]:
    """{name of one of the module's own tensors of two or three axes: its output axis}.

    Those that can be told, for modules of unknown class: experts' 3-D tensors, routers, a user's
    linear layers. The first axis of a tensor of three axes is taken to be that of the experts.
    """
    own = dict(module.named_parameters(recurse=False))
    weights = {
        name: p for name, p in own.items() if p.ndim in (2, 3) and min(p.shape[-2:]) > FEATURE + 1
    }
    holds_others = len(own) < sum(1 for _ in module.parameters())
    if not weights or holds_others:  # a module with others inside computes more than a product
        return {}
    widths = dict.fromkeys(size for p in weights.values() for size in p.shape[-2:])
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for width in widths:
            for arguments in _arguments(weights, width):
                with suppress(Exception):  # a foreign forward may fail in any way
                    axes = _axes(module, weights, *arguments)
                    if axes:
                        return axes
    return {}


def _arguments(weights: Weights, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Random tokens (T, width), alone and with a routing of two tokens an expert.

    The routing is an index (T, 1) and a weight (T, 1).
    """
    like = next(iter(weights.values()))
    experts = max((p.shape[0] for p in weights.values() if p.ndim == 3), default=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * experts, width, generator=generator).to(like)
    yield (x,)
    index = torch.arange(2 * experts, device=like.device)[:, None] % experts
    yield x, index, torch.ones_like(x[:, :1])


def _axes(module: nn.Module, weights: Weights, x: Tensor, *routing: Tensor) -> dict[str, int]:
    """The output axes of ``weights`` as a run on ``x`` shows them."""
    trial = _random_parameters(module)
    without = x.clone()
    without[:, FEATURE] = 0
    written = _reached(module, trial, list(weights), x, routing, feature=FEATURE)
    read = _reached(module, trial, list(weights), without, routing, feature=None)
    axes = {}
    for name, p in weights.items():
        features = (p.ndim - 2, p.ndim - 1)
        writes = [axis for axis in features if _is_feature_alone(written[name][axis])]
        reads = [axis for axis in features if _is_feature_alone(~read[name][axis])]
        if not writes and reads:
            writes = [axis for axis in features if axis not in reads]
        if len(writes) == 1:
            axes[name] = writes[0]
    return axes


def _random_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Random leaves in the shapes of the module's parameters."""
    generator = torch.Generator().manual_seed(1)
    trial = {}
    for name, p in module.named_parameters():
        entries = torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])
        trial[name] = entries.to(p).requires_grad_()
    return trial


def _reached(
    module: nn.Module,
    trial: dict[str, Tensor],
    names: Sequence[str],
    x: Tensor,
    routing: tuple[Tensor, ...],
    feature: int | None,
) -> Reached:
    """Which slices of each axis of the weights the result depends on, or its one ``feature``."""
    result: Any = torch.func.functional_call(module, trial, (x, *routing))
    while not isinstance(result, Tensor):  # a tuple, whose first part is the result
        result = result[0]
    chosen = result if feature is None else result[..., feature]
    gradients = torch.autograd.grad(
        chosen.square().sum(), [trial[name] for name in names], materialize_grads=True
    )
    return {
        name: [g.movedim(axis, 0).flatten(1).any(1) for axis in range(g.ndim)]
        for name, g in zip(names, gradients, strict=True)
    }


def _is_feature_alone(slices: Tensor) -> bool:
    return bool(slices.nonzero().flatten().tolist() == [FEATURE])


def token_tables(
    model: nn.Module,
    tables: Mapping[str, nn.Module],
    outputs: set[int],
    first: nn.Module | None,
) -> list[str]:
    """Names of those of ``tables`` (by parameter name, outside the layers) looked up by token.

    The model runs on a few token numbers up to its first layer, in evaluation mode and without
    gradients. Where that cannot be done, shapes decide: the largest table with as many rows as a
    linear layer has outputs, else the first. Tables with as many rows as one of these count as well
    (a decoder's own).

    Args:
        outputs: numbers of features of the linear layers outside the transformer layers.
        first: the first transformer layer, where the run may stop.
    """
    if not tables:
        return []
    rows = {name: table.get_parameter("weight").shape[0] for name, table in tables.items()}
    by_token = set(tables) if len(tables) == 1 else _receivers(model, tables, first)
    if not by_token:
        like_outputs = [name for name in tables if rows[name] in outputs]
        by_token = {max(like_outputs, key=rows.__getitem__, default=next(iter(tables)))}
    sizes = {rows[name] for name in by_token}
    return [name for name in tables if rows[name] in sizes]


def _receivers(
    model: nn.Module,
    tables: Mapping[str, nn.Module],
    first: nn.Module | None,
) -> set[str]:
    ids = torch.tensor(IDS, device=next(model.parameters()).device)
    received: set[str] = set()

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and torch.equal(arguments[0], ids):
                received.add(name)

        return listen

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached

    hooks = [table.register_forward_pre_hook(listener(name)) for name, table in tables.items()]
    if first is not None:
        hooks.append(first.register_forward_pre_hook(stop))
    try:
        # a foreign forward may want other arguments, after the look-up
        with _quietly(model), suppress(Exception):
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return received


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, warnings or traces in the random state."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
