"""Adafactor with momentum, as "Deconstructing What Makes a Good Optimizer" studies it.

For a matrix of gradients G, (r, c):

    M <- b1 M + (1 - b1) G
    R <- b2 R + (1 - b2) mean over columns of G^2,    C <- b2 C + (1 - b2) mean over rows of G^2
    V = R C' / mean(R)
    W <- W (1 - lr wd) - lr (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

(Zhao et al., arXiv 2407.07972; the factors are those of Shazeer & Stern, arXiv 1804.04235). The
momentum is an average, both corrections are made, and there is no clipping of updates, no relative
step and no growing b2: ``torch.optim.Adafactor`` and others with these names are other algorithms.
Tensors of fewer than two axes have one second moment. Those of more are viewed as (first, rest).

Letters: r rows, c columns, t steps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessian_tools.optimizers.checks import check_gradient, check_settings

Closure = Callable[[], Tensor | float]


class Adafactor(torch.optim.Optimizer):
    """Adafactor as studied. State: ``exp_avg``, and ``row`` and ``column`` or ``exp_avg_sq``.

    Args:
        params: parameters or groups.
        lr: a number; published: 3.16e-3.
        betas: (b1, b2), each in [0, 1).
        eps: added outside of the root.
        weight_decay: decoupled, wd.

    Raises:
        ValueError: a number out of range.
        RuntimeError: sparse or complex gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3.16e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_settings(group)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                check_gradient(p, "Adafactor")
                state = self._state_of(p)
                state["step"] += 1
                t = int(state["step"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                _follow(state, p.grad, 1 - beta2)
                root = _second_moment(state, p).sqrt_().div_(math.sqrt(1 - beta2**t))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] / (1 - beta1**t)
                p.addcdiv_(state["exp_avg"], root.add_(group["eps"]), value=-rate)
        return loss

    @torch.no_grad()
    def denominators(self) -> dict[Tensor, Tensor]:
        """By parameter, what its steps are divided by, for every entry."""
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    raise ValueError("the optimizer has made no step; take one first")
                state = self.state[p]
                correction = math.sqrt(1 - group["betas"][1] ** int(state["step"]))
                root = _second_moment(state, p).sqrt_().div_(correction)
                found[p] = root.add_(group["eps"]).expand_as(p)
        return found

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if state:
            return state
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p)
        if p.ndim < 2:
            state["exp_avg_sq"] = p.new_zeros(())
        else:
            state["row"] = p.new_zeros(p.shape[0])
            state["column"] = p.new_zeros(p[0].numel())
        return state


def _follow(state: dict[str, Tensor], gradient: Tensor, towards: float) -> None:
    """The second moments after a gradient."""
    squares = gradient.square()
    if "row" not in state:
        state["exp_avg_sq"].lerp_(squares.mean(), towards)
        return
    matrix = squares.flatten(1)
    state["row"].lerp_(matrix.mean(1), towards)
    state["column"].lerp_(matrix.mean(0), towards)


def _second_moment(state: dict[str, Tensor], p: Tensor) -> Tensor:
    """V in the shape of ``p``, or one number."""
    if "row" not in state:
        return state["exp_avg_sq"].clone()
    row, column = state["row"], state["column"]
    # all gradients of a tensor may vanish so far
    scale = row.mean().clamp(min=torch.finfo(row.dtype).tiny)
    return torch.outer(row / scale, column).reshape(p.shape)
