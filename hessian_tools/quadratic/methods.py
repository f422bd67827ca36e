"""First-order methods on quadratics, each a few lines that read like its formula.

A method is a function (problem, g0, eta, **settings) -> :class:`Rule`. It is given the gradients at
the starts and sets up its state; its rule then changes w in place, without allocations, from the
gradient g = H w at w. Rows are runs and never meet.

Adam's averages can start in two ways. ``bias_correction=False`` starts them at the first gradient,
m_0 = g_0 and v_0 = g_0^2, so that beta2 = 1 is the preconditioner frozen at |g_0| (thesis arXiv
2608.16760; Zhang et al. 2024, arXiv 2402.16788, propositions 1 and 2). ``True`` starts them at zero
and divides them by 1 - beta^t (Kingma & Ba, arXiv 1412.6980).

Shapes: N problems, R runs of each, d coordinates; w, g (N, R, d); eta (N, R, 1).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.quadratic.problems import Quadratic, check_sizes

Update = Callable[[Tensor, Tensor, int], None]  # (w, g, t), t = 1, 2, ...; changes w
# a method's own keyword arguments by name; their types are those of its signature
Settings = dict[str, Any]
# makes 0 / 0 zero: added to a square root, it changes only one that is zero itself
_TINY = 1e-300


@dataclass(frozen=True)
class Rule:
    """One method at work."""

    update: Update
    # (N, R, d) each; set to zero in the rows of runs that have ended
    state: tuple[Tensor, ...] = ()
    # P of methods that are w <- w - eta P g with a fixed P:
    # (N or 1, R or 1, d) its diagonal, or all of it (N, 1, d, d)
    scaling: Tensor | None = None


Method = Callable[..., Rule]


def gradient_descent(problem: Quadratic, g0: Tensor, eta: Tensor) -> Rule:
    """w <- w - eta g (Cauchy 1847)."""

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.addcmul_(g, eta, value=-1)

    return Rule(update, scaling=torch.ones_like(g0[:1, :1]))


def heavy_ball(problem: Quadratic, g0: Tensor, eta: Tensor, beta: float | None = None) -> Rule:
    """v <- beta v - eta g, w <- w + v (Polyak 1964).

    ``beta`` is ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^2 unless given.
    """
    root = problem.kappa.sqrt()[:, None, None]
    momentum = ((root - 1) / (root + 1)) ** 2 if beta is None else _below_one("beta", beta)
    v = torch.zeros_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.add_(v.mul_(momentum).addcmul_(g, eta, value=-1))

    return Rule(update, (v,))


def nesterov(problem: Quadratic, g0: Tensor, eta: Tensor, beta: float | None = None) -> Rule:
    """v <- beta v - eta grad f(w + beta v), w <- w + v (Nesterov 1983; 2018, scheme 2.2.22).

    ``beta`` is (sqrt(kappa) - 1) / (sqrt(kappa) + 1) unless given. As H v = g - g_previous, no
    second product is needed.
    """
    root = problem.kappa.sqrt()[:, None, None]
    momentum = (root - 1) / (root + 1) if beta is None else _below_one("beta", beta)
    v = torch.zeros_like(g0)
    previous = g0.clone()
    ahead = torch.empty_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        torch.sub(g, previous, out=ahead).mul_(momentum).add_(g)  # gradient at w + beta v
        previous.copy_(g)
        w.add_(v.mul_(momentum).addcmul_(ahead, eta, value=-1))

    return Rule(update, (v, previous))


def sign_descent(problem: Quadratic, g0: Tensor, eta: Tensor) -> Rule:
    """w <- w - eta sign(g) (Bernstein et al. 2018, arXiv 1802.04434)."""
    sign = torch.empty_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.addcmul_(torch.sign(g, out=sign), eta, value=-1)

    return Rule(update)


def adam(
    problem: Quadratic,
    g0: Tensor,
    eta: Tensor,
    beta1: float = 0.0,
    beta2: float = 1.0,
    eps: float = 0.0,
    bias_correction: bool = False,
) -> Rule:
    """w <- w - eta m / (sqrt(v) + eps), m and v the running averages of g and g^2.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2. The defaults are the theorem's:
    with beta1 = 0, beta2 = 1 and eps = 0 it is w <- w - eta g / |g_0|. With beta1 = beta2 = 0 it is
    :func:`sign_descent`.
    """
    return _adam(g0, eta, beta1, beta2, eps, bias_correction, means=None)


def adam_mini(
    problem: Quadratic,
    g0: Tensor,
    eta: Tensor,
    beta1: float = 0.0,
    beta2: float = 1.0,
    eps: float = 0.0,
    bias_correction: bool = False,
    groups: Sequence[int] | None = None,
) -> Rule:
    """Adam with one v for each group of coordinates, the mean of g^2 over it (arXiv 2406.16793).

    ``groups``: sizes of consecutive groups; the Hessian's dense blocks unless given, which is that
    paper's principle.
    """
    means = _group_means(problem.block_sizes if groups is None else groups, g0)
    return _adam(g0, eta, beta1, beta2, eps, bias_correction, means)


def adalayer(
    problem: Quadratic,
    g0: Tensor,
    eta: Tensor,
    groups: Sequence[int] = (),
    beta1: float = 0.0,
    beta2: float = 1.0,
    eps: float = 0.0,
    bias_correction: bool = False,
) -> Rule:
    """Adam with one v for each tensor (arXiv 2407.07972).

    ``groups``: sizes of consecutive groups, the tensors; all coordinates are one unless given.
    """
    means = _group_means(groups or (problem.size,), g0)
    return _adam(g0, eta, beta1, beta2, eps, bias_correction, means)


def adagrad(problem: Quadratic, g0: Tensor, eta: Tensor, eps: float = 0.0) -> Rule:
    """v <- v + g^2, w <- w - eta g / (sqrt(v) + eps) (Duchi, Hazan & Singer 2011)."""
    floor = _not_negative("eps", eps) + _TINY
    v = torch.zeros_like(g0)
    direction = torch.empty_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        torch.sqrt(v.addcmul_(g, g), out=direction).add_(floor)
        w.addcmul_(torch.div(g, direction, out=direction), eta, value=-1)

    return Rule(update, (v,))


def blockwise_gd(problem: Quadratic, g0: Tensor, eta: Tensor) -> Rule:
    """w_l <- w_l - eta eta_l g_l with each block's own best step eta_l = 2 / (mu_l + L_l).

    Zhang et al. 2024, arXiv 2402.16788.
    """
    rates = [2 / (e[:, :1] + e[:, -1:]).expand(-1, e.shape[1]) for e in problem.eigenvalues]
    return _scaled(torch.cat(rates, dim=1)[:, None], g0, eta)


def jacobi(problem: Quadratic, g0: Tensor, eta: Tensor) -> Rule:
    """w <- w - eta g / diag(H) (Jacobi 1845)."""
    return _scaled(1 / problem.hessian.diagonal(dim1=1, dim2=2)[:, None], g0, eta)


def block_jacobi(
    problem: Quadratic,
    g0: Tensor,
    eta: Tensor,
    groups: Sequence[int] | None = None,
) -> Rule:
    """w_G <- w_G - eta H_GG^-1 g_G for each group G of coordinates.

    ``groups``: sizes of consecutive groups; the Hessian's blocks unless given, which is Newton's
    method.
    """
    # (d, d) true where two coordinates share a group
    together = _group_means(problem.block_sizes if groups is None else groups, g0) > 0
    inverse = torch.linalg.inv(problem.hessian * together)
    direction = torch.empty_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.addcmul_(torch.matmul(g, inverse, out=direction), eta, value=-1)

    return Rule(update, scaling=inverse[:, None])


def _adam(
    g0: Tensor,
    eta: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction: bool,
    means: Tensor | None,
) -> Rule:
    """Adam and its relatives; ``means`` (d, d) replaces g^2 by its means over groups."""
    _below_one("beta1", beta1)
    _not_negative("eps", eps)
    if not 0 <= beta2 <= 1 or (bias_correction and beta2 == 1):
        raise ValueError(
            f"beta2 is {beta2} with bias_correction {bias_correction}; "
            "0 to 1, and 1 only without (v is 0)"
        )
    square = g0 * g0 if means is None else (g0 * g0) @ means
    if beta2 == 1:
        return _frozen_adam(g0, eta, beta1, 1 / (square.sqrt() + eps + _TINY))
    m = torch.zeros_like(g0) if bias_correction else g0.clone()
    v = torch.zeros_like(g0) if bias_correction else square.clone()
    direction = torch.empty_like(g0)

    def update(w: Tensor, g: Tensor, t: int) -> None:
        average = m.lerp_(g, 1 - beta1) if beta1 else g
        if means is None:
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        else:
            torch.matmul(torch.mul(g, g, out=square), means, out=direction)
            v.mul_(beta2).add_(direction, alpha=1 - beta2)
        correction1 = 1 - beta1**t if bias_correction else 1.0
        correction2 = 1 - beta2**t if bias_correction else 1.0
        # sqrt(v / correction2) + eps is (sqrt(v) + eps root) / root, which saves a pass
        root = math.sqrt(correction2)
        torch.sqrt(v, out=direction).add_(eps * root + _TINY)
        w.addcmul_(torch.div(average, direction, out=direction), eta, value=-root / correction1)

    return Rule(update, (m, v))


def _frozen_adam(g0: Tensor, eta: Tensor, beta1: float, frozen: Tensor) -> Rule:
    """Adam with beta2 = 1, whose v never leaves its start: ``frozen`` is 1 / (sqrt(v) + eps)."""
    if not beta1:
        return _scaled(frozen, g0, eta)
    m = g0.clone()
    rate = eta * frozen

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.addcmul_(m.lerp_(g, 1 - beta1), rate, value=-1)

    return Rule(update, (m,))


def _scaled(diagonal: Tensor, g0: Tensor, eta: Tensor) -> Rule:
    """w <- w - eta P g with a fixed diagonal P."""
    rate = (eta * diagonal).expand_as(g0).contiguous()

    def update(w: Tensor, g: Tensor, t: int) -> None:
        w.addcmul_(g, rate, value=-1)

    return Rule(update, scaling=diagonal)


def _group_means(sizes: Sequence[int], like: Tensor) -> Tensor:
    """(d, d) matrix whose product with a row puts each group's mean in all of its places."""
    check_sizes("groups", sizes, like.shape[-1])
    averages = [torch.full((n, n), 1 / n, dtype=like.dtype) for n in sizes]
    return torch.block_diag(*averages).to(like.device)


def _below_one(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
    return value


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be 0 or positive")
    return value


METHODS: dict[str, Method] = {
    "gd": gradient_descent,
    "heavy_ball": heavy_ball,
    "nesterov": nesterov,
    "sign": sign_descent,
    "adam": adam,
    "adam_mini": adam_mini,
    "adalayer": adalayer,
    "adagrad": adagrad,
    "blockwise_gd": blockwise_gd,
    "jacobi": jacobi,
    "block_jacobi": block_jacobi,
}


def _defaults(method: Method) -> Settings:
    parameters = list(inspect.signature(method).parameters.values())
    return {p.name: p.default for p in parameters[3:]}  # after problem, g0 and eta


METHOD_DEFAULTS: dict[str, Settings] = {name: _defaults(method) for name, method in METHODS.items()}


def settings_of(name: str, settings: Settings) -> Settings:
    """All settings of method ``name``, those given and its defaults.

    Raises:
        ValueError: for an unknown method or setting.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; choose one of {', '.join(METHODS)}")
    known = METHOD_DEFAULTS[name]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        allowed = f"its settings are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{name} has no setting {unknown[0]!r}; {allowed}")
    return known | settings
