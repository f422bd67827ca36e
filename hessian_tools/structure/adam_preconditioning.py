"""Does a diagonal preconditioner help? kappa with and without Adam's, and tau, of given matrices.

Adam with its preconditioner frozen at the first gradient g turns a block H into D H,
D = diag(1 / |g|), whose eigenvalues are those of D^(1/2) H D^(1/2). Where
r = kappa(D H) / kappa(H) is below 1 it helps. It does where H is nearly diagonal,
tau = sum |H_ii| / sum |H_ij| near 1, and harms where H is dense (Zhang et al., arXiv 2406.16793).

**kappa of a matrix that is indefinite or singular**, as Hessian blocks of networks are: the largest
|eigenvalue| over the smallest one above a floor, ``relative_floor`` times the largest (default
n eps of float64, what rounding leaves). ``dropped`` counts those at or below the floor,
``negative`` those below minus the floor; with either, kappa is no rate of convergence. A matrix
that vanishes has kappa nan.

Letters: n size of a matrix; (...) are leading axes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hessian_tools.results import registered

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@registered
@dataclass(frozen=True, eq=False)
class AdamConditioning:
    """kappa, tau and r of matrices with leading shape (...), which all fields have.

    See :mod:`hessian_tools.structure.adam_preconditioning`.
    """

    kappa: Floats  # of H
    kappa_adam: Floats  # of D H, over the coordinates whose gradient is not zero
    r: Floats  # kappa_adam over kappa, the latter over these coordinates as well
    tau: Floats  # sum |H_ii| / sum |H_ij|, 1 for a diagonal matrix, nan for zero
    negative: Integers  # eigenvalues of H below minus the floor
    negative_adam: Integers  # of D H
    dropped: Integers  # eigenvalues of H within the floor: kappa leaves them out
    dropped_adam: Integers  # of D H
    without_gradient: Integers  # coordinates whose gradient is zero, where D is not defined


def adam_conditioning(
    matrix: ArrayLike,
    gradient: ArrayLike,
    *,
    eps: float = 0.0,
    relative_floor: float | None = None,
) -> AdamConditioning:
    """What Adam's preconditioner diag(1 / (|g| + eps)) does to the condition of H.

    Args:
        matrix: (..., n, n) symmetric H.
        gradient: (..., n) g.
        eps: Adam's own, 0 for the preconditioner of the theory.
        relative_floor: |eigenvalues| of at most this much of the largest count as zero; default
            n eps of float64.
    Raises:
        ValueError: shapes that do not fit, a negative ``eps`` or floor, numbers that are not
            finite.
    """
    matrix = np.asarray(matrix, np.float64)
    gradient = np.asarray(gradient, np.float64)
    is_square = matrix.ndim >= 2 and matrix.shape[-1] == matrix.shape[-2]
    if not is_square or matrix.shape[:-1] != gradient.shape:
        raise ValueError(
            f"matrix has shape {matrix.shape} and gradient {gradient.shape}; "
            "(..., n, n) and (..., n) are needed"
        )
    floor = relative_floor
    if floor is None:
        floor = matrix.shape[-1] * np.finfo(np.float64).eps
    if not (eps >= 0 and 0 <= floor < 1):
        raise ValueError(
            f"eps is {eps} and relative_floor {floor}; at least 0, and the floor below 1, "
            "are needed"
        )
    if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
        raise ValueError("matrix or gradient holds NaN or inf; check how they were computed")
    return _conditioning(matrix, np.abs(gradient) + eps, floor)


def _conditioning(matrix: Floats, scale: Floats, floor: float) -> AdamConditioning:
    """``scale`` (..., n) is the inverse of D's diagonal, 0 where that is not defined."""
    defined = scale > 0
    roots = np.where(defined, 1 / np.sqrt(np.where(defined, scale, 1.0)), 0.0)
    missing = (~defined).sum(-1)
    kappa, negative, dropped = _condition(matrix, floor)
    kappa_adam, negative_adam, dropped_adam = _condition(_scaled(matrix, roots), floor)
    compared = kappa  # over the coordinates where D is defined
    if missing.any():
        compared, _, _ = _condition(_scaled(matrix, defined.astype(float)), floor)
    entries = np.abs(matrix)
    tau = _quotient(np.trace(entries, axis1=-2, axis2=-1), entries.sum((-2, -1)))
    return AdamConditioning(
        kappa=kappa,
        kappa_adam=kappa_adam,
        r=kappa_adam / compared,
        tau=tau,
        negative=negative,
        negative_adam=negative_adam,
        dropped=dropped,
        dropped_adam=dropped_adam - missing,
        without_gradient=missing,
    )


def _condition(matrix: Floats, floor: float) -> tuple[Floats, Integers, Integers]:
    """(kappa, eigenvalues below -floor, eigenvalues within the floor), each (...)."""
    values = np.linalg.eigvalsh(matrix)
    sizes = np.abs(values)
    largest = sizes.max(-1)
    bound = floor * largest[..., None]
    kept = sizes > bound
    smallest = np.where(kept, sizes, np.inf).min(-1)
    kappa = _quotient(largest, np.where(largest > 0, smallest, 0.0))
    return kappa, (values < -bound).sum(-1), (~kept).sum(-1)


def _scaled(matrix: Floats, roots: Floats) -> Floats:
    return roots[..., :, None] * matrix * roots[..., None, :]


def _quotient(a: Floats, b: Floats) -> Floats:
    """a / b, nan where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)
