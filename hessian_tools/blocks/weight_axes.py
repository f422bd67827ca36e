"""Which axis of a weight is its output, for modules of unknown class: experts' 3-D tensors, routers, own linear layers.

Told by behaviour, never by names: feature i of the result reaches slice i of an output axis alone; where feature i of
the input is zero, so is the derivative by slice i of an input axis. The module runs on random weights of its own
shapes; itself it stays as it is.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

FEATURE = 1  # whose slices are looked for


def output_axes(module: nn.Module) -> dict[str, int]:
    """{name of one of the module's own tensors of two or three axes: its output axis}, those that could be told.

    The first axis of a tensor of three axes is taken to be that of the experts.
    """
    own = dict(module.named_parameters(recurse=False))
    weights = {
        name: p for name, p in own.items() if p.ndim in (2, 3) and min(p.shape[-2:]) > FEATURE + 1
    }
    if not weights or len(own) < sum(1 for _ in module.parameters()):
        return {}  # a module with others inside computes more than a product
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng([]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        widths = dict.fromkeys(size for p in weights.values() for size in p.shape[-2:])
        for width in widths:
            for arguments in _arguments(module, weights, width):
                with suppress(
                    Exception
                ):  # a foreign forward may fail in any way on input that it does not expect
                    found = _told(module, weights, *arguments)
                    if found:
                        return found
    return {}


def _arguments(
    module: nn.Module, weights: dict[str, nn.Parameter], width: int
) -> Iterator[tuple[Tensor, ...]]:
    """Random tokens (T, width), alone and with a routing (index (T, 1), weight (T, 1)) of two tokens an expert."""
    like = next(iter(weights.values()))
    experts = max((p.shape[0] for p in weights.values() if p.ndim == 3), default=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * experts, width, generator=generator).to(like)
    yield (x,)
    index = torch.arange(2 * experts, device=like.device)[:, None] % experts
    yield x, index, torch.ones_like(x[:, :1])


def _told(
    module: nn.Module, weights: dict[str, nn.Parameter], x: Tensor, *routing: Any
) -> dict[str, int]:
    generator = torch.Generator().manual_seed(1)
    trial = {
        name: (torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
        .to(p)
        .requires_grad_()
        for name, p in module.named_parameters()
    }

    def slices(x: Tensor, feature: int | None) -> dict[str, list[Tensor]]:
        """For every axis of every weight, which of its slices the result (or its one feature) depends on."""
        result = torch.func.functional_call(module, trial, (x, *routing))
        while not isinstance(result, Tensor):
            result = result[0]
        scalar = (result if feature is None else result[..., feature]).square().sum()
        gradients = torch.autograd.grad(
            scalar, [trial[name] for name in weights], materialize_grads=True
        )
        pairs = zip(weights, gradients, strict=True)
        return {
            name: [g.movedim(axis, 0).flatten(1).any(1) for axis in range(g.ndim)]
            for name, g in pairs
        }

    without = x.clone()
    without[:, FEATURE] = 0
    written, read = slices(x, FEATURE), slices(without, None)
    found = {}
    for name, p in weights.items():
        features = range(p.ndim - 2, p.ndim)
        writes = [a for a in features if written[name][a].nonzero().flatten().tolist() == [FEATURE]]
        reads = [a for a in features if (~read[name][a]).nonzero().flatten().tolist() == [FEATURE]]
        outputs = writes or [a for a in features if reads and a not in reads]
        if len(outputs) == 1:
            found[name] = outputs[0]
    return found
