"""What is learnt by running parts of a model: output axes of unknown modules, and tables of tokens.

Names play no part. The modules and the caller's random state stay as they are.

An output axis: feature i of the result reaches slice i of an output axis alone; where feature i of
the input is zero, so is the derivative by slice i of an input axis. A table of tokens receives the
token numbers that the model is given; tables of positions, segments or distances do not.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

FEATURE = 1  # of input and result, whose slices are looked for
IDS = ((2, 0, 3, 1),)  # token numbers that are neither positions nor segments

Weights = Mapping[str, nn.Parameter]
# By weight, for each of its axes: which of its slices a result depends on, (size,) bool.
Slices = dict[str, list[Tensor]]


class _Reached(Exception):
    """The tables have been looked up."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Gradients on, on the CPU, without warnings; the caller's random state stays as it is."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.random.fork_rng([]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def first_tensor(output: Any) -> Tensor:
    """What a foreign forward gives first, where it gives (nested) tuples or lists."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def output_axes(module: nn.Module) -> dict[str, int]:
    """{name of one of the module's tensors of two or three axes: its output axis}.

    For modules of unknown class: experts' 3-D tensors, routers, a user's linear layers. Tensors
    whose output axis does not show are left out. The first axis of a tensor of three axes is taken
    to be that of the experts.
    """
    weights = _weights(module)
    sizes = [size for p in weights.values() for size in p.shape[-2:]]
    with undisturbed():
        for width in dict.fromkeys(sizes):
            for arguments in _arguments(weights, width):
                # A foreign forward may fail in any way on input that it does not expect.
                with suppress(Exception):
                    axes = _axes(module, weights, *arguments)
                    if axes:
                        return axes
    return {}


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that may be weights of the one product that ``module`` computes; {} if none."""
    direct = dict(module.named_parameters(recurse=False))
    # A module with others inside computes more than a product.
    if len(direct) < sum(1 for _ in module.parameters()):
        return {}
    weights = {}
    for name, p in direct.items():
        # A single other feature would not show that FEATURE is reached alone.
        is_large_enough = min(p.shape[-2:], default=0) > FEATURE + 1
        if p.ndim in (2, 3) and is_large_enough:
            weights[name] = p
    return weights


def _arguments(weights: Weights, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Random tokens (T, width), alone and with a routing of two tokens an expert.

    The routing is an index (T, 1) and a weight (T, 1).
    """
    like = next(iter(weights.values()))
    counts = [p.shape[0] for p in weights.values() if p.ndim == 3]
    experts = max(counts, default=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * experts, width, generator=generator).to(like)
    yield (x,)
    index = torch.arange(2 * experts, device=like.device)[:, None] % experts
    yield x, index, torch.ones_like(x[:, :1])


def _axes(module: nn.Module, weights: Weights, x: Tensor, *routing: Tensor) -> dict[str, int]:
    """The output axes of ``weights`` as a run on ``x`` shows them."""
    trial = _random_parameters(module)
    result = _run(module, trial, x, routing)
    written = _slices_behind(result[..., FEATURE], trial, weights)
    without = x.clone()
    without[:, FEATURE] = 0
    read = _slices_behind(_run(module, trial, without, routing), trial, weights)
    axes = {}
    for name in weights:
        axis = _output_axis(written[name], read[name])
        if axis is not None:
            axes[name] = axis
    return axes


def _output_axis(written: list[Tensor], read: list[Tensor]) -> int | None:
    """The output axis of one weight, None if it does not show.

    For each of its axes, ``written`` says which slices are behind one feature of the result,
    ``read`` which are behind the whole result where that feature of the input is zero.
    """
    features = (len(written) - 2, len(written) - 1)
    outputs = [axis for axis in features if _is_feature_alone(written[axis])]
    inputs = [axis for axis in features if _is_feature_alone(~read[axis])]
    if not outputs and inputs:
        # Features of the result mix (a softmax over them), but the input's axis is known.
        outputs = [axis for axis in features if axis not in inputs]
    return outputs[0] if len(outputs) == 1 else None


def _random_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Random leaves in the shapes of the module's parameters."""
    generator = torch.Generator().manual_seed(1)
    trial = {}
    for name, p in module.named_parameters():
        # Of the usual size, so that no activation saturates.
        entries = torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])
        trial[name] = entries.to(p).requires_grad_()
    return trial


def _run(
    module: nn.Module,
    trial: Mapping[str, Tensor],
    x: Tensor,
    routing: tuple[Tensor, ...],
) -> Tensor:
    """The result of ``module`` with ``trial`` in place of its parameters."""
    return first_tensor(torch.func.functional_call(module, dict(trial), (x, *routing)))


def _slices_behind(result: Tensor, trial: Mapping[str, Tensor], weights: Weights) -> Slices:
    """The slices of the weights that ``result`` depends on."""
    tensors = [trial[name] for name in weights]
    gradients = torch.autograd.grad(result.square().sum(), tensors, materialize_grads=True)
    slices: Slices = {}
    for name, gradient in zip(weights, gradients, strict=True):
        by_axis = (gradient.movedim(axis, 0) for axis in range(gradient.ndim))
        slices[name] = [entries.flatten(1).any(1) for entries in by_axis]
    return slices


def _is_feature_alone(slices: Tensor) -> bool:
    numbers: list[int] = slices.nonzero().flatten().tolist()
    return numbers == [FEATURE]


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
    by_token = set(tables)
    if len(tables) > 1:
        by_token = _receivers(model, tables, first)
    if not by_token:
        like_outputs = [name for name in tables if rows[name] in outputs]
        largest = max(like_outputs, key=rows.__getitem__, default=next(iter(tables)))
        by_token = {largest}
    sizes = {rows[name] for name in by_token}
    return [name for name in tables if rows[name] in sizes]


def _receivers(
    model: nn.Module,
    tables: Mapping[str, nn.Module],
    first: nn.Module | None,
) -> set[str]:
    """Names of the tables whose argument is exactly the token numbers that the model is given."""
    ids = torch.tensor(IDS, device=next(model.parameters()).device)
    received: set[str] = set()

    def listener(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def listen(_: nn.Module, arguments: tuple[object, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and torch.equal(arguments[0], ids):
                received.add(name)

        return listen

    def stop(_: nn.Module, arguments: tuple[object, ...]) -> None:
        raise _Reached

    hooks = [table.register_forward_pre_hook(listener(name)) for name, table in tables.items()]
    if first is not None:
        hooks.append(first.register_forward_pre_hook(stop))
    try:
        # A foreign forward may want other arguments, after the look-up.
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
