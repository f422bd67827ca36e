"""The symmetric Lanczos process, batched over start vectors, with one operator product and no host sync a step.

In exact arithmetic m steps from q_1 = v / |v| give orthonormal Q = [q_1 ... q_m], tridiagonal T (diagonal alpha,
off-diagonal beta) and
    A Q = Q T + beta_m q_{m+1} e_m'                                (Golub & Van Loan, 4th ed., 10.1)
In floating point orthogonality is lost as soon as a Ritz value converges (Paige 1980). What is done about it,
``reorthogonalize``:

- "full": two passes of classical Gram-Schmidt against all earlier vectors (Giraud et al. 2005: twice is enough). T is
  the projection of A on a truly orthonormal basis: every Ritz value stands for a different eigenvector, so nodes can be
  counted. Needs the basis, k*m*n.
- "local": each vector is made orthogonal to its two predecessors once more. Three vectors a probe. Global orthogonality
  is lost all the same: converged eigenvalues come back as further, nearly equal nodes that share the weight. Densities
  and moments keep their accuracy (Greenbaum 1989: T is that of a nearby spectrum of clusters), counts of nodes do not.
- "none": the three-term recurrence alone, the cheapest and the literature's choice; as "local", the copies appear a
  little earlier.

Shapes: k start vectors (rows), m steps, n size of the operator.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

REORTHOGONALIZE = ("full", "local", "none")
_COLUMNS = 1 << 22  # columns that _dots takes at a time, so that no copy of the whole batch is made
_ROUNDING = 8.0  # breakdown below this times (1 + log2 n) roundings of the operator's scale


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What m steps from k start vectors leave; entries past a row's ``steps`` are 0.

    A row ends early, with status "breakdown", when its next residual is rounding noise: its Krylov space is invariant
    and its Ritz values are eigenvalues. A row whose product was NaN or inf has status "nonfinite".
    """

    alphas: np.ndarray  # (k, m) float64 diagonal of T
    betas: np.ndarray  # (k, m) float64, [:, j] couples steps j and j + 1; at steps - 1 the final residual norm
    start_norms: np.ndarray  # (k,) float64 Euclidean norms of the start vectors
    steps: np.ndarray  # (k,) int, valid steps of each row
    status: tuple[str, ...]  # (k,) "complete" | "breakdown" | "nonfinite"
    first_nonfinite: np.ndarray | None  # (k,) int, first step (from 1) with NaN or inf, 0 for none; None without any
    num_matvecs: int  # products spent, those of finished rows included
    basis: Tensor | None  # (k, m, n) Lanczos vectors, in the operator's dtype and on its device, when asked for


def lanczos(
    operator: Any, start: Tensor, num_steps: int, *, reorthogonalize: str = "full", keep_basis: bool = False
) -> LanczosResult:
    """Run m = min(num_steps, n) Lanczos steps on every row of ``start``, (k, n), at once.

    ``operator`` needs only ``matmat`` on (k, n), ``dtype`` and ``device``. Vectors are kept in its dtype, scalars
    accumulate in float64.

    Breakdown after step j: beta_j <= 8 (1 + log2 n) eps(dtype) scale, where scale is the largest |alpha| + beta the row
    has seen (at most sqrt(2) |A|) and (1 + log2 n) eps bounds the rounding of a pairwise sum of n terms. The bound
    is kept low on purpose: to go on from noise is harmless with re-orthogonalisation (a new direction of weight (beta /
    scale)^2), to stop early would lose small eigenvalues.

    Raises:
        ValueError: for ``num_steps`` < 1, an unknown ``reorthogonalize``, a start vector that is zero or not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 Lanczos step is needed")
    if reorthogonalize not in REORTHOGONALIZE:
        raise ValueError(f"reorthogonalize is {reorthogonalize!r}; allowed are {', '.join(map(repr, REORTHOGONALIZE))}")
    if start.ndim != 2:
        raise ValueError(f"start has shape {tuple(start.shape)}; rows of start vectors, (k, n), are needed")
    start = start.to(device=operator.device, dtype=operator.dtype)
    scalars, basis = _iterate(operator, start, min(num_steps, start.shape[1]), reorthogonalize, keep_basis)
    table = scalars.cpu().numpy()  # the one transfer from the device
    norms, steps, nonfinite, broken = table[:, :4].T
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise ValueError(f"start row {bad[0]} has norm {norms[bad[0]]}; start vectors must be finite and not zero")
    alphas, betas = np.split(table[:, 4:], 2, axis=1)
    status = tuple(np.select([nonfinite > 0, broken > 0], ["nonfinite", "breakdown"], "complete").tolist())
    first = nonfinite.astype(int) if nonfinite.any() else None
    kept = basis if keep_basis else None
    return LanczosResult(alphas, betas, norms, steps.astype(int), status, first, alphas.size, kept)


def ritz(alphas: np.ndarray, betas: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and residual bounds, each (k, m), of tridiagonal matrices whose row i counts up to ``steps[i]``.

    Diagonals ``alphas`` (k, m), off-diagonals ``betas[:, :-1]``, final residual norm ``betas[i, steps[i] - 1]``. Rows
    of equal length are solved as one batch in float64, so nothing that pads a row can mix with its eigenvectors.
    """
    nodes, weights, residuals = (np.zeros(alphas.shape) for _ in range(3))
    for length in np.unique(steps):
        rows = np.flatnonzero(steps == length)
        matrices = np.zeros((len(rows), length, length))
        diagonal = np.arange(length)
        matrices[:, diagonal, diagonal] = alphas[rows, :length]
        matrices[:, diagonal[1:], diagonal[:-1]] = betas[rows, : length - 1]  # eigh reads the lower triangle
        values, vectors = np.linalg.eigh(matrices)
        bounds = betas[rows, length - 1, None] * np.abs(vectors[:, -1, :])
        repeated = np.minimum(np.arange(alphas.shape[1]), length - 1)  # the last node pads the row
        nodes[rows], residuals[rows] = values[:, repeated], bounds[:, repeated]
        first = vectors[:, 0, :] ** 2
        weights[rows, :length] = first / first.sum(axis=1, keepdims=True)
    return nodes, weights, residuals


