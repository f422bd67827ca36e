"""Optimizers that are compared here and nowhere else, entered beside those of the package.

Importing this module makes them known to ``hessian_tools.optimizers.make``, and so to sweeps.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hessian_tools as ht
from decoders.networks import SIZES
from hessian_tools.optimizers import Shampoo
from hessian_tools.optimizers.adam_family import adam_mini, frozen_adalayer, sgd_adalayer
from hessian_tools.optimizers.named import MINI, OPTIMIZERS, ZHAO, Entry, Request, half_decades

RESTING = 200  # steps in which the frozen Adalayer gathers; of 1,000 in the paper
SUGGESTIONS = Path(__file__).resolve().parents[2] / "results" / "decoder_suggestions"
BETAS = (0.9, 0.95)
Make = Callable[..., torch.optim.Optimizer]


def suggestion_of(size: str) -> Path:
    """What experiments/decoder_suggestions.py has left."""
    return SUGGESTIONS / f"suggestion_{size}.json"


def equal_betas(
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Adam with b2 = b1, between Adam and Signum."""
    return torch.optim.AdamW(
        model.parameters(),
        lr,
        betas=(momentum, momentum),
        eps=1e-15,
        weight_decay=weight_decay,
    )


def by_suggestion(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Adam-mini on the blocks that the checker suggested for a decoder of this size."""
    size = next(size for size, shape in SIZES.items() if shape.layers == len(model.blocks))
    return adam_mini(model, lr, ht.Partition.from_json(suggestion_of(size), model), **options)


def by_tensor(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    return adam_mini(model, lr, ht.partition(model, "tensor"), **options)


def shampoo2_short_sides(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Shampoo^2 without a factor of the vocabulary's side, as in SOAP's paper."""
    return Shampoo(model.parameters(), lr, power=0.5, trace=True, largest=1024, **options)


def _built(make: Make, **fixed: Any) -> Callable[[Request], torch.optim.Optimizer]:
    return lambda request: make(request.model, **(request.options | fixed))


def _entry(
    name: str,
    line: str,
    source: str,
    make: Make,
    lr: float = 3.16e-3,
    betas: tuple[float, ...] = BETAS,
    **fixed: Any,
) -> Entry:
    grid = half_decades(-4, 0)
    return Entry(name, line, source, lr, betas, grid, _built(make, **fixed))


_ENTRIES = (
    _entry(
        "shampoo2_short_sides",
        "Shampoo^2 with the trace; the vocabulary's side has no factor",
        "Morwani et al., arXiv 2406.17748",
        shampoo2_short_sides,
    ),
    _entry(
        "adam_equal_betas",
        "Adam with b2 = b1",
        ZHAO,
        equal_betas,
        betas=(0.95,),
    ),
    _entry(
        "sgd_adalayer_last",
        "SGD of averages; Adalayer* on the last layer alone",
        ZHAO,
        partial(sgd_adalayer, norms=False),
        lr=1.0,
    ),
    _entry(
        "frozen_adalayer_short",
        f"Adalayer* whose second moments stay after {RESTING} steps at rest",
        ZHAO,
        frozen_adalayer,
        frozen_after=RESTING,
    ),
    _entry("adam_mini_algorithm_3", "Adam-mini on Algorithm 3's blocks", MINI, adam_mini),
    _entry("adam_mini_suggested", "Adam-mini on the checker's blocks", MINI, by_suggestion),
    _entry("adam_mini_by_tensor", "Adam-mini on a block a tensor", MINI, by_tensor),
)
OPTIMIZERS.update({entry.name: entry for entry in _ENTRIES})
