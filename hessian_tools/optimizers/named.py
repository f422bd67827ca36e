"""The registry: optimizers by name, each with its published rate and the grid that it is tuned on.

Rates, grids and defaults are those of Zhao et al., Deconstructing What Makes a Good Optimizer
(arXiv 2407.07972).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_BETAS = (0.9, 0.95)
_EPS = 1e-15


@dataclass(frozen=True)
class Entry:
    """One optimizer: how it is made, its published rate, and a half-decade grid, ascending."""

    build: Callable[..., torch.optim.Optimizer]
    lr: float
    grid: tuple[float, ...]


def _half_decades(lowest: int, highest: int) -> tuple[float, ...]:
    """From 10^lowest to 10^highest."""
    return tuple(10 ** (half / 2) for half in range(2 * lowest, 2 * highest + 1))


def _sgd(model: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum)


def _adam(model: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr, betas=(momentum, _BETAS[1]), eps=_EPS)


def _adamw(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr,
        betas=(momentum, _BETAS[1]),
        eps=_EPS,
        weight_decay=weight_decay,
    )


OPTIMIZERS = {
    "sgd": Entry(_sgd, lr=0.1, grid=_half_decades(-3, 1)),
    "adam": Entry(_adam, lr=10**-2.5, grid=_half_decades(-4, 0)),
    "adamw": Entry(_adamw, lr=10**-2.5, grid=_half_decades(-4, 0)),
}


def make(name: str, model: nn.Module, lr: float, **options: object) -> torch.optim.Optimizer:
    """The optimizer ``name`` of all parameters of ``model``.

    Raises:
        ValueError: an unknown name.
        TypeError: an option that this optimizer does not have.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not known; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name].build(model, lr, **options)
