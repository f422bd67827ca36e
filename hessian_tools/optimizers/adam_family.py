"""The family of Adam over a partition by name: each a choice of blocks and of what adapts.

"Deconstructing What Makes a Good Optimizer for Language Models" (Zhao et al., arXiv 2407.07972)
studies Adalayer and its relatives, at betas (0.9, 0.95), eps 1e-15 and no weight decay. Adam-mini's
own (Zhang et al., arXiv 2406.16793, package 1.1.1) are betas (0.9, 0.999) and eps 1e-8.

The last layer and the norms are told by what modules do (:mod:`hessian_tools.blocks.kinds`), never
by a name or a size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hessian_tools.blocks.param_groups import ParamGroup, param_groups
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition as partition_of
from hessian_tools.blocks.survey import Survey
from hessian_tools.optimizers.blockwise_adam import BlockwiseAdam

STUDIED: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-15}
LAST = ("output", "tied", "output bias")  # kinds of the last layer
NORM = "norm"
ADAPTIVE_LR = 3.16e-3  # of the last layer and the norms beside SGD, as published
FROZEN_AFTER = 1000

Options = Any  # keyword arguments of BlockwiseAdam


def adam(model: nn.Module, lr: float, **options: Options) -> BlockwiseAdam:
    """Adam: every entry a block. With ``weight_decay`` AdamW, which decays apart from the step."""
    return _over("element", model, lr, options)


def adam_mini(
    model: nn.Module,
    lr: float,
    partition: Partition | None = None,
    **options: Options,
) -> BlockwiseAdam:
    """Adam-mini on ``partition``, by default Algorithm 3 by structure ("adam_mini")."""
    return BlockwiseAdam(model, partition or partition_of(model, "adam_mini"), lr=lr, **options)


def adalayer(model: nn.Module, lr: float, **options: Options) -> BlockwiseAdam:
    """Adalayer: one second moment a tensor."""
    return _over("adalayer", model, lr, STUDIED | options)


def adalayer_star(model: nn.Module, lr: float, **options: Options) -> BlockwiseAdam:
    """Adalayer*: query, key and value apart, and one second moment a logit in the last layer."""
    return _over("adalayer_star", model, lr, STUDIED | options)


def sgd_adalayer(
    model: nn.Module,
    lr: float,
    *,
    adaptive_lr: float = ADAPTIVE_LR,
    norms: bool = True,
    **options: Options,
) -> BlockwiseAdam:
    """SGD with an averaged gradient; Adalayer* on the last layer and, with ``norms``, the norms.

    The two parts have rates of their own, ``lr`` and ``adaptive_lr``.
    """
    groups = _star_groups(model)
    adapted = _adapted(model, norms)
    for group in groups:
        group["adapt"] = bool(adapted.intersection(group["names"]))
        group["lr"] = adaptive_lr if group["adapt"] else lr
    return BlockwiseAdam(groups, lr=lr, **(STUDIED | options))


def frozen_adalayer(
    model: nn.Module,
    lr: float,
    *,
    frozen_after: int = FROZEN_AFTER,
    **options: Options,
) -> BlockwiseAdam:
    """Adalayer* whose second moments are found in ``frozen_after`` steps at rest and then stay.

    Those of the last layer and the norms go on, as averages. Until then nothing moves.
    """
    groups = _star_groups(model)
    adapted = _adapted(model, norms=True)
    for group in groups:
        is_adapted = bool(adapted.intersection(group["names"]))
        group["frozen_after"] = None if is_adapted else frozen_after
        group["held_until"] = frozen_after
    return BlockwiseAdam(groups, lr=lr, **(STUDIED | options))


def _over(
    preset: str,
    model: nn.Module,
    lr: float,
    options: dict[str, Options],
) -> BlockwiseAdam:
    return BlockwiseAdam(model, partition_of(model, preset), lr=lr, **options)


def _star_groups(model: nn.Module) -> list[ParamGroup]:
    return param_groups(model, partition_of(model, "adalayer_star"))


def _adapted(model: nn.Module, norms: bool) -> set[str]:
    """Names of the last layer's parameters, and of the norms'."""
    survey = Survey(model)
    kinds = (*LAST, NORM) if norms else LAST
    return {site.name for site in survey.sites if survey.kinds[site.name] in kinds}


Make = Callable[..., BlockwiseAdam]
PRESETS: dict[str, Make] = {
    "adam_by_blocks": adam,
    "adam_mini": adam_mini,
    "adalayer": adalayer,
    "adalayer_star": adalayer_star,
    "sgd_adalayer": sgd_adalayer,
    "sgd_adalayer_last": partial(sgd_adalayer, norms=False),
    "frozen_adalayer": frozen_adalayer,
}
