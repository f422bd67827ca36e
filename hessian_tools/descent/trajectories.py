"""T steps of preconditioned gradient descent on the local quadratic, at the best fixed rate.

In u = P^1/2 w, w <- w - eta P^-1 (g + A w) from w = 0 is gradient descent on s'u + u'C u / 2 with
s = P^-1/2 g and C = P^-1/2 A P^-1/2. After T steps the quadratic has fallen by

    |s|^2 / 2  int (1 - (1 - eta x)^(2T)) / x  dmu(x),

mu being the spectral measure of C at s: a polynomial of degree 2T - 1 in x, so that the Gauss
quadrature of T Lanczos steps from s gives it without error, for every eta at once (Golub & Meurant
2010, chapter 6). T products serve all rates. With fewer steps than T the value is that
quadrature's estimate.

For x >= 0 the fall is a concave function of eta, so the best rate is the zero of its derivative,
found by bisection. A fixed rate has to be stable: the best single step may overshoot where
curvature is high, and repeated it would diverge there. T steps can therefore gain less than one.

Letters: P parameters, T steps, K Lanczos steps (nodes).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.curvature.preconditioners import Preconditioner
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.gauss import ritz
from hessian_tools.spectra.lanczos import lanczos

Floats = NDArray[np.float64]
_ROUNDINGS = 10.0
_HALVINGS = 100  # of the interval that holds the best rate
_DOUBLINGS = 200


class Rates(Preconditioner):
    """P^-1 = diag(rates), which may vanish where nothing moves."""

    def __init__(self, rates: Mapping[str, Tensor]) -> None:
        self._roots = {name: rate.sqrt() for name, rate in rates.items()}

    def inverse_root(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * self._roots[name]

    def to(self, dtype: torch.dtype, device: torch.device) -> "Rates":
        moved = Rates({})
        moved._roots = {name: root.to(device, dtype) for name, root in self._roots.items()}
        return moved

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Made for the parameters at hand."""


@dataclass(frozen=True)
class Run:
    """T steps at the best fixed rate."""

    decrease: float  # of the quadratic; nan where there is no best rate
    rate: float
    num_matvecs: int
    why: str = ""  # there is no best rate


def best_run(
    operator: CurvatureOperator,
    gradient: Mapping[str, Tensor],
    preconditioner: Preconditioner | None,
    num_steps: int,
    krylov: int,
) -> Run:
    """``num_steps`` steps of w <- w - eta P^-1 g at the best eta, from min(T, ``krylov``) products.

    Raises:
        NumericalError: for a product with NaN or inf.
    """
    scaled = operator
    start = dict(gradient)
    if preconditioner is not None:
        scaled = PreconditionedOperator(operator, preconditioner)
        start = {name: preconditioner.inverse_root(name, g[None])[0] for name, g in start.items()}
    flat = torch.cat([start[name].flatten() for name in operator.problem.parameters])
    flat = flat.to(operator.device, operator.dtype)
    if not bool((flat != 0).any()):
        return Run(0.0, 0.0, 0)
    count = min(num_steps, krylov, len(flat))
    # Where the basis does not fit, what Lanczos loses without it does not reach such integrals.
    fits = count * flat.nbytes <= operator.krylov_bytes
    run = lanczos(scaled, flat[None], count, reorthogonalize="full" if fits else "local")
    if run.status[0] == "nonfinite":
        raise NumericalError("a product with the local quadratic is NaN or inf; check the loss")
    nodes, weights, _ = ritz(run.alphas, run.betas, run.steps)
    steps = int(run.steps[0])
    weights = weights[0, :steps] * float(run.start_norms[0]) ** 2
    floor = _ROUNDINGS * math.sqrt(steps) * torch.finfo(operator.dtype).eps
    fall, rate, why = best_fixed_rate(nodes[0, :steps], weights, num_steps, floor)
    return Run(fall, rate, run.num_matvecs, why)


def best_fixed_rate(
    nodes: Floats,
    weights: Floats,
    num_steps: int,
    relative_floor: float,
) -> tuple[float, float, str]:
    """(fall of the quadratic, rate, why there is none) for the measure of K ``nodes``.

    ``weights`` add up to |s|^2. Nodes within ``relative_floor`` times the largest of zero count as
    zero.
    """
    largest = float(nodes.max())
    if largest <= 0:
        return math.nan, math.nan, f"the largest curvature that g meets is {largest:.3g}"
    relative = nodes / largest
    if relative.min() < -relative_floor:
        why = f"not positive semidefinite: g meets {relative.min():.2g} times the largest"
        return math.nan, math.nan, why
    used = weights > 0
    relative = np.where(relative > relative_floor, relative, 0.0)[used]
    shares = weights[used]
    # Between 1 / x of the largest and of the smallest node, for each term alone is best at 1 / x.
    low, high = 1.0, 1.0
    for _ in range(_DOUBLINGS):
        if not _still_falls(high, relative, shares, num_steps):
            break
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _still_falls(middle, relative, shares, num_steps):
            low = middle
        else:
            high = middle
    rate = high / largest
    return fall(nodes * (nodes > relative_floor * largest), weights, num_steps, rate), rate, ""


def _still_falls(rate: float, nodes: Floats, weights: Floats, num_steps: int) -> bool:
    """Whether the quadratic falls further with a larger rate."""
    with np.errstate(over="ignore"):
        slope = weights @ (1 - rate * nodes) ** (2 * num_steps - 1)
    return bool(slope > 0)


def fall(nodes: Floats, weights: Floats, num_steps: int, rate: float) -> float:
    """By how much T steps at ``rate`` lower the quadratic, for nodes that are not negative."""
    product = rate * nodes
    inside = product < 1
    with np.errstate(divide="ignore", over="ignore"):
        logs = np.where(
            inside,
            np.log1p(-np.where(inside, product, 0.0)),
            np.log(np.where(inside, 1.0, product - 1)),
        )
        gone = -np.expm1(2 * num_steps * logs)  # 1 - (1 - eta x)^2T
    terms = np.divide(gone, nodes, out=np.full(len(nodes), 2 * num_steps * rate), where=nodes > 0)
    return float(weights @ terms) / 2
