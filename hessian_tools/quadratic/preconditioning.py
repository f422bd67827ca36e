"""Methods w <- w - eta P g with a fixed P: the spectrum of P^1/2 H P^1/2, which decides their runs.

Gradient descent (P = I), Jacobi, blockwise gradient descent, and Adam with beta1 = 0 and beta2 = 1,
whose P = diag(1 / |g_0|) differs from start to start. In u = P^-1/2 w they are gradient descent on
u' (P^1/2 H P^1/2) u / 2, so that their losses are closed forms.

Shapes: N problems, S starts, S' starts that are treated at once, d coordinates, L blocks, n_l size
of block l.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hessian_tools.errors import NumericalError
from hessian_tools.quadratic.methods import METHODS, Settings
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.spectra.quadrature import Floats

_DENSE_BYTES = 1 << 26  # dense blocks held at a time
_MOST_STEPS = 2**62


class PreconditionedBlock(NamedTuple):
    """P^1/2 H P^1/2 within one block, for some of the starts."""

    where: slice  # of the block among the d coordinates
    starts: Tensor  # (N, S', n_l) P^-1/2 w_0
    matrices: Tensor  # (N, S' or 1, n_l, n_l)


def fixed_preconditioner(
    problem: Quadratic,
    method: str,
    settings: Settings,
    starts: Tensor,
) -> Tensor | None:
    """P as in :class:`hessian_tools.quadratic.methods.Rule`; None for a method without a fixed
    P."""
    # P does not depend on eta, which is 1 here
    gradient = starts @ problem.hessian
    rule = METHODS[method](problem, gradient, torch.ones_like(gradient[..., :1]), **settings)
    return rule.scaling


def preconditioned(
    problem: Quadratic,
    method: str,
    settings: Settings,
    starts: Tensor,
) -> Iterator[PreconditionedBlock]:
    """P^1/2 H P^1/2 of methods w <- w - eta P g, block by block and some starts at a time.

    Raises:
        ValueError: for a method that is not of that form.
    """
    scaling = fixed_preconditioner(problem, method, settings, starts)
    if scaling is None:
        raise ValueError(
            f"{method} with {settings} has no fixed preconditioner; "
            "give a number for step, or 'best'"
        )
    if scaling.ndim == 4:  # not diagonal: its groups may cross H's blocks
        yield _by_full_matrix(problem, scaling[:, 0], starts)
        return
    roots = scaling.sqrt().expand(problem.num_problems, -1, -1)
    for where in problem.slices:
        yield from _by_diagonal(problem, where, roots[..., where], starts[..., where])


def _by_full_matrix(problem: Quadratic, matrix: Tensor, starts: Tensor) -> PreconditionedBlock:
    """With P = R R', where R' H R has the eigenvalues of P^1/2 H P^1/2."""
    root = torch.linalg.cholesky(matrix)
    whole = (root.mT @ problem.hessian @ root)[:, None]
    return PreconditionedBlock(
        slice(0, problem.size), torch.linalg.solve(root, starts.mT).mT, whole
    )


def _by_diagonal(
    problem: Quadratic,
    where: slice,
    roots: Tensor,
    starts: Tensor,
) -> Iterator[PreconditionedBlock]:
    """With the square roots of P's diagonal in this block, (N, S or 1, n_l)."""
    block = problem.hessian[:, None, where, where]
    if roots.shape[1] == 1:
        pieces = [(roots, starts)]
    else:  # a matrix for every start: only so many are held at a time
        count = max(1, _DENSE_BYTES // (8 * block.numel()))
        pieces = list(zip(roots.split(count, dim=1), starts.split(count, dim=1), strict=True))
    for root, rows in pieces:
        matrices = root[..., :, None] * block * root[..., None, :]
        yield PreconditionedBlock(where, rows / root, matrices)


def extremes(
    problem: Quadratic,
    method: str,
    settings: Settings,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of P^1/2 H P^1/2, (N, S) each.

    Raises:
        ValueError: for a method that is not w <- w - eta P g with a fixed P.
        NumericalError: for eigenvalues whose squares are beyond float64.
    """
    smallest = []
    largest = []
    for block in preconditioned(problem, method, settings, starts):
        if not bool(block.matrices.isfinite().all()):
            raise NumericalError(
                f"{method} on {problem.name} with eigenvalues up to "
                f"{float(problem.largest.max()):.3g} leaves float64's range; scale the eigenvalues"
            )
        values = torch.linalg.eigvalsh(block.matrices)
        # repeated, not expanded: torch's median is wrong on expanded tensors
        repeats = block.starts.shape[1] // values.shape[1]
        smallest.append((block.where, values[..., 0].repeat(1, repeats)))
        largest.append((block.where, values[..., -1].repeat(1, repeats)))
    low = torch.stack(_joined_by_block(smallest))
    high = torch.stack(_joined_by_block(largest))
    return low.amin(0), high.amax(0)


def linear_iterations(
    problem: Quadratic,
    method: str,
    starts: Tensor,
    steps: Tensor,
    tolerance: float,
    **settings: object,
) -> Floats:
    """(N, S) iterations to f / f(w_0) <= ``tolerance`` of w <- w - eta P g, without running it.

    In the eigenvectors of P^1/2 H P^1/2 each mode of energy c_i shrinks by (1 - eta a_i)^2 a step:
    f after t steps is sum_i c_i (1 - eta a_i)^(2 t), and the first t is found by bisection. It is
    inf where a mode does not shrink.

    Args:
        starts: (N, S, d).
        steps: eta, (N, S) or what expands to it.
    Raises:
        ValueError: for a method that is not w <- w - eta P g with a fixed P.
    """
    energies = []
    rates = []
    for block in preconditioned(problem, method, settings, starts):
        values, vectors = torch.linalg.eigh(block.matrices)
        coordinates = (block.starts[..., None, :] @ vectors)[..., 0, :]
        energy = values * coordinates**2
        energies.append((block.where, energy))
        rates.append((block.where, values.expand_as(energy)))
    energy = torch.cat(_joined_by_block(energies), dim=-1)
    rate = torch.cat(_joined_by_block(rates), dim=-1)
    eta = steps.expand(rate.shape[:2])[..., None]
    logs = 2 * (1 - eta * rate).abs().log()
    return _first_step(energy, logs, tolerance * energy.sum(-1)).cpu().numpy()


def _first_step(energy: Tensor, logs: Tensor, target: Tensor) -> Tensor:
    """The least whole t > 0 with sum_i c_i exp(t logs_i) <= ``target``, inf where a mode grows."""

    def above(steps: Tensor) -> Tensor:
        return (energy * (steps[..., None] * logs).exp()).sum(-1) > target

    # a mode with |1 - eta a| = 1 keeps its energy for ever
    shrinks = (logs < 0).all(-1)
    low = torch.zeros_like(target)
    high = torch.ones_like(target)
    while True:  # double until the target lies between low and high
        doubled = shrinks & above(high) & (high < _MOST_STEPS)
        if not bool(doubled.any()):
            break
        low = torch.where(doubled, high, low)
        high = torch.where(doubled, 2 * high, high)
    while bool((high - low > 1).any()):
        middle = ((low + high) / 2).floor()
        more = above(middle)
        low = torch.where(more, middle, low)
        high = torch.where(more, high, middle)
    return torch.where(shrinks, high, math.inf)


def first_gradient_ratios(problem: Quadratic, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """C1_l and C2_l, (N, S, L): least and greatest |g_0| in block l over its largest eigenvalue."""
    least = []
    greatest = []
    for where, e in zip(problem.slices, problem.eigenvalues, strict=True):
        sizes = gradient[..., where].abs()
        least.append(sizes.amin(-1) / e[:, -1:])
        greatest.append(sizes.amax(-1) / e[:, -1:])
    return torch.stack(least, -1), torch.stack(greatest, -1)


def _joined_by_block(parts: Iterable[tuple[slice, Tensor]]) -> list[Tensor]:
    """The starts of each block, which came in pieces, put together along their axis."""
    pieces: dict[int, list[Tensor]] = {}
    for where, part in parts:
        pieces.setdefault(where.start, []).append(part)
    return [torch.cat(some, dim=1) for some in pieces.values()]