def _iterate(operator: Any, start: Tensor, m: int, reorthogonalize: str, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The loop; nothing in it may look at a value. Scalars (k, 4 + 2 m) and basis (k, m, n), on the device."""
    k, n = start.shape
    tolerance = _ROUNDING * (1 + float(np.log2(n))) * torch.finfo(start.dtype).eps
    full = reorthogonalize == "full"
    basis = torch.empty(k, m, n, dtype=start.dtype, device=start.device) if full or keep else None
    alphas, betas = torch.zeros(2, k, m, dtype=torch.float64, device=start.device)
    norms = _dots(start, start).sqrt()
    scale = beta = steps = nonfinite = torch.zeros_like(norms)
    alive, broken = torch.ones_like(norms, dtype=torch.bool), torch.zeros_like(norms, dtype=torch.bool)
    current, previous = start / norms.to(start.dtype)[:, None], torch.zeros_like(start)
    for j in range(m):
        if basis is not None:
            basis[:, j] = current
        residual = _minus(operator.matmat(current).detach(), beta, previous)
        alpha = _dots(residual, current)
        residual = _minus(residual, alpha, current)
        if full and basis is not None:
            residual = _project_out(_project_out(residual, basis[:, : j + 1]), basis[:, : j + 1])
        elif reorthogonalize == "local":
            residual = _minus(residual, _dots(residual, previous), previous)
            residual = _minus(residual, _dots(residual, current), current)
        beta = _dots(residual, residual).sqrt()
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        nonfinite = torch.where(alive & ~finite, j + 1.0, nonfinite)
        alphas[:, j], betas[:, j] = torch.where(alive, alpha, 0.0), torch.where(alive, beta, 0.0)
        alive = alive & finite
        steps = steps + alive
        scale = torch.maximum(scale, torch.where(alive, alpha.abs() + beta, 0.0))
        small = alive & (beta <= tolerance * scale)
        alive, broken = alive & ~small, broken | small
        beta = torch.where(alive, beta, 1.0)
        # a finished row goes on as the zero vector: its products cost but cannot spoil anything
        previous, current = current, torch.where(alive[:, None], residual / beta.to(residual.dtype)[:, None], 0.0)
    return torch.column_stack([norms, steps, nonfinite, broken.double(), alphas, betas]), basis


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise dot products, (k,) float64: products in their own dtype (roundings average out), float64 sums."""
    pieces = zip(left.split(_COLUMNS, dim=1), right.split(_COLUMNS, dim=1), strict=True)
    return torch.stack([(a * b).sum(1, dtype=torch.float64) for a, b in pieces]).sum(0)


def _minus(vectors: Tensor, factors: Tensor, directions: Tensor) -> Tensor:
    """vectors - factors * directions, row by row."""
    return torch.addcmul(vectors, factors.to(vectors.dtype)[:, None], directions, value=-1)


def _project_out(vectors: Tensor, basis: Tensor) -> Tensor:
    """One Gram-Schmidt pass of (k, n) against (k, j, n): two batched products."""
    coefficients = torch.bmm(basis, vectors[:, :, None])
    return torch.baddbmm(vectors[:, None], coefficients.transpose(1, 2), basis, alpha=-1)[:, 0]
