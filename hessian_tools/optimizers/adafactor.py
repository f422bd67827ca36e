"""Adafactor with momentum, as "Deconstructing What Makes a Good Optimizer" studies it.

For a matrix W, (r, c), with gradient G at step t = 1, 2, ...:

    M <- b1 M + (1 - b1) G
    R <- b2 R + (1 - b2) (mean of G^2 along each row)         (r,)
    C <- b2 C + (1 - b2) (mean of G^2 along each column)      (c,)
    V  = R C' / mean(R)
    W <- (1 - lr wd) W - lr M / (1 - b1^t) / (sqrt(V) / sqrt(1 - b2^t) + eps)

It is Adam with a second moment of rank one (Zhao et al., arXiv 2407.07972; the factors
are those of Shazeer & Stern, arXiv 1804.04235). A tensor of fewer than two axes has
one number, v <- b2 v + (1 - b2) mean(g^2); one of more is viewed as (first axis, all others).

It is not ``torch.optim.Adafactor``, nor that of transformers or pytorch_optimizer: these clip
updates, let b2 grow, make lr relative to the weights, and have no momentum by default.

Letters: r rows, c columns, t steps.
"""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.optimizers.stepping import (
    State,
    Stepping,
    as_matrix,
    gradient_of,
    no_steps,
    wide,
)


class Adafactor(Stepping):
    """Adafactor as studied.

    State of each tensor: ``step``, ``exp_avg``, and ``row`` and ``column`` or, with fewer than two
    axes, ``exp_avg_sq``.

    Args:
        params: parameters or groups.
        lr: published: 3.16e-3, as Adam's.
        betas: (b1, b2), each in [0, 1).
        eps: added outside of the root.
        weight_decay: wd, decoupled.

    Raises:
        ValueError: a number out of range.
        RuntimeError: from ``step``, for a sparse or complex gradient.
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

    def update(self, parameters: list[Tensor], group: ParamGroup) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        states = [self._state_of(p) for p in parameters]
        gradients = [gradient_of(p) for p in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_([state["exp_avg"] for state in states], gradients, 1 - beta1)
        for state, gradient in zip(states, gradients, strict=True):
            _follow(state, gradient, 1 - beta2)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for p, state in zip(parameters, states, strict=True):
            rate = lr / (1 - beta1 ** int(state["step"]))
            move = state["exp_avg"] / _denominator(state, group, p.shape)
            p.add_(move, alpha=-rate)

    @torch.no_grad()
    def denominators(self) -> dict[Tensor, Tensor]:
        """By parameter, what its steps are divided by, for every entry: P of the preconditioner.

        Raises:
            ValueError: before the first step of one.
        """
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    raise no_steps(p)
                found[p] = _denominator(self.state[p], group, p.shape).expand(p.shape)
        return found

    def _state_of(self, p: Tensor) -> State:
        state: State = self.state[p]
        if state:
            return state
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(p, dtype=wide(p))
        if p.ndim < 2:
            state["exp_avg_sq"] = p.new_zeros((), dtype=wide(p))
            return state
        rows, columns = as_matrix(p).shape
        state["row"] = p.new_zeros(rows, dtype=wide(p))
        state["column"] = p.new_zeros(columns, dtype=wide(p))
        return state


def _follow(state: State, gradient: Tensor, towards: float) -> None:
    """The second moments after a gradient."""
    squares = gradient.square()
    if gradient.ndim < 2:
        state["exp_avg_sq"].lerp_(squares.mean(), towards)
        return
    matrix = as_matrix(squares)
    state["row"].lerp_(matrix.mean(1), towards)
    state["column"].lerp_(matrix.mean(0), towards)


def _denominator(state: State, group: ParamGroup, shape: torch.Size) -> Tensor:
    """sqrt(V) over its correction, plus eps; of ``shape``, or one number."""
    _, beta2 = group["betas"]
    correction = math.sqrt(1 - beta2 ** int(state["step"]))
    second = state["exp_avg_sq"] if len(shape) < 2 else _rank_one(state).reshape(shape)
    return second.sqrt().div_(correction).add_(group["eps"])


def _rank_one(state: State) -> Tensor:
    """V, (r, c)."""
    row, column = state["row"], state["column"]
    # where no gradient has come yet, all of it is zero
    mean = row.mean().clamp(min=torch.finfo(row.dtype).tiny)
    return torch.outer(row / mean, column)
