"""The registry: optimizers by name, each with its source, its published rate and its grid.

Grids are half-decades, those of Zhao et al., Deconstructing What Makes a Good Optimizer for
Language Models (arXiv 2407.07972), where it has them: what a sweep begins with and goes beyond
where the best is at an edge. ``momentum`` is b1 of an optimizer that has two.

Signum, Lion and SOAP are those of the library pytorch_optimizer, which equal the papers'; it comes
with ``pip install hessian_tools[training]``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.optimizers import adam_family
from hessian_tools.optimizers.adafactor import Adafactor
from hessian_tools.optimizers.blockwise_sgd import BlockwiseSGD
from hessian_tools.optimizers.muon import MuonWithAdamW
from hessian_tools.optimizers.shampoo import Shampoo
from hessian_tools.problem.problem import Problem

Build = Callable[..., torch.optim.Optimizer]
BETA2 = 0.95
EPS = 1e-15
ZHAO = "arXiv 2407.07972"


@dataclass(frozen=True)
class Entry:
    """One optimizer: how it is made, its published rate, and a half-decade grid, ascending."""

    build: Build  # (model, lr, **options)
    line: str
    source: str
    lr: float
    grid: tuple[float, ...]
    extra: str = ""  # of the package that has to be installed for it
    needs: str = ""  # besides a model


def make(
    name: str,
    model: nn.Module,
    lr: float | None = None,
    **options: object,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` of all trainable parameters of ``model``.

    Args:
        name: one of OPTIMIZERS.
        lr: default the published one.
        options: ``momentum``, ``weight_decay`` and the optimizer's own.

    Raises:
        ValueError: an unknown name; what the optimizer itself refuses.
        TypeError: an option that it does not have.
        ImportError: it needs a library that is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not known; there are {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[name]
    return entry.build(model, entry.lr if lr is None else lr, **options)


def half_decades(lowest: int, highest: int) -> tuple[float, ...]:
    """From 10^lowest to 10^highest."""
    return tuple(10 ** (half / 2) for half in range(2 * lowest, 2 * highest + 1))


# ---------------------------------------------------------------------------------- torch's own


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _sgd(
    model: nn.Module,
    lr: float,
    momentum: float = 0.98,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        _trained(model), lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )


def _nesterov(model: nn.Module, lr: float, **options: float) -> torch.optim.Optimizer:
    return _sgd(model, lr, nesterov=True, **options)


def _adamw(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    beta2: float = BETA2,
    eps: float = EPS,
) -> torch.optim.Optimizer:
    betas = (momentum, beta2)
    return torch.optim.AdamW(_trained(model), lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _adagrad(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(_trained(model), lr, weight_decay=weight_decay)


# ----------------------------------------------------------------------------- of another library


def _library() -> ModuleType:
    try:
        return importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise ImportError(
            "signum, lion and soap are those of the package pytorch-optimizer, which is not "
            "installed: pip install 'hessian_tools[training]'"
        ) from error


def _lion(
    model: nn.Module,
    lr: float,
    momentum: float = 0.95,
    beta2: float = 0.98,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _library().Lion(
        _trained(model), lr=lr, betas=(momentum, beta2), weight_decay=weight_decay
    )
    return made


def _signum(
    model: nn.Module,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    # Lion with equal betas takes the sign of the new average, which is Signum
    return _lion(model, lr, momentum, momentum, weight_decay)


def _soap(
    model: nn.Module,
    lr: float,
    momentum: float = 0.95,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    frequency: int = 10,
) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _library().SOAP(
        _trained(model),
        lr=lr,
        betas=(momentum, beta2),
        weight_decay=weight_decay,
        precondition_frequency=frequency,
    )
    return made


# ------------------------------------------------------------------------------------- our own


def _muon(
    model: nn.Module,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    adam_lr: float = 3e-3,
) -> torch.optim.Optimizer:
    return MuonWithAdamW(model, lr, adam_lr, momentum, weight_decay=weight_decay)


def _adafactor(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    beta2: float = BETA2,
) -> torch.optim.Optimizer:
    return Adafactor(_trained(model), lr, (momentum, beta2), weight_decay=weight_decay)


def _shampoo(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    beta2: float = BETA2,
    **options: float,
) -> torch.optim.Optimizer:
    return Shampoo(_trained(model), lr, (momentum, beta2), **options)  # type: ignore[arg-type]


def _shampoo2(model: nn.Module, lr: float, **options: float) -> torch.optim.Optimizer:
    return _shampoo(model, lr, power=0.5, **options)


def _blockwise_sgd(
    model: nn.Module,
    lr: float,
    *,
    curvature: Problem | CurvatureOperator | None = None,
    partition: Partition | None = None,
    **options: float,
) -> torch.optim.Optimizer:
    if curvature is None or partition is None:
        raise ValueError(
            "blockwise_sgd measures curvature; pass curvature= (a Problem or an operator of this "
            "model) and partition="
        )
    return BlockwiseSGD(curvature, partition, lr, **options)  # type: ignore[arg-type]


def _of_family(build: Build) -> Build:
    """``momentum`` as the first of its betas."""

    def made(
        model: nn.Module,
        lr: float,
        momentum: float | None = None,
        **options: object,
    ) -> torch.optim.Optimizer:
        if momentum is not None:
            given = options.pop("betas", (0.9, BETA2))
            assert isinstance(given, tuple)
            options["betas"] = (momentum, given[1])
        return build(model, lr, **options)

    return made


_ADAPTIVE = half_decades(-4, 0)
_SIGNS = half_decades(-5, -1)
_PLAIN = half_decades(-3, 1)
MINI = "arXiv 2406.16793"

OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(_sgd, "SGD, heavy-ball momentum 0.98", ZHAO, 1.0, _PLAIN),
    "sgd_nesterov": Entry(_nesterov, "SGD with Nesterov's momentum", "torch", 1.0, _PLAIN),
    "adam": Entry(_adamw, "Adam, decoupled decay if any", ZHAO, 3.16e-3, _ADAPTIVE),
    "adamw": Entry(_adamw, "AdamW", "arXiv 1711.05101", 3.16e-3, _ADAPTIVE),
    "adagrad": Entry(_adagrad, "Adagrad", "JMLR 12, 2121", 1e-2, _ADAPTIVE),
    "muon": Entry(_muon, "Muon, AdamW for the rest", "Jordan et al. 2024", 2e-2, _ADAPTIVE),
    "signum": Entry(_signum, "sign of an averaged gradient", ZHAO, 3.16e-4, _SIGNS, "training"),
    "lion": Entry(_lion, "Lion", "arXiv 2302.06675", 3.16e-4, _SIGNS, "training"),
    "soap": Entry(
        _soap, "Adam in Shampoo's eigenbasis", "arXiv 2409.11321", 3e-3, _ADAPTIVE, "training"
    ),
    "adafactor": Entry(_adafactor, "Adafactor with momentum", ZHAO, 3.16e-3, _ADAPTIVE),
    "shampoo": Entry(_shampoo, "Shampoo, power 1/4", "arXiv 1802.09568", 3.16e-3, _ADAPTIVE),
    "shampoo2": Entry(_shampoo2, "Shampoo, power 1/2", "arXiv 2406.17748", 3.16e-3, _ADAPTIVE),
    "blockwise_sgd": Entry(
        _blockwise_sgd,
        "SGD, a measured rate a block",
        MINI,
        1.0,
        half_decades(-2, 1),
        needs="curvature and partition",
    ),
    "adam_mini": Entry(
        _of_family(adam_family.adam_mini), "Adam-mini, Algorithm 3", MINI, 3.16e-3, _ADAPTIVE
    ),
    "adalayer": Entry(
        _of_family(adam_family.adalayer), "one rate a tensor", ZHAO, 3.16e-3, _ADAPTIVE
    ),
    "adalayer_star": Entry(
        _of_family(adam_family.adalayer_star), "Adalayer, a rate a logit", ZHAO, 3.16e-3, _ADAPTIVE
    ),
    "sgd_adalayer": Entry(
        _of_family(adam_family.sgd_adalayer),
        "SGD, Adalayer on last layer and norms",
        ZHAO,
        1.0,
        _PLAIN,
    ),
    "frozen_adalayer": Entry(
        _of_family(adam_family.frozen_adalayer),
        "Adalayer*, frozen after 1000 steps",
        ZHAO,
        3.16e-3,
        _ADAPTIVE,
    ),
}
