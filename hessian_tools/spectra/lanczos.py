"""The symmetric Lanczos process for many start vectors at once.

A step costs one operator product and never makes the host wait for a device. In exact arithmetic
m steps from q_1 = v / |v| give orthonormal Q = [q_1 ... q_m] and tridiagonal T (diagonal alpha,
off-diagonal beta) with
    A Q = Q T + beta_m q_{m+1} e_m'                        (Golub & Van Loan, 4th ed., 10.1)
In floating point orthogonality is lost as soon as a Ritz value converges (Paige 1980).
``reorthogonalize`` says what is done about it:

- "full": classical Gram-Schmidt against all earlier vectors. A second pass follows where the first
  took much away, and always on a device, which would have to be waited for to know (twice is
  enough, Giraud et al. 2005). T is the projection of A on a truly orthonormal basis: every Ritz
  value stands for a different eigenvector, so nodes can be counted. Needs the basis, k*m*n.
- "local": each vector is made orthogonal to its two predecessors once more. Three vectors a row.
  Global orthogonality is still lost: converged eigenvalues come back as further, nearly equal nodes
  that share the weight. Densities and moments keep their accuracy (Greenbaum 1989: T is that of a
  nearby spectrum of clusters), counts of nodes do not.
- "none": the three-term recurrence alone, the cheapest and the literature's choice; like "local",
  but the copies appear a little earlier.

Each row runs in a unit of its own, the power of two near the largest entry of its first product:
squares of float32 leave its range below 1e-19 and above 1e19 (those of float64 below 1e-154 and
above 1e154), which would look like a breakdown, or like a product that is inf. c A thus gives c
times the numbers of A, to the last digit where c is a power of two.

With ``keep_state`` the result carries a :class:`LanczosState`, from which :func:`resume` makes
further steps without repeating any.

Shapes: k start vectors (rows), m steps, n size of the operator.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.spectra.row_arithmetic import divided, dots, project_out, subtract, units

REORTHOGONALIZE = ("full", "local", "none")
_ROUNDING = 8.0  # breakdown below this times (1 + log2 n) roundings of the operator's scale


@dataclass(eq=False)
class LanczosState:
    """Where a run stands after m steps: all that further steps need, on the operator's device.

    Whoever goes on from a state leaves it as it is, so that it can be used again.
    """

    previous: Tensor  # (k, n) Lanczos vector m; zero before the first step
    current: Tensor  # (k, n) Lanczos vector m + 1; zero in a row that has ended
    basis: tuple[Tensor, ...]  # pieces (k, m_i, n), together all m vectors; empty when not kept
    alphas: Tensor  # (k, m) float64
    betas: Tensor  # (k, m) float64
    norms: Tensor  # (k,) float64, of the start vectors
    unit: Tensor  # (k,) float64, powers of two: what each row's products are divided by
    beta: Tensor  # (k,) float64, the last one over the unit; 1 in a row that has ended
    scale: Tensor  # (k,) float64, the largest (|alpha| + beta) over the unit so far
    steps: Tensor  # (k,) float64, valid steps
    nonfinite: Tensor  # (k,) float64, first step (from 1) with NaN or inf, 0 for none
    alive: Tensor  # (k,) bool
    broken: Tensor  # (k,) bool, ended by breakdown
    reorthogonalize: str
    keeps_basis: bool  # the caller asked for the basis

    @property
    def num_steps(self) -> int:
        """m."""
        return self.alphas.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of vectors held."""
        return sum(vectors.nbytes for vectors in (self.previous, self.current, *self.basis))


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What m steps from k start vectors leave; entries past a row's ``steps`` are 0.

    A row ends early, with status "breakdown", when its next residual is rounding noise: its Krylov
    space is invariant and its Ritz values are eigenvalues. A row whose product was NaN or inf has
    status "nonfinite".
    """

    alphas: NDArray[np.float64]  # (k, m) diagonal of T
    # (k, m); [:, j] couples steps j and j + 1, at steps - 1 it is the norm of the final residual
    betas: NDArray[np.float64]
    start_norms: NDArray[np.float64]  # (k,) Euclidean norms of the start vectors
    steps: NDArray[np.int_]  # (k,) valid steps of each row
    status: tuple[str, ...]  # (k,) "complete" | "breakdown" | "nonfinite"
    # (k,) first step (from 1) with NaN or inf, 0 for none; None without any
    first_nonfinite: NDArray[np.int_] | None
    num_matvecs: int  # products spent, those of finished rows included
    # (k, m, n) Lanczos vectors, in the operator's dtype and on its device, when asked for
    basis: Tensor | None
    state: LanczosState | None = None  # for :func:`resume`, when asked for


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    num_steps: int,
    *,
    reorthogonalize: str = "full",
    keep_basis: bool = False,
    keep_state: bool = False,
) -> LanczosResult:
    """Run m = min(num_steps, n) Lanczos steps on every row of ``start``, (k, n), at once.

    Vectors are kept in the operator's dtype, scalars accumulate in float64.

    Breakdown after step j: beta_j <= 8 (1 + log2 n) eps(dtype) scale, where scale is the largest
    |alpha| + beta that the row has seen (at most sqrt(2) |A|) and (1 + log2 n) eps bounds the
    rounding of a pairwise sum of n terms. The bound is kept low on purpose: to go on from noise is
    harmless with re-orthogonalisation (a new direction of weight (beta / scale)^2), to stop early
    would lose small eigenvalues.

    Raises:
        ValueError: for ``num_steps`` < 1, an unknown ``reorthogonalize``, a start vector that is
            zero or not finite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 Lanczos step is needed")
    if reorthogonalize not in REORTHOGONALIZE:
        allowed = ", ".join(map(repr, REORTHOGONALIZE))
        raise ValueError(f"reorthogonalize is {reorthogonalize!r}; allowed are {allowed}")
    if start.ndim != 2:
        given = tuple(start.shape)
        raise ValueError(f"start has shape {given}; rows of start vectors, (k, n), are needed")
    start = start.to(device=operator.device, dtype=operator.dtype)
    state = _before_the_first_step(start, reorthogonalize, keep_basis)
    state = _run(operator, state, min(num_steps, start.shape[1]), overwrite=True)
    result = _result(state, keep_state)
    # only now: before the run a device would have to be waited for
    _check_norms(result.start_norms)
    return result


