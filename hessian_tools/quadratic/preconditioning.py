"""Methods w <- w - eta P g with a fixed P: the spectrum of P^1/2 H P^1/2, in which their runs are closed forms.

Gradient descent (P = I), Jacobi, blockwise gradient descent, and Adam with beta1 = 0 and beta2 = 1, whose
P = diag(1 / |g_0|) differs from start to start. In u = P^-1/2 w they are gradient descent on u' (P^1/2 H P^1/2) u / 2.

Shapes: N problems, S starts, d coordinates, L blocks, n_l size of block l.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.quadratic.methods import METHODS
from hessian_tools.quadratic.problems import Quadratic

_DENSE_BYTES = 1 << 26  # dense blocks held at a time
_MOST_STEPS = 2**62


def preconditioned(
    problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """P^1/2 H P^1/2 of methods w <- w - eta P g, block by block, for the starts of one run of rows at a time.

    Yields where the block lies, P^-1/2 w_0 there (N, S', n_l), and the matrices (N, S' or 1, n_l, n_l).

    Raises:
        ValueError: for a method that is not of that form.
    """
    gradient = starts @ problem.hessian
    rule = METHODS[method](problem, gradient, torch.ones_like(gradient[..., :1]), **settings)
    if rule.scaling is None:
        raise ValueError(
            f"{method} with {settings} has no fixed preconditioner; give a number for step, or 'best'"
        )
    if rule.scaling.ndim == 4:  # P = R R', and R' H R has the same eigenvalues
        root = torch.linalg.cholesky(rule.scaling[:, 0])
        whole = (root.mT @ problem.hessian @ root)[:, None]
        yield slice(0, problem.size), torch.linalg.solve(root, starts.mT).mT, whole
        return
    roots = rule.scaling.sqrt().expand(problem.num_problems, -1, -1)
    for where in problem.slices:
        block, root = problem.hessian[:, None, where, where], roots[..., where]
        if root.shape[1] == 1:
            yield where, starts[..., where] / root, root[..., :, None] * block * root[..., None, :]
            continue
        at_once = max(1, _DENSE_BYTES // (8 * block.numel()))
        for some, rows in zip(
            root.split(at_once, dim=1), starts[..., where].split(at_once, dim=1), strict=True
        ):
            yield where, rows / some, some[..., :, None] * block * some[..., None, :]


def extremes(
    problem: Quadratic, method: str, settings: dict[str, Any], starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of P^1/2 H P^1/2, (N, S) each; raises as :func:`preconditioned`."""
    low, high = dict[int, list[Tensor]](), dict[int, list[Tensor]]()
    for where, rows, matrices in preconditioned(problem, method, settings, starts):
        values = torch.linalg.eigvalsh(matrices)
        repeats = (
            rows.shape[1] // values.shape[1]
        )  # not expanded: torch's median errs on such tensors
        low.setdefault(where.start, []).append(values[..., 0].repeat(1, repeats))
        high.setdefault(where.start, []).append(values[..., -1].repeat(1, repeats))
    joined = [
        torch.stack([torch.cat(parts, dim=1) for parts in ends.values()]) for ends in (low, high)
    ]
    return joined[0].amin(0), joined[1].amax(0)


def linear_iterations(
    problem: Quadratic, method: str, starts: Tensor, steps: Tensor, tolerance: float, **settings: object
) -> np.ndarray:  # fmt: skip
    """(N, S) iterations to f / f(w_0) <= ``tolerance`` of w <- w - eta P g, exactly and without running it.

    In the eigenvectors of P^1/2 H P^1/2 each mode of energy c_i shrinks by (1 - eta a_i)^2 a step: f after t steps is
    sum_i c_i (1 - eta a_i)^(2 t), the first t by bisection; inf where a mode does not shrink.

    Args:
        starts: (N, S, d). steps: eta, (N, S) or what expands to it.
    """
    rates, energies = [], []
    for _, rows, matrices in preconditioned(problem, method, dict(settings), starts):
        a, v = torch.linalg.eigh(matrices)
        energies.append(a * (rows[..., None, :] @ v)[..., 0, :] ** 2)
        rates.append(a.expand_as(energies[-1]))
    s = starts.shape[1]
    energy, rate = (torch.cat(_by_block(parts, s), dim=-1) for parts in (energies, rates))
    logs = 2 * (1 - steps.expand(rate.shape[:2])[..., None] * rate).abs().log()
    target = tolerance * energy.sum(-1)
    reached = (logs < 0).all(-1)
    low, high = torch.zeros_like(target), torch.ones_like(target)
    while bool(
        (
            open_ := reached
            & ((energy * (high[..., None] * logs).exp()).sum(-1) > target)
            & (high < _MOST_STEPS)
        ).any()
    ):
        low, high = torch.where(open_, high, low), torch.where(open_, 2 * high, high)
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        above = (energy * (middle[..., None] * logs).exp()).sum(-1) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(reached, high, math.inf).cpu().numpy()


def first_gradient_ratios(problem: Quadratic, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """C1_l and C2_l, (N, S, L): least and greatest |g_0| in block l over the block's largest eigenvalue."""
    sizes = [gradient[..., where].abs() for where in problem.slices]
    tops = [e[:, -1:] for e in problem.eigenvalues]
    least = [g.amin(-1) / top for g, top in zip(sizes, tops, strict=True)]
    return torch.stack(least, -1), torch.stack(
        [g.amax(-1) / top for g, top in zip(sizes, tops, strict=True)], -1
    )


def _by_block(parts: list[Tensor], starts: int) -> list[Tensor]:
    """Rows that came in several runs put together, block by block."""
    joined, rows = [], list[Tensor]()
    for part in parts:
        rows.append(part)
        if sum(row.shape[1] for row in rows) == starts:
            joined.append(torch.cat(rows, dim=1))
            rows = []
    return joined
