"""Shampoo with power 1/4 and 1/2, with and without momentum.

For a matrix W, (r, c), with gradient G at step t = 1, 2, ...:

    L <- b2 L + (1 - b2) G G'       R <- b2 R + (1 - b2) G' G       (r, r) and (c, c)
    M <- b1 M + (1 - b1) G
    W <- (1 - lr wd) W - lr L~^-q (M / (1 - b1^t)) R~^-q

- q = 1/4: Shampoo (Gupta, Koren & Singer, arXiv 1802.09568, algorithm 1), which has sums in place
  of averages, L <- L + G G', and no momentum: ``sums``, b1 = 0.
- q = 1/2: Shampoo^2, whose L x R is, but for its size, near the best Kronecker product for the
  gradient's second moments (Morwani et al., arXiv 2406.17748).
- L~ is L / (1 - b2^t), a sum uncorrected, plus a ridge of ``damping`` times its largest
  eigenvalue. R~ likewise.
- ``trace``: L is divided by its trace before that. Then L x R has the size of the second moments,
  and q = 1/2 equals idealised Adafactor in the eigenbasis of L and R (Vyas et al., SOAP, arXiv
  2409.11321). A single factor is divided by the length of the other side: it has as many addends.
- The momentum is that of the gradient, *before* it is preconditioned. Libraries that keep momentum
  of the preconditioned gradient (pytorch_optimizer, torch_optimizer) are other methods.

Roots come from eigh in float64, at the first step and every ``frequency`` steps after it. Between,
a gradient may have parts where the roots saw none: up to damping^-q is what a side blows those up
by. With frequency = 1, that of the papers, there are none. With more, raise the ridge: on a decoder
of 3,760 parameters (60 steps on one batch, one seed) q = 1/2 at frequency 3 and 10 diverged with
1e-6, at every lr tried from 1e-3 to 1e-2, and trained with 1e-3.

A tensor of more than two axes is viewed as (first axis, all others). A side longer than ``largest``
has the identity for its factor. Tensors where both are longer, and those of fewer than two axes,
are divided by sqrt(v) + eps with v the average (sum) of g^2, corrected likewise: the diagonal of
full-matrix Adagrad, which Shampoo stands for.

Letters: r rows, c columns, t steps, q power.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.errors import NumericalError
from hessian_tools.optimizers.stepping import (
    State,
    Stepping,
    as_matrix,
    gradient_of,
    no_steps,
    wide,
)

POWERS = (0.25, 0.5)
LEFT, RIGHT = "left", "right"


class Shampoo(Stepping):
    """Shampoo.

    State of each tensor: ``step``; ``exp_avg`` where b1 > 0; ``left`` and ``right``, the factors,
    with ``left_root`` and ``right_root``, or ``exp_avg_sq``.

    Args:
        params: parameters or groups.
        lr: no rate is published that carries over; swept on Adam's grid.
        betas: (b1, b2), each in [0, 1); b1 = 0 is without momentum.
        power: q, 0.25 or 0.5.
        sums: L, R and v are sums over all steps; b2 is not used.
        trace: divide L by its trace, a single factor by the length of the other side.
        damping: the ridge, relative to a factor's largest eigenvalue.
        eps: of the diagonal that tensors without factors have.
        frequency: steps from one pair of roots to the next.
        largest: the longest side that has a factor.
        weight_decay: wd, decoupled.

    Raises:
        ValueError: a number out of range.
        RuntimeError: from ``step``, for a sparse or complex gradient.
        NumericalError: from ``step``, for a factor with NaN or inf.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3.16e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        power: float = 0.25,
        sums: bool = False,
        trace: bool = False,
        damping: float = 1e-6,
        eps: float = 1e-8,
        frequency: int = 1,
        largest: int = 2048,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "power": power,
            "sums": sums,
            "trace": trace,
            "damping": damping,
            "eps": eps,
            "frequency": frequency,
            "largest": largest,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, with its numbers checked."""
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    def update(self, parameters: list[Tensor], group: ParamGroup) -> None:
        beta1, _ = group["betas"]
        lr = float(group["lr"])
        for p in parameters:
            gradient = gradient_of(p)
            state = self._state_of(p, group)
            state["step"] += 1
            t = int(state["step"])
            _follow(state, gradient, group)
            if (t - 1) % group["frequency"] == 0:
                _take_roots(p, state, group)
            mean = gradient
            if "exp_avg" in state:
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1**t)
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            p.add_(_preconditioned(mean, state, group), alpha=-lr)

    @torch.no_grad()
    def kronecker_factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """(L~, R~) by parameter that has them, in float64: P is L~^q x R~^q.

        They are those of which roots would be taken now; an identity stands for a side without.

        Raises:
            ValueError: before the first step of a parameter.
        """
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    raise no_steps(p)
                state = self.state[p]
                if "exp_avg_sq" not in state:
                    left, right = (
                        _damped(p, state, side, group)
                        if side in state
                        else torch.eye(size, dtype=torch.float64, device=p.device)
                        for side, size in zip((LEFT, RIGHT), as_matrix(p).shape, strict=True)
                    )
                    found[p] = (left, right)
        return found

    def kronecker_power(self) -> float:
        """q, of all groups.

        Raises:
            ValueError: groups that differ in it.
        """
        powers = sorted({float(group["power"]) for group in self.param_groups})
        if len(powers) > 1:
            raise ValueError(
                f"groups have powers {powers}, and a KroneckerPreconditioner has one; make one of "
                "each group's factors"
            )
        return powers[0]

    @torch.no_grad()
    def denominators(self) -> dict[Tensor, Tensor]:
        """What steps are divided by, of the parameters without factors."""
        return {
            p: _denominator(self.state[p], group)
            for group in self.param_groups
            for p in group["params"]
            if "exp_avg_sq" in self.state.get(p, {})
        }

    def _state_of(self, p: Tensor, group: ParamGroup) -> State:
        state: State = self.state[p]
        if state:
            return state
        state["step"] = torch.zeros(())
        if group["betas"][0]:
            state["exp_avg"] = torch.zeros_like(p, dtype=wide(p))
        sides = dict(_sides(p, group["largest"]))
        for side, size in sides.items():
            state[side] = p.new_zeros(size, size, dtype=wide(p))
        if not sides:
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide(p))
        return state


def _check(group: ParamGroup) -> None:
    """Raises ValueError for what is Shampoo's own and out of range."""
    if group["power"] not in POWERS:
        raise ValueError(
            f"power is {group['power']}; 0.25 (Shampoo) or 0.5 (Shampoo^2) is needed, the exponent "
            "of each factor's inverse root"
        )
    for name in ("frequency", "largest"):
        if int(group[name]) != group[name] or group[name] < 1:
            raise ValueError(f"{name} is {group[name]}; a whole number from 1 is needed")


