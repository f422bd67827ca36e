"""Muon for matrices, AdamW for the rest, in one optimizer.

Muon orthogonalises the momentum of a matrix (Jordan et al. 2024). torch.optim.Muon takes matrices
alone; as its authors do, embeddings, the output layer and tensors of fewer than two axes get AdamW.
Kernels of convolutions, which torch's does not take, get AdamW as well.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.blocks.survey import Survey

Closure = Callable[[], Tensor | float]
_APART = ("embedding", "tied", "position", "output")  # kinds of matrices that Muon is not for


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW, stepped together; each group says which it is by
    ``optimizer``.

    Args:
        model: its matrices inside layers go to Muon.
        lr: of Muon.
        adam_lr: of AdamW.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: of both, decoupled.

    Raises:
        ValueError: a model without a matrix for Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        adam_lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        matrices, rest = _parted(model)
        if not matrices:
            raise ValueError(
                "the model has no matrix that Muon is for (of two axes, neither embedding nor "
                "output layer); take adamw"
            )
        muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._parts: dict[str, torch.optim.Optimizer] = {"muon": muon}
        if rest:
            self._parts["adamw"] = torch.optim.AdamW(
                rest, lr=adam_lr, betas=betas, weight_decay=weight_decay
            )
        groups = []
        for name, part in self._parts.items():
            for group in part.param_groups:
                group["optimizer"] = name
                groups.append(group)
        super().__init__(groups, {})
        self._share()

    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step of both; returns what ``closure`` does."""
        loss = None if closure is None else closure()
        for part in self._parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of both, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From :meth:`state_dict`."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._share()

    def _share(self) -> None:
        """Groups and state are the parts' own, so that schedulers and readers see them."""
        self.param_groups = [g for part in self._parts.values() for g in part.param_groups]
        self.state.clear()
        for part in self._parts.values():
            part.state = _Seen(self.state, part.state)  # type: ignore[assignment]


class _Seen(dict[Tensor, Any]):
    """State of a part, which the whole sees as well; made for a tensor when it is asked for."""

    def __init__(self, whole: dict[Tensor, Any], own: dict[Tensor, Any]) -> None:
        super().__init__(own)
        self._whole = whole
        whole.update(own)

    def __missing__(self, key: Tensor) -> dict[str, Any]:
        made: dict[str, Any] = {}
        self[key] = self._whole[key] = made
        return made


def _parted(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    survey = Survey(model)
    named = dict(model.named_parameters())
    matrices = [
        site.name
        for site in survey.sites
        if len(site.shape) == 2 and survey.kinds[site.name] not in _APART
    ]
    rest = [name for name, p in named.items() if p.requires_grad and name not in set(matrices)]
    return [named[name] for name in matrices], [named[name] for name in rest]
