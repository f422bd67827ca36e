"""Muon for the matrices inside a model, AdamW for the rest, as one optimizer.

Muon moves a matrix by its momentum with all singular values brought near one (Jordan et al. 2024,
"Muon: an optimizer for hidden layers in neural networks"). torch.optim.Muon is that, for matrices
alone. As its authors do, embeddings, positions, the output layer (tied or not) and whatever has not
two axes get AdamW; kernels of convolutions as well, which torch's Muon does not take. Which tensor
is what is told by what modules do (:mod:`hessian_tools.blocks.kinds`), not by names.

Muon's rate is adjusted as in "Muon is Scalable for LLM Training" (Liu et al., arXiv 2502.16982),
so that its steps are as long as AdamW's: lr 0.2 sqrt(max(r, c)). One swept rate then serves both.

Letters: r rows, c columns.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.blocks.survey import Survey
from hessian_tools.optimizers.stepping import Closure

_NOT_INSIDE = ("embedding", "tied", "position", "output", "class token")  # kinds
MATCHED = "match_rms_adamw"


class Together(torch.optim.Optimizer):
    """Several optimizers of disjoint parameters, stepped together.

    Their groups, each with its part's name under ``optimizer``, and their state are this one's, so
    that schedulers, ``state_dict`` and whoever reads state see one optimizer.

    Args:
        parts: by name.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        self._parts = dict(parts)
        groups = [
            group | {"optimizer": name}
            for name, part in parts.items()
            for group in part.param_groups
        ]
        super().__init__(groups, {})

    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step of all; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's; ``optimizer`` says whose it is, and all of that one's settings are needed."""
        name = param_group.get("optimizer")
        if name not in self._parts:
            raise ValueError(f"optimizer is {name!r}; one of {', '.join(self._parts)} is needed")
        super().add_param_group(param_group)
        self._share()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Hands the parts this optimizer's own groups and state, not copies."""
        for name, part in self._parts.items():
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["optimizer"] == name]


def muon_with_adamw(
    model: nn.Module,
    lr: float = 3.16e-3,
    *,
    momentum: float = 0.95,
    adam_lr: float | None = None,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    adjust_lr_fn: str = MATCHED,
) -> Together:
    """Muon, with AdamW for what Muon is not for.

    Args:
        model: its trainable parameters.
        lr: of Muon.
        momentum, nesterov, adjust_lr_fn: of torch.optim.Muon.
        adam_lr: of AdamW; default ``lr``.
        adam_betas, adam_eps: of AdamW.
        weight_decay: of both, decoupled.

    Raises:
        ValueError: a model without a matrix for Muon; what torch's two refuse.
    """
    matrices, rest = _parted(model)
    if not matrices:
        raise ValueError(
            "model has no trainable matrix for Muon (of two axes, neither embedding nor output "
            "layer); take 'adamw'"
        )
    parts: dict[str, torch.optim.Optimizer] = {}
    parts["muon"] = torch.optim.Muon(
        matrices,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adjust_lr_fn=adjust_lr_fn,
    )
    if rest:
        parts["adamw"] = torch.optim.AdamW(
            rest,
            lr=lr if adam_lr is None else adam_lr,
            betas=adam_betas,
            eps=adam_eps,
            weight_decay=weight_decay,
        )
    return Together(parts)


def _parted(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Muon's, and the others."""
    survey = Survey(model)
    kinds = {site.name: survey.kinds[site.name] for site in survey.sites if len(site.shape) == 2}
    inside = {name for name, kind in kinds.items() if kind not in _NOT_INSIDE}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if name in inside]
    return matrices, [p for name, p in trained if name not in inside]