def resume(
    operator: SymmetricOperator,
    state: LanczosState,
    num_steps: int,
    *,
    keep_state: bool = False,
) -> LanczosResult:
    """Goes on from ``state`` until min(num_steps, n) steps are made in all.

    Up to rounding these are the numbers of one long run. ``operator`` must be the one that the run
    began with. ``num_matvecs`` counts from the beginning.

    Raises:
        ValueError: for a ``num_steps`` below those already made, or an operator of another dtype
            or device.
    """
    total = min(num_steps, state.current.shape[1])
    if total < state.num_steps:
        made = f"{state.num_steps} steps are made"
        raise ValueError(
            f"num_steps is {num_steps}, but {made}; name a total of at least that many"
        )
    vectors = state.current
    if (operator.dtype, operator.device) != (vectors.dtype, vectors.device):
        raise ValueError(
            f"operator is {operator.dtype} on {operator.device}, but the run's vectors are "
            f"{vectors.dtype} on {vectors.device}; pass the operator it began with"
        )
    return _result(_run(operator, state, total), keep_state)


def _before_the_first_step(start: Tensor, reorthogonalize: str, keep_basis: bool) -> LanczosState:
    unit = units(start)
    current = divided(start, unit)
    norms = dots(current, current).sqrt()
    current.div_(norms.to(start.dtype)[:, None])
    norms = norms * unit
    zeros = torch.zeros_like(norms)
    no_steps = norms.new_zeros(len(norms), 0)
    return LanczosState(
        previous=torch.zeros_like(start),
        current=current,
        basis=(),
        alphas=no_steps,
        betas=no_steps,
        norms=norms,
        unit=torch.ones_like(norms),  # until there is a product
        beta=zeros,
        scale=zeros,
        steps=zeros,
        nonfinite=zeros,
        alive=torch.ones_like(norms, dtype=torch.bool),
        broken=torch.zeros_like(norms, dtype=torch.bool),
        reorthogonalize=reorthogonalize,
        keeps_basis=keep_basis,
    )


def _check_norms(norms: NDArray[np.float64]) -> None:
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        row = bad[0]
        raise ValueError(
            f"start row {row} has norm {norms[row]}; start vectors must be finite and not zero"
        )


def _run(
    operator: SymmetricOperator,
    given: LanczosState,
    num_steps: int,
    overwrite: bool = False,
) -> LanczosState:
    """``given`` taken to ``num_steps`` steps; its own vectors are kept unless ``overwrite``.

    No step may look at a value on a device: the host would wait for it.
    """
    done = given.num_steps
    state = _with_room(given, num_steps)
    # Vectors that are no longer needed hold the next residual: fresh memory costs more than the
    # arithmetic. The first two that fall free are those of ``given``.
    free: Tensor | None = None
    with operator.steady():
        for j in range(done, num_steps):
            retiring = state.previous
            _step(operator, state, j, free)
            free = retiring if overwrite or j >= done + 2 else None
    return state


def _with_room(state: LanczosState, num_steps: int) -> LanczosState:
    """A copy with tables, and a further piece of the basis where one is kept, for all steps."""
    k, n = state.current.shape
    further = num_steps - state.num_steps
    room = state.alphas.new_zeros(k, further)
    basis = state.basis
    if further and (state.reorthogonalize == "full" or state.keeps_basis):
        basis = (*basis, state.current.new_empty(k, further, n))
    return replace(
        state,
        basis=basis,
        alphas=torch.cat([state.alphas, room], dim=1),
        betas=torch.cat([state.betas, room], dim=1),
    )


