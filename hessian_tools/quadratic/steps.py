"""Step sizes eta: those that theory names, and those that a user gives.

With a the eigenvalues of P^1/2 H P^1/2 for methods w <- w - eta P g (gradient descent: P = I; Adam
with beta2 = 1: P = diag(1 / |g_0|), another for every start):

    "optimal"  2 / (a_min + a_max), the least contraction factor (Polyak 1987, section 1.4); heavy
               ball 4 / (sqrt(L) + sqrt(mu))^2, Nesterov 1 / L, with the momenta of their rules
    "safe"     1 / a_max
    "theorem"  min_l C1_l of Adam's upper bound, see :mod:`hessian_tools.quadratic.theory`
    "best"     one for all starts, found by :func:`hessian_tools.quadratic.sweeps.best_step`

Shapes: N problems, E step sizes, S starts, d coordinates.
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from hessian_tools.errors import NumericalError
from hessian_tools.quadratic.plan import Plan
from hessian_tools.quadratic.preconditioning import (
    extremes,
    first_gradient_ratios,
    fixed_preconditioner,
)
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.spectra.quadrature import Floats

STEPS = ("optimal", "safe", "theorem", "best")
Step = str | float | Sequence[float] | Floats | Tensor
_THEOREMS = {"beta1": 0, "beta2": 1, "eps": 0}  # Adam's settings
_CHOICES = f"give a number, a sequence of numbers, or one of {', '.join(STEPS)}"


def named_steps(problem: Quadratic, plan: Plan, starts: Tensor, name: str) -> Tensor:
    """(N, S), or what expands to it; all names but "best".

    Raises:
        ValueError: for an unknown name, or one that the method does not have.
    """
    if name not in STEPS:
        raise ValueError(f"step is {name!r}; {_CHOICES}")
    if name == "theorem":
        return _theorem_steps(problem, plan, starts)
    mu, largest = problem.smallest[:, None], problem.largest[:, None]
    if name == "optimal" and plan.method == "heavy_ball":
        return 4 / (largest.sqrt() + mu.sqrt()) ** 2
    if name == "optimal" and plan.method == "nesterov":
        return 1 / largest
    low, high = extremes(problem, plan.method, plan.settings, starts)
    return 2 / (low + high) if name == "optimal" else 1 / high


def given_steps(step: Step, device: torch.device) -> Tensor:
    """(E,) the step sizes that a user gave, a number or a sequence of them.

    Raises:
        ValueError: for anything but positive finite numbers.
    """
    if isinstance(step, bool) or not (isinstance(step, Real) or is_sequence(step)):
        raise ValueError(f"step is {step!r}; {_CHOICES}")
    sizes = torch.as_tensor(step, dtype=torch.float64, device=device).reshape(-1)
    if not len(sizes) or not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise ValueError(f"step is {step!r}; positive finite numbers are needed")
    return sizes


def is_sequence(step: Step) -> bool:
    """Whether ``step`` gives results an axis of step sizes."""
    return not isinstance(step, str) and np.ndim(step) > 0


def natural_range(problem: Quadratic, plan: Plan, starts: Tensor) -> tuple[Tensor, int, int]:
    """(N, 1) the natural unit of a method's step sizes, and the powers of ten to search of it.

    The unit is 2 / a_max where that is known (2 / L for heavy ball and Nesterov) and otherwise the
    root mean square of the starts' entries.
    """
    if plan.method in ("heavy_ball", "nesterov"):
        return 2 / problem.largest[:, None], -4, 2
    if fixed_preconditioner(problem, plan.method, plan.settings, starts) is None:
        return starts.square().mean((1, 2)).sqrt()[:, None], -7, 1
    _, highest = extremes(problem, plan.method, plan.settings, starts)
    if not bool((highest > 0).all()):
        raise NumericalError(
            f"{plan.method} on {problem.name} with eigenvalues up to "
            f"{float(problem.largest.max()):.3g} leaves float64's range; scale the eigenvalues"
        )
    return 2 / highest.median(dim=1, keepdim=True).values, -4, 2


def _theorem_steps(problem: Quadratic, plan: Plan, starts: Tensor) -> Tensor:
    """(N, S) min_l C1_l."""
    if plan.method != "adam" or not plan.settings.items() >= _THEOREMS.items():
        raise ValueError(
            "step is 'theorem', which is of adam with beta1 = 0, beta2 = 1 and eps = 0 only"
        )
    least, _ = first_gradient_ratios(problem, starts @ problem.hessian)
    return least.amin(-1)