def _sides(p: Tensor, largest: int) -> Iterator[tuple[str, int]]:
    """The sides of a parameter that have factors, with their sizes."""
    if p.ndim < 2:
        return
    for side, size in zip((LEFT, RIGHT), as_matrix(p).shape, strict=True):
        if size <= largest:
            yield side, size


def _follow(state: State, gradient: Tensor, group: ParamGroup) -> None:
    """The factors, or the diagonal, after a gradient."""
    if "exp_avg_sq" in state:
        _gather(state["exp_avg_sq"], gradient.square(), group)
        return
    matrix = as_matrix(gradient)
    if LEFT in state:
        _gather(state[LEFT], matrix @ matrix.T, group)
    if RIGHT in state:
        _gather(state[RIGHT], matrix.T @ matrix, group)


def _gather(moment: Tensor, new: Tensor, group: ParamGroup) -> None:
    if group["sums"]:
        moment.add_(new)
    else:
        moment.lerp_(new, 1 - group["betas"][1])


def _correction(state: State, group: ParamGroup) -> float:
    """What an average that started at zero is divided by."""
    if group["sums"]:
        return 1.0
    return float(1 - group["betas"][1] ** int(state["step"]))


def _take_roots(p: Tensor, state: State, group: ParamGroup) -> None:
    for side in (LEFT, RIGHT):
        if side in state:
            values, vectors = _spectrum(p, state, side, group)
            # a factor that is zero has seen no gradient; its root is then the identity
            powers = torch.where(values > 0, values, 1.0) ** -group["power"]
            root = (vectors * powers) @ vectors.T
            state[f"{side}_root"] = root.to(state[side].dtype)


def _spectrum(p: Tensor, state: State, side: str, group: ParamGroup) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of L~ or R~, in float64."""
    factor = state[side].double() / _correction(state, group)
    if not bool(torch.isfinite(factor).all()):
        raise NumericalError(
            f"Shampoo's {side} factor of {len(factor)} rows holds NaN or inf after step "
            f"{int(state['step'])}: a gradient did, or its square overflows; lower lr or clip"
        )
    if group["trace"]:
        factor = _of_right_size(factor, as_matrix(p).shape, state, side)
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp(min=0)
    return values + group["damping"] * values[-1], vectors


def _of_right_size(factor: Tensor, shape: torch.Size, state: State, side: str) -> Tensor:
    """A factor so that L x R has the size of the second moments; a side without has 1."""
    rows, columns = shape
    if LEFT not in state:
        return factor / rows
    if RIGHT not in state:
        return factor / columns
    if side == RIGHT:
        return factor
    return factor / factor.trace().clamp(min=torch.finfo(factor.dtype).tiny)


def _damped(p: Tensor, state: State, side: str, group: ParamGroup) -> Tensor:
    """L~ or R~, in float64."""
    values, vectors = _spectrum(p, state, side, group)
    factor = (vectors * values) @ vectors.T
    return (factor + factor.T) / 2


def _denominator(state: State, group: ParamGroup) -> Tensor:
    second = state["exp_avg_sq"] / _correction(state, group)
    return second.sqrt_().add_(group["eps"])


def _preconditioned(mean: Tensor, state: State, group: ParamGroup) -> Tensor:
    if "exp_avg_sq" in state:
        return mean / _denominator(state, group)
    matrix = as_matrix(mean)
    if LEFT in state:
        matrix = state["left_root"] @ matrix
    if RIGHT in state:
        matrix = matrix @ state["right_root"]
    return matrix.reshape(mean.shape)
