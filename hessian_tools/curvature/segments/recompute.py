"""Models in segments: repeated layers, attention by blocks of queries, cross-entropy by chunks.

What is inside a segment is computed again instead of kept
(:mod:`hessian_tools.curvature.segments.segment`). The last two of the three make second derivatives
linear in the context's length in memory, where plain attention's are quadratic
(:mod:`hessian_tools.curvature.segments.streamed`).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import nn

from hessian_tools.curvature.segments.fake_problem import FakeProblem
from hessian_tools.curvature.segments.segment import segment
from hessian_tools.curvature.segments.streamed import attention, cross_entropy
from hessian_tools.problem.evaluation import without_cache
from hessian_tools.problem.problem import Problem


@dataclass(frozen=True)
class Segments:
    """What is computed in segments; nothing by default."""

    layers: bool = False  # each of two or more siblings of one class in a ModuleList or Sequential
    queries: int = 0  # queries in a block of scaled_dot_product_attention; 0: all at once
    logits: int = 0  # of a chunk of cross_entropy's rows, approximately; 0: all at once

    def __bool__(self) -> bool:
        return self.layers or self.queries > 0 or self.logits > 0

    def __str__(self) -> str:
        parts: list[str] = []
        if self.layers:
            parts.append("layers")
        if self.queries > 0:
            parts.append(f"attention ({self.queries} queries at a time)")
        if self.logits > 0:
            parts.append(f"cross-entropy ({self.logits:,} logits at a time)")
        return ", ".join(parts) or "none"


NONE = Segments()
# In float32 the scores of 128 queries and 1,024 keys are 0.5 MiB a head, the logits 16 MiB.
STREAMED = Segments(queries=128, logits=1 << 22)
LAYERED = Segments(layers=True, queries=128, logits=1 << 22)


@contextlib.contextmanager
def recomputing(
    problem: Problem | FakeProblem,
    segments: Segments = NONE,
    live: Collection[str] | None = None,
) -> Iterator[None]:
    """``problem.evaluating()`` in segments; passes over what is recorded inside belong inside, too.

    ``live``: names of the only parameters to require grad; autograd then keeps nothing that only
    the others would need. Everything is put back on leaving, also after an exception.
    """
    with contextlib.ExitStack() as stack:
        for name, parameter in problem.parameters.items():
            if live is not None and name not in live:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
        stack.enter_context(problem.evaluating())
        if segments.layers:
            # a layer that runs again would meet its own keys there
            stack.enter_context(without_cache(problem.model))
        stack.enter_context(applied(segments, problem.model))
        yield


@contextlib.contextmanager
def applied(segments: Segments, model: nn.Module) -> Iterator[None]:
    """``model`` computes in segments; everything is put back on leaving, also after an exception.

    Attention and cross-entropy are replaced where modules and libraries find them, in
    ``torch.nn.functional``. The backward passes of what is recorded inside must run inside as well.
    """
    layers = repeated_layers(model) if segments.layers else []
    # A layer may have a forward of its own, not only its class's.
    forwards = [vars(layer).get("forward") for layer in layers]
    whole_attention = F.scaled_dot_product_attention
    whole_cross_entropy = F.cross_entropy
    try:
        for layer in layers:
            layer.forward = _in_segment(layer)
        if segments.queries:
            F.scaled_dot_product_attention = partial(attention, whole_attention, segments.queries)
        if segments.logits:
            F.cross_entropy = partial(cross_entropy, whole_cross_entropy, segments.logits)
        yield
    finally:
        F.scaled_dot_product_attention = whole_attention
        F.cross_entropy = whole_cross_entropy
        for layer, forward in zip(layers, forwards, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with children that have a sibling of their class.

    Siblings are those in one ModuleList or Sequential.
    """
    layers: list[nn.Module] = []
    for child in model.children():
        if isinstance(model, nn.ModuleList | nn.Sequential) and _is_repeated(child, model):
            layers.append(child)
        else:
            layers += repeated_layers(child)
    return list(dict.fromkeys(layers))


def _is_repeated(child: nn.Module, parent: nn.Module) -> bool:
    def has_children(module: nn.Module) -> bool:
        return next(module.children(), None) is not None

    alike = [m for m in parent.children() if type(m) is type(child) and has_children(m)]
    return len(alike) > 1 and child in alike


def _in_segment(layer: nn.Module) -> Callable[..., object]:
    forward = layer.forward

    def recomputed(*args: object, **kwargs: object) -> object:
        live = [p for p in layer.parameters() if p.requires_grad]
        return segment(forward, *args, parameters=live, **kwargs)

    return recomputed