def _step(operator: SymmetricOperator, state: LanczosState, j: int, free: Tensor | None) -> None:
    """Step j (from 0): beta_j q_{j+1} = A q_j - beta_{j-1} q_{j-1} - alpha_j q_j, over the unit."""
    vectors_so_far = _remember(state, j)
    residual = _product_less_previous(operator, state, j, free)
    alpha = dots(residual, state.current)
    subtract(residual, alpha, state.current)
    beta = _reorthogonalised(residual, state, vectors_so_far).sqrt()
    _record(state, j, alpha, beta)
    _advance(state, residual)


def _remember(state: LanczosState, j: int) -> tuple[Tensor, ...]:
    """Stores q_j where the basis is kept, and gives that: pieces, together (k, j + 1, n)."""
    if not state.basis:
        return ()
    *earlier, last = state.basis
    column = j - sum(piece.shape[1] for piece in earlier)
    last[:, column] = state.current
    return (*earlier, last[:, : column + 1])


def _product_less_previous(
    operator: SymmetricOperator, state: LanczosState, j: int, free: Tensor | None
) -> Tensor:
    """A q_j over the unit - beta_{j-1} q_{j-1}, (k, n), written over ``free``."""
    product = operator.matmat(state.current).detach()  # perhaps the operator's own memory
    if j == 0:
        state.unit = units(product)
    residual = torch.empty_like(state.current) if free is None else free
    divided(product, state.unit, out=residual)
    subtract(residual, state.beta, state.previous)
    return residual


def _reorthogonalised(
    residual: Tensor, state: LanczosState, vectors_so_far: tuple[Tensor, ...]
) -> Tensor:
    """Makes ``residual`` orthogonal once more, in place; (k,) float64 squares of its norms."""
    if state.reorthogonalize == "full":
        taken = project_out(residual, vectors_so_far)
        if not _waits(residual):
            square = dots(residual, residual)
            # a first pass that took half of any row's square leaves its rounding
            # (factor 0.7: Daniel et al. 1976)
            if not (0.51 * square < 0.49 * taken).numpy().any():
                return square
        project_out(residual, vectors_so_far)
    elif state.reorthogonalize == "local":
        subtract(residual, dots(residual, state.previous), state.previous)
        subtract(residual, dots(residual, state.current), state.current)
    return dots(residual, residual)


def _record(state: LanczosState, j: int, alpha: Tensor, beta: Tensor) -> None:
    """Writes alpha_j and beta_j, (k,), of the rows under way, and ends rows that broke down.

    Both come over the unit, and are written without it.
    """
    finite = torch.isfinite(alpha) & torch.isfinite(beta)
    state.nonfinite = torch.where(state.alive & ~finite, j + 1.0, state.nonfinite)
    alive = state.alive & finite
    alpha = torch.where(alive, alpha, 0.0)
    beta = torch.where(alive, beta, 0.0)
    state.alphas[:, j] = alpha * state.unit
    state.betas[:, j] = beta * state.unit
    state.steps = state.steps + alive
    state.scale = torch.maximum(state.scale, alpha.abs() + beta)
    small = alive & (beta <= _rounding(state.current) * state.scale)
    state.broken = state.broken | small
    state.alive = alive & ~small
    state.beta = torch.where(state.alive, beta, 1.0)


def _rounding(vectors: Tensor) -> float:
    """What rounding may leave of a zero residual, as a fraction of the operator's scale."""
    sum_of_terms = 1 + float(np.log2(vectors.shape[1]))
    return _ROUNDING * sum_of_terms * torch.finfo(vectors.dtype).eps


def _advance(state: LanczosState, residual: Tensor) -> None:
    """``residual`` / beta_j becomes the current vector; zero in rows that have ended."""
    state.previous = state.current
    state.current = residual.div_(state.beta.to(residual.dtype)[:, None])
    if _waits(residual) or not state.alive.numpy().all():
        state.current.masked_fill_(~state.alive[:, None], 0.0)  # so that it can spoil nothing


def _waits(vectors: Tensor) -> bool:
    """Whether to look at a value would make the host wait for a device."""
    return vectors.device.type != "cpu"


def _result(state: LanczosState, keep_state: bool) -> LanczosResult:
    """What a run leaves, on the host."""
    columns = [state.norms, state.steps, state.nonfinite, state.broken.double()]
    table = torch.column_stack([*columns, state.alphas, state.betas])
    on_host = table.cpu().numpy()  # the one transfer from the device
    norms, steps, nonfinite, broken = on_host[:, :4].T
    alphas, betas = np.split(on_host[:, 4:], 2, axis=1)
    status = np.select([nonfinite > 0, broken > 0], ["nonfinite", "breakdown"], "complete")
    basis = None
    if state.keeps_basis:
        basis = state.basis[0] if len(state.basis) == 1 else torch.cat(state.basis, dim=1)
    return LanczosResult(
        alphas=alphas,
        betas=betas,
        start_norms=norms,
        steps=steps.astype(int),
        status=tuple(status.tolist()),
        first_nonfinite=nonfinite.astype(int) if nonfinite.any() else None,
        num_matvecs=alphas.size,
        basis=basis,
        state=state if keep_state else None,
    )
