"""Shampoo, with power 1/4 or 1/2, with and without momentum.

For a matrix of gradients G, (r, c):

    L <- b2 L + (1 - b2) G G',    R <- b2 R + (1 - b2) G' G        (or L + G G', R + G' G)
    M <- b1 M + (1 - b1) G
    W <- W (1 - lr wd) - lr (L + e I)^-q (M / (1 - b1^t)) (R + e I)^-q

with q = 1/4 (Gupta, Koren & Singer, arXiv 1802.09568) or q = 1/2, "Shampoo^2" (Morwani et al.,
arXiv 2406.17748). As averages, L and R are corrected by 1 / (1 - b2^t). With ``trace`` they make
the preconditioner (L / tr(L)) x R in place of L x R, which has the size of the gradient's second
moments: at q = 1/2 that is the idealised form that equals idealised Adafactor in its own
eigenbasis (Vyas et al., SOAP, arXiv 2409.11321, section 4). The momentum is of the gradient, before
it is preconditioned.

e is ``damping`` times the largest eigenvalue. A gradient that is younger than the roots may have a
part where they had nothing, which they blow up by up to (``damping``)^-2q: raise it, or lower
``frequency``, where rank is low. Roots are taken by eigh in float64 every
``frequency`` steps, from the first on. Tensors of more than two axes are viewed as (first, rest). A
side of more than ``largest`` has no factor; a tensor without any, and one of fewer than two axes,
is divided by the root of its second moments as in Adam (power 1/2 of a diagonal), with ``eps``.

Letters: r rows, c columns, t steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.errors import NumericalError
from hessian_tools.optimizers.checks import check_gradient, check_settings

Closure = Callable[[], Tensor | float]
POWERS = (0.25, 0.5)
SIDES = ("left", "right")


class Shampoo(torch.optim.Optimizer):
    """Shampoo. State: ``exp_avg``, and ``left`` and ``right`` with their roots or ``exp_avg_sq``.

    Args:
        params: parameters or groups.
        lr: a number.
        betas: (b1, b2); b1 = 0 is without momentum.
        power: q, 1/4 or 1/2.
        sums: L and R are sums over all steps, as first published, not averages.
        trace: divide L by its trace.
        damping: e, relative to the largest eigenvalue of a factor.
        eps: of the diagonal that tensors without factors have.
        frequency: steps between roots.
        largest: of a side that has a factor.
        weight_decay: decoupled, wd.

    Raises:
        ValueError: a number out of range.
        RuntimeError: sparse or complex gradients.
        NumericalError: gradients that are not finite, where roots are taken.
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
        frequency: int = 10,
        largest: int = 2048,
        weight_decay: float = 0.0,
    ) -> None:
        if power not in POWERS:
            raise ValueError(f"power is {power}; allowed are 0.25 and 0.5")
        if frequency < 1 or largest < 1 or not damping >= 0:
            raise ValueError(
                f"frequency is {frequency}, largest {largest} and damping {damping}; at least 1, 1 "
                "and 0 are needed"
            )
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
            for p in group["params"]:
                if p.grad is not None:
                    check_gradient(p, "Shampoo")
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: ParamGroup) -> None:
        state = self._state_of(p, group)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - group["betas"][0])
        _follow(state, gradient, group)
        t = int(state["step"])
        if (t - 1) % group["frequency"] == 0:
            _take_roots(state, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        mean = state["exp_avg"] / (1 - group["betas"][0] ** t)
        p.add_(_preconditioned(mean, state, group), alpha=-group["lr"])

    def _state_of(self, p: Tensor, group: ParamGroup) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if state:
            return state
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p)
        if p.ndim > 1:
            sizes = (p.shape[0], p[0].numel())
            for side, size in zip(SIDES, sizes, strict=True):
                if size <= group["largest"]:
                    state[side] = p.new_zeros(size, size)
        if not _sides(state):
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def kronecker_factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """(L, R) by parameter, for those that have both; corrected, and divided by the trace."""
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if _sides(state) == list(SIDES):
                    left, right = (_factor(state, side, group) for side in SIDES)
                    found[p] = left, right
        return found


def _sides(state: dict[str, Tensor]) -> list[str]:
    return [side for side in SIDES if side in state]


def _follow(state: dict[str, Tensor], gradient: Tensor, group: ParamGroup) -> None:
    """The factors, or the diagonal, after a gradient."""
    matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient
    for side in _sides(state):
        product = matrix @ matrix.T if side == "left" else matrix.T @ matrix
        _add(state[side], product, group)
    if "exp_avg_sq" in state:
        _add(state["exp_avg_sq"], gradient.square(), group)


def _add(moment: Tensor, new: Tensor, group: ParamGroup) -> None:
    if group["sums"]:
        moment.add_(new)
    else:
        moment.lerp_(new, 1 - group["betas"][1])


def _correction(state: dict[str, Tensor], group: ParamGroup) -> float:
    return 1.0 if group["sums"] else 1 - group["betas"][1] ** int(state["step"])


def _factor(state: dict[str, Tensor], side: str, group: ParamGroup) -> Tensor:
    """L or R as it is rooted."""
    factor = state[side] / _correction(state, group)
    if group["trace"] and side == "left":
        factor = factor / factor.trace().clamp(min=torch.finfo(factor.dtype).tiny)
    return factor


def _take_roots(state: dict[str, Tensor], group: ParamGroup) -> None:
    for side in _sides(state):
        factor = _factor(state, side, group)
        if not bool(torch.isfinite(factor).all()):
            raise NumericalError(
                "a gradient that Shampoo was given is NaN or inf, or its square is; lower lr, or "
                "clip gradients"
            )
        root = _inverse_root(factor.double(), group["power"], group["damping"])
        state[f"{side}_root"] = root.to(factor.dtype)


def _inverse_root(factor: Tensor, power: float, damping: float) -> Tensor:
    """(factor + e I)^-power; eigenvalues that rounding makes negative count as 0."""
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp(min=0)
    # a factor that vanishes has no inverse, and its gradients vanish as well
    floor = max(damping * float(values[-1]), torch.finfo(torch.float64).tiny)
    return (vectors * (values + floor) ** -power) @ vectors.T


def _preconditioned(mean: Tensor, state: dict[str, Tensor], group: ParamGroup) -> Tensor:
    if "exp_avg_sq" in state:
        second = state["exp_avg_sq"] / _correction(state, group)
        return mean / (second.sqrt_() + group["eps"])
    matrix = mean.flatten(1)
    if "left" in state:
        matrix = state["left_root"] @ matrix
    if "right" in state:
        matrix = matrix @ state["right_root"]
    return matrix.reshape(mean.shape)
