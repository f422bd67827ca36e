"""The symmetric Lanczos process, batched over start vectors, with one operator product and no host sync a step.

In exact arithmetic m steps from q_1 = v / |v| give orthonormal Q = [q_1 ... q_m], tridiagonal T (diagonal alpha,
off-diagonal beta) and
    A Q = Q T + beta_m q_{m+1} e_m'                                (Golub & Van Loan, 4th ed., 10.1)
In floating point orthogonality is lost as soon as a Ritz value converges (Paige 1980). What is done about it,
``reorthogonalize``:

- "full": classical Gram-Schmidt against all earlier vectors, twice where the first pass took much away, and always
  where looking would make a device wait (Giraud et al. 2005: twice is enough). T is the projection of A on a truly
  orthonormal basis: every Ritz value stands for a different eigenvector, so nodes can be counted. Needs the basis,
  k*m*n.
- "local": each vector is made orthogonal to its two predecessors once more. Three vectors a probe. Global orthogonality
  is lost all the same: converged eigenvalues come back as further, nearly equal nodes that share the weight. Densities
  and moments keep their accuracy (Greenbaum 1989: T is that of a nearby spectrum of clusters), counts of nodes do not.
- "none": the three-term recurrence alone, the cheapest and the literature's choice; as "local", the copies appear a
  little earlier.

A run can go on: with ``keep_state`` the result carries what the next step needs (:class:`LanczosState`: the two last
vectors, and for "full" the basis), and :func:`resume` makes further steps from there without repeating any.

Shapes: k start vectors (rows), m steps, n size of the operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

REORTHOGONALIZE = ("full", "local", "none")
_COLUMNS = 1 << 22  # that are taken at a time, so that no copy of the whole batch is made
_CACHED = 1 << 18  # entries of a batch that stay in a CPU's cache from one operation to the next
_ROUNDING = 8.0  # breakdown below this times (1 + log2 n) roundings of the operator's scale


@dataclass(frozen=True, eq=False)
class LanczosState:
    """Where a run stands after m steps: all that further steps need, in the operator's dtype and on its device."""

    previous: Tensor  # (k, n) Lanczos vector m; zero before the first step
    current: Tensor  # (k, n) Lanczos vector m + 1; zero in a row that has ended
    basis: tuple[
        Tensor, ...
    ]  # pieces (k, m_i, n), together the m vectors so far; empty when not kept
    alphas: Tensor  # (k, m) float64
    betas: Tensor  # (k, m) float64
    norms: Tensor  # (k,) float64, of the start vectors
    beta: Tensor  # (k,) float64, the last one; 1 in a row that has ended
    scale: Tensor  # (k,) float64, the largest |alpha| + beta so far
    steps: Tensor  # (k,) float64, valid steps
    nonfinite: Tensor  # (k,) float64, first step (from 1) with NaN or inf, 0 for none
    alive: Tensor  # (k,) bool
    broken: Tensor  # (k,) bool
    reorthogonalize: str
    keeps_basis: bool  # the caller asked for the basis

    @property
    def nbytes(self) -> int:
        """Bytes of vectors held."""
        return sum(t.nbytes for t in (self.previous, self.current, *self.basis))


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What m steps from k start vectors leave; entries past a row's ``steps`` are 0.

    A row ends early, with status "breakdown", when its next residual is rounding noise: its Krylov space is invariant
    and its Ritz values are eigenvalues. A row whose product was NaN or inf has status "nonfinite".
    """

    alphas: np.ndarray  # (k, m) float64 diagonal of T
    betas: (
        np.ndarray
    )  # (k, m) float64, [:, j] couples steps j and j + 1; at steps - 1 the final residual norm
    start_norms: np.ndarray  # (k,) float64 Euclidean norms of the start vectors
    steps: np.ndarray  # (k,) int, valid steps of each row
    status: tuple[str, ...]  # (k,) "complete" | "breakdown" | "nonfinite"
    first_nonfinite: (
        np.ndarray | None
    )  # (k,) int, first step (from 1) with NaN or inf, 0 for none; None without any
    num_matvecs: int  # products spent, those of finished rows included
    basis: (
        Tensor | None
    )  # (k, m, n) Lanczos vectors, in the operator's dtype and on its device, when asked for
    state: LanczosState | None = None  # for :func:`resume`, when asked for


def lanczos(
    operator: Any, start: Tensor, num_steps: int, *, reorthogonalize: str = "full", keep_basis: bool = False,
    keep_state: bool = False,
) -> LanczosResult:  # fmt: skip
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
        raise ValueError(
            f"reorthogonalize is {reorthogonalize!r}; allowed are {', '.join(map(repr, REORTHOGONALIZE))}"
        )
    if start.ndim != 2:
        raise ValueError(
            f"start has shape {tuple(start.shape)}; rows of start vectors, (k, n), are needed"
        )
    start = start.to(device=operator.device, dtype=operator.dtype)
    state = _started(start, reorthogonalize, keep_basis)
    state = _iterate(operator, state, min(num_steps, start.shape[1]), fresh=True)
    result = _result(state, keep_state)
    bad = np.flatnonzero(~(np.isfinite(result.start_norms) & (result.start_norms > 0)))
    if bad.size:
        norm = result.start_norms[bad[0]]
        raise ValueError(
            f"start row {bad[0]} has norm {norm}; start vectors must be finite and not zero"
        )
    return result


def resume(
    operator: Any, state: LanczosState, num_steps: int, *, keep_state: bool = False
) -> LanczosResult:
    """Goes on from ``state`` to min(num_steps, n) steps in all; the same numbers as one long run, up to rounding.

    ``operator`` must be the one that the run began with. ``num_matvecs`` counts from the beginning.

    Raises:
        ValueError: for a ``num_steps`` below those already made, or an operator of another dtype or device.
    """
    done = state.alphas.shape[1]
    total = min(num_steps, state.current.shape[1])
    if total < done:
        raise ValueError(
            f"num_steps is {num_steps}, but {done} steps are made; name a total of at least that many"
        )
    if (operator.dtype, operator.device) != (state.current.dtype, state.current.device):
        has, holds = (
            f"{operator.dtype} on {operator.device}",
            f"{state.current.dtype} on {state.current.device}",
        )
        raise ValueError(
            f"operator is {has}, but the run's vectors are {holds}; pass the operator it began with"
        )
    return _result(_iterate(operator, state, total), keep_state)


def ritz(
    alphas: np.ndarray, betas: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        matrices[:, diagonal[1:], diagonal[:-1]] = betas[
            rows, : length - 1
        ]  # eigh reads the lower triangle
        values, vectors = np.linalg.eigh(matrices)
        bounds = betas[rows, length - 1, None] * np.abs(vectors[:, -1, :])
        repeated = np.minimum(np.arange(alphas.shape[1]), length - 1)  # the last node pads the row
        nodes[rows], residuals[rows] = values[:, repeated], bounds[:, repeated]
        first = vectors[:, 0, :] ** 2
        weights[rows, :length] = first / first.sum(axis=1, keepdims=True)
    return nodes, weights, residuals


def _started(start: Tensor, reorthogonalize: str, keep_basis: bool) -> LanczosState:
    """No step made yet."""
    norms = _dots(start, start).sqrt()
    zeros, table = torch.zeros_like(norms), norms.new_zeros(len(norms), 0)
    alive, broken = (
        torch.ones_like(norms, dtype=torch.bool),
        torch.zeros_like(norms, dtype=torch.bool),
    )
    current = start / norms.to(start.dtype)[:, None]
    scalars = (table, table, norms, zeros, zeros, zeros, zeros, alive, broken)
    return LanczosState(torch.zeros_like(start), current, (), *scalars, reorthogonalize, keep_basis)


def _result(state: LanczosState, keep_state: bool) -> LanczosResult:
    """What a run leaves, on the host."""
    ends = (state.norms, state.steps, state.nonfinite, state.broken.double())
    table = (
        torch.column_stack([*ends, state.alphas, state.betas]).cpu().numpy()
    )  # the one transfer from the device
    norms, steps, nonfinite, broken = table[:, :4].T
    alphas, betas = np.split(table[:, 4:], 2, axis=1)
    status = tuple(
        np.select([nonfinite > 0, broken > 0], ["nonfinite", "breakdown"], "complete").tolist()
    )
    first, kept = nonfinite.astype(int) if nonfinite.any() else None, None
    if state.keeps_basis:
        kept = state.basis[0] if len(state.basis) == 1 else torch.cat(state.basis, dim=1)
    going_on = state if keep_state else None
    return LanczosResult(
        alphas, betas, norms, steps.astype(int), status, first, alphas.size, kept, going_on
    )


def _iterate(operator: Any, state: LanczosState, m: int, fresh: bool = False) -> LanczosState:
    """The loop, up to step m; nothing in it may look at a value on a device that would have to be waited for.

    ``fresh``: nobody else holds the vectors of ``state``, so they may be written over.
    """
    k, n = state.current.shape
    done, full = state.alphas.shape[1], state.reorthogonalize == "full"
    tolerance = _ROUNDING * (1 + float(np.log2(n))) * torch.finfo(state.current.dtype).eps
    basis = state.basis
    if (full or state.keeps_basis) and m > done:
        basis = (*basis, state.current.new_empty(k, m - done, n))
    alphas, betas = (
        torch.cat([old, old.new_zeros(k, m - done)], dim=1) for old in (state.alphas, state.betas)
    )
    previous, current, beta, scale = state.previous, state.current, state.beta, state.scale
    steps, nonfinite, alive, broken = state.steps, state.nonfinite, state.alive, state.broken
    waits = state.current.device.type != "cpu"
    own: list[
        Tensor
    ] = []  # vectors made here that nobody needs any more: fresh memory costs more than arithmetic
    for j in range(done, m):
        if basis:
            basis[-1][:, j - done] = current
        product = operator.matmat(current).detach()  # perhaps the operator's own memory
        residual = own.pop() if own else torch.empty_like(current)
        torch.addcmul(product, beta.to(product.dtype)[:, None], previous, value=-1, out=residual)
        del product
        alpha = _dots(residual, current)
        _subtract(residual, alpha, current)
        square = None
        if full:
            pieces = (*basis[:-1], basis[-1][:, : j - done + 1])
            taken = _project_out(residual, pieces)
            # a first pass that took half of any row's square leaves its rounding (factor 0.7: Daniel et al. 1976)
            if waits or (0.51 * (square := _dots(residual, residual)) < 0.49 * taken).numpy().any():
                _project_out(residual, pieces)
                square = None
        elif state.reorthogonalize == "local":
            _subtract(residual, _dots(residual, previous), previous)
            _subtract(residual, _dots(residual, current), current)
        beta = (_dots(residual, residual) if square is None else square).sqrt()
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        nonfinite = torch.where(alive & ~finite, j + 1.0, nonfinite)
        alphas[:, j], betas[:, j] = torch.where(alive, alpha, 0.0), torch.where(alive, beta, 0.0)
        alive = alive & finite
        steps = steps + alive
        scale = torch.maximum(scale, torch.where(alive, alpha.abs() + beta, 0.0))
        small = alive & (beta <= tolerance * scale)
        alive, broken = alive & ~small, broken | small
        beta = torch.where(alive, beta, 1.0)
        if fresh or j > done + 1:  # else the state's
            own.append(previous)
        previous, current = current, residual.div_(beta.to(residual.dtype)[:, None])
        if waits or not alive.numpy().all():
            current.masked_fill_(
                ~alive[:, None], 0.0
            )  # a finished row goes on as zero: it can spoil nothing
    return replace(
        state, previous=previous, current=current, basis=basis, alphas=alphas, betas=betas, beta=beta, scale=scale,
        steps=steps, nonfinite=nonfinite, alive=alive, broken=broken,
    )  # fmt: skip


def _chunks(vectors: Tensor) -> list[slice]:
    """Columns to take at a time: on a CPU so many that they stay in the cache between operations."""
    rows, columns = vectors.shape
    size = max(_CACHED // rows, 1 << 14) if vectors.device.type == "cpu" else _COLUMNS
    return [slice(first, min(first + size, columns)) for first in range(0, columns, size)]


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise dot products, (k,) float64: products in their own dtype (roundings average out), float64 sums."""
    parts = [(left[:, c] * right[:, c]).sum(1, dtype=torch.float64) for c in _chunks(left)]
    return torch.stack(parts).sum(0)


def _subtract(vectors: Tensor, factors: Tensor, directions: Tensor) -> None:
    """vectors - factors * directions, row by row, in place."""
    vectors.addcmul_(factors.to(vectors.dtype)[:, None], directions, value=-1)


def _project_out(vectors: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """One Gram-Schmidt pass of (k, n) against pieces (k, j, n), in place; the squares of what it took, (k,)."""
    taken, chunks = vectors.new_zeros(len(vectors), dtype=torch.float64), _chunks(vectors)
    for piece in basis:
        # a row times a matrix is the fast way, (k, 1, j)
        parts = [torch.bmm(vectors[:, None, c], piece[..., c].transpose(1, 2)) for c in chunks]
        coefficients = torch.stack(parts).sum(0, dtype=torch.float64)
        taken += coefficients.square().sum((1, 2))
        coefficients = coefficients.to(vectors.dtype)
        for c in chunks:
            vectors[:, c] -= torch.bmm(coefficients, piece[..., c])[:, 0]
    return taken
