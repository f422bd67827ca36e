"""A configuration: a small model, plain losses, data, and what the package is given of it.

A builder decorated with :func:`configuration` returns a :class:`Setting`; importing this folder
fills ``CONFIGURATIONS``. Libraries are imported inside builders, so that names are known without
them. Sizes: at most about 20 thousand variables, so that each is a second or a few on one core.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Builder = Callable[[], "Setting"]


@dataclass(frozen=True)
class Setting:
    """What is tried. The referee reads the first four, the package the first three and the rest."""

    model: nn.Module
    loss: Loss  # plain PyTorch: the mean loss of a batch
    batches: list[Any]
    counts: list[float]  # what each batch's loss is a mean over
    given: Loss | None = None  # the loss that the package is given, where it is another object
    options: dict[str, Any] = field(default_factory=dict)  # of ht.Problem
    plain: Callable[[nn.Module], nn.Module] | None = None  # the referee's copy; default deepcopy
    prepare: Callable[[nn.Module], object] | None = None  # the referee's copy made ready
    refusal: str = ""  # a word of the refusal that is right here
    accuracy: str = "float32"  # of what the model computes inside
    redirected: bool = True  # the referee turns casts to float32 inside the model to float64

    @property
    def batch_stats(self) -> bool:
        return bool(self.options.get("batch_stats", False))


NOISE = 0.1
CONFIGURATIONS: dict[str, Builder] = {}


def configuration(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder under ``name``, GROUP/WHAT."""

    def register(builder: Builder) -> Builder:
        assert name not in CONFIGURATIONS, name
        CONFIGURATIONS[name] = builder
        return builder

    return register


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Of (inputs, targets); classes lie along the last axis of the output."""
    inputs, targets = batch
    outputs = model(inputs)
    logits = getattr(outputs, "logits", outputs)
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """What a model of transformers computes by itself."""
    return model(**batch).loss


def vectors(
    sizes: tuple[int, ...] = (9, 5), features: int = 6, classes: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Labelled vectors, in batches of different sizes."""
    return [(torch.randn(n, features), torch.randint(classes, (n,))) for n in sizes]


def images(
    sizes: tuple[int, ...] = (3, 2), side: int = 16, channels: int = 3, classes: int = 3
) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, channels, side, side), torch.randint(classes, (n,))) for n in sizes]


def tokens(
    sizes: tuple[int, ...] = (3, 2), context: int = 6, vocabulary: int = 20
) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randint(vocabulary, (n, context)), torch.randint(vocabulary, (n, context)))
        for n in sizes
    ]


def lengths(batches: list[Any]) -> list[float]:
    """Examples of (inputs, targets): all targets."""
    return [float(targets.numel()) for _, targets in batches]


def only(model: nn.Module, *names: str) -> nn.Module:
    """``model`` with nothing trainable but the parameters whose names start so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    return model


def moved_from_zero(model: nn.Module) -> None:
    """Adds noise to every tensor whose entries are all equal (zeros and ones, as models start).

    At such points LayerNorm may divide by nothing and ReLU may sit on its kink, where there is no
    second derivative to compare.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1:
            values = parameter.data
            if bool((values == values.flatten()[0]).all()):
                values.add_(torch.randn_like(values), alpha=NOISE)


def batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield module
