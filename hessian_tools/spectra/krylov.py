"""A basis of Lanczos vectors that is restarted with Ritz vectors when its memory is full.

V holds m orthonormal rows, T = V A V', and what a product leaves outside is kept as p further
orthonormal rows Q that are not yet multiplied:
    A V' = V' T + Q' C',   C (m, p) the coupling
A step multiplies Q, adds it to V and takes what is left of the products, orthogonal to all, as the
next Q. For an eigenvector s of T with value t, the Ritz vector s'V has the residual norm |C's|,
known without a product. When V is full, some Ritz vectors replace it: T becomes the diagonal of
their values and C becomes S'C, so that the relation above still holds (thick restart: Wu & Simon
2000; with p > 1 the block form). All rows are kept orthogonal by repeated classical Gram-Schmidt
(twice is enough: Giraud et al. 2005), also to "locked" rows at the front, which take no part: the
run then sees (I - P) A (I - P), P their projector.

A Krylov space holds one vector of each eigenspace, so in exact arithmetic the second copy of a
repeated eigenvalue is never seen. A run from a new random vector v, orthogonal to those found, sees
it (:func:`overlooked`). When the run may end is decided by what v would have shown: with the
orthonormal polynomials p_j of v's spectral measure, v's squared component along the eigenvectors of
eigenvalues at or beyond t, where t is outside all Ritz values, is at most
    1 / sum_j p_j(t)^2
(the Christoffel function: Golub & Meurant 2010, chapter 2). Along one direction it is below
pi d^2 / (2 n) with a probability of about d alone. The run ends where the bound falls below that,
d = 1e-4, or where its outermost Ritz pairs have converged.

Letters: n size of the operator, without locked vectors where there are any; m vectors of the basis,
p pending vectors, j polynomials.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.errors import nonfinite_product
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.row_arithmetic import dot_table, straighten, turn_rows, units

Floats = NDArray[np.float64]

_ROUNDING = 10.0  # what is left of a product below so many roundings of |A| is nothing
_OVERLOOKED = 1e-4  # d
_PASSES = 4  # of Gram-Schmidt, at most
_COLUMNS = 1 << 18  # of all vectors, worked on at a time


class Products:
    """Products of an operator, counted and checked, in a unit of its own.

    The unit is the power of two near the largest entry of the first product, so that squares of
    tiny or huge entries stay within the dtype's range. ``scale`` is the largest |Ritz value| seen,
    over the unit.
    """

    def __init__(self, operator: SymmetricOperator, bar: tqdm) -> None:
        self.operator = operator
        self.bar = bar
        self.count = 0
        self.unit = 1.0
        self.scale = 0.0
        self.eps = torch.finfo(operator.dtype).eps

    def __call__(self, vectors: Tensor) -> Tensor:
        """A v over the unit for each row of (r, n) ``vectors``.

        Raises:
            NumericalError: naming the first product that holds NaN or inf.
        """
        products = self.operator.matmat(vectors).detach()
        self.bar.update(len(vectors))
        finite = torch.isfinite(products).all(dim=1).tolist()
        if not all(finite):
            raise nonfinite_product("", f"in product {self.count + finite.index(False) + 1}")
        if self.count == 0:
            self.unit = float(units(products).max())
        self.count += len(vectors)
        return products * (1 / self.unit)

    @property
    def noise(self) -> float:
        """What rounding may leave of a product that should vanish."""
        return _ROUNDING * self.eps * self.scale


class Ritz:
    """Eigenpairs of T: ``values`` (m,) ascending, ``residuals`` (m,), ``turn`` (m, m) columns."""

    def __init__(self, values: Floats, residuals: Floats, turn: Floats) -> None:
        self.values = values
        self.residuals = residuals
        self.turn = turn


class Krylov:
    """The basis V, T and C of the module's docstring.

    Args:
        products: of the operator.
        rows: (capacity, n) memory; its first ``locked`` rows are orthonormal and stay.
        start: (p, n) the first vectors, made orthonormal here.
        fresh: what random vectors are keyed by when an invariant space is found.
    """

    def __init__(
        self,
        products: Products,
        rows: Tensor,
        start: Tensor,
        fresh: tuple[int, str],
        locked: int = 0,
    ) -> None:
        self.products = products
        self.rows = rows
        self.locked = locked
        self.size = 0
        self.pending = 0
        self.restarts = 0
        self._drawn = 0
        self._fresh = fresh
        self._block = len(start)
        self.projected = np.zeros((len(rows), len(rows)))
        self.coupling = np.zeros((0, 0))
        self._append(start, 0.0)

    @property
    def is_whole(self) -> bool:
        """Whether V and the locked rows span everything, so that Ritz pairs are exact."""
        return self.pending == 0

    @property
    def is_full(self) -> bool:
        """Whether there is no room for the vectors that the next step leaves."""
        used = self.locked + self.size + 2 * self.pending
        return used > len(self.rows)

    def step(self) -> None:
        """Multiplies the pending vectors and takes up the products."""
        first = self.locked + self.size
        end = first + self.pending
        products = self.products(self.rows[first:end])
        inside = self._project_out(products, end)[:, self.locked :]
        old, new = self.size, self.size + self.pending
        # the part within the pending vectors themselves is symmetric up to rounding
        square = inside[:, old:]
        self.projected[old:new, old:new] = (square + square.T) / 2
        self.projected[old:new, :old] = inside[:, :old]
        self.projected[:old, old:new] = inside[:, :old].T
        largest = np.abs(inside).max(initial=0.0)
        self.products.scale = max(self.products.scale, float(largest))
        self.size = new
        left = self._append(products, self.products.noise)
        self.coupling = np.zeros((new, self.pending))
        self.coupling[old:, : left.shape[1]] = left

    def ritz(self) -> Ritz:
        """All Ritz pairs at present."""
        matrix = self.projected[: self.size, : self.size]
        values, turn = np.linalg.eigh(matrix)
        residuals = np.linalg.norm(self.coupling.T @ turn, axis=0)
        largest = np.abs(values).max(initial=0.0)
        self.products.scale = max(self.products.scale, float(largest))
        return Ritz(values, residuals, turn)

    def restart(self, ritz: Ritz, kept: NDArray[np.intp]) -> None:
        """Goes on with the Ritz vectors ``kept`` and the pending ones."""
        turn = ritz.turn[:, kept]
        first, last = self.locked, self.locked + self.size
        begin = first + len(kept)
        for piece in self.rows.split(_COLUMNS, dim=1):
            waiting = piece[last : last + self.pending].clone()
            turn_rows(piece[first:last], turn)
            piece[begin : begin + self.pending] = waiting
        straighten(self.rows[first:begin])
        self.coupling = turn.T @ self.coupling
        self.projected[:] = 0
        self.size = len(kept)
        np.fill_diagonal(self.projected[: self.size, : self.size], ritz.values[kept])
        self.restarts += 1

    def _project_out(self, vectors: Tensor, end: int) -> Floats:
        """Makes (r, n) ``vectors`` orthogonal to the first ``end`` rows, in place.

        Returns the coefficients of one pass, (r, end) float64.
        """
        basis = self.rows[:end]
        coefficients = dot_table(vectors, basis)
        factors = coefficients.to(vectors.dtype)
        for v, q in zip(vectors.split(_COLUMNS, 1), basis.split(_COLUMNS, 1), strict=True):
            v.sub_(factors @ q)
        return coefficients.cpu().numpy()

    def _append(self, vectors: Tensor, noise: float) -> Floats:
        """Makes what is left of (r, n) ``vectors`` the pending rows; those of norm <= ``noise`` go.

        They come orthogonal to all rows but for rounding. Where nothing is left, random vectors are
        taken, which the basis is not coupled to: C is zero then, and every Ritz pair exact.

        Returns:
            their coefficients in the new rows, (r, p).
        """
        begin = self.locked + self.size
        self.pending = 0
        coefficients = np.zeros((len(vectors), len(vectors)))
        room = min(self.products.operator.size, len(self.rows))
        for number, vector in enumerate(vectors):
            row = begin + self.pending
            inside, norm = self._orthogonalised(vector[None], row)
            coefficients[number, : self.pending] = inside[begin:]
            if norm > noise and row < room:
                self.rows[row] = vector / norm
                coefficients[number, self.pending] = norm
                self.pending += 1
        found = self.pending
        if not found:
            self._append_random(begin)
        return coefficients[:, :found]

    def _orthogonalised(self, vector: Tensor, end: int) -> tuple[Floats, float]:
        """Makes ``vector`` (1, n) orthogonal to the first ``end`` rows, in place.

        A pass that takes away most of it leaves rounding that is not small beside the rest, so
        another follows. Returns the coefficients, (end,), and the norm of what is left.
        """
        total = np.zeros(end)
        norm = _norm(vector)
        for _ in range(_PASSES):
            before = norm
            total += self._project_out(vector, end)[0]
            norm = _norm(vector)
            if norm > 0.7 * before:
                break
        return total, norm

    def _append_random(self, begin: int) -> None:
        """Random pending rows, as many as a block has, while there is room for them."""
        room = min(self.products.operator.size, len(self.rows)) - begin
        for _ in range(min(self._block, room)):
            row = begin + self.pending
            seed, name = self._fresh
            key = f"{name} again {self._drawn}"
            vector = random_rows(self.products.operator, seed, key, 1)
            self._drawn += 1
            _, norm = self._orthogonalised(vector, row)
            self.rows[row] = vector[0] / norm
            self.pending += 1


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def random_rows(operator: SymmetricOperator, seed: int, name: str, count: int) -> Tensor:
    """(count, n) Gaussian vectors of length about 1, keyed by ``seed`` and ``name``."""
    rows = draw_probes(
        "gaussian",
        seed,
        name,
        count,
        operator.size,
        dtype=operator.dtype,
        device=operator.device,
    )
    return rows / operator.size**0.5


def overlooked(
    space: Krylov,
    low: float,
    high: float,
    *,
    tolerance: float,
    is_spent: Callable[[], bool],
) -> tuple[Floats, bool]:
    """Eigenvalues below ``low`` or above ``high``, and whether that is settled.

    Their vectors are the rows after the locked ones then. None, settled, is the usual outcome.

    Args:
        space: not yet stepped, from one random vector.
        low, high: -inf or inf for an end that does not matter.
        tolerance: of a residual, over the unit of the products.
        is_spent: whether no further product may be made.
    """
    if space.is_whole:  # the locked rows span everything
        return np.zeros(0), True
    run = _Run(space, low, high, tolerance)
    while True:
        is_last = run.step() or is_spent()
        if is_last or run.is_due:
            found, is_settled = run.look()
            if is_settled or is_spent():
                return found, is_settled
        if space.is_full:
            run.restart()


class _Run:
    """The run of :func:`overlooked`."""

    def __init__(self, space: Krylov, low: float, high: float, tolerance: float) -> None:
        ends = ((low, -1), (high, 1))
        self.sides = [_Side(space, t, sign) for t, sign in ends if math.isfinite(t)]
        self._space = space
        self._low, self._high = low, high
        self._tolerance = tolerance
        self._every = max(1, len(space.rows) // 32)

    def step(self) -> bool:
        """A product; whether eigenvalues are excluded at all ends."""
        self._space.step()
        for side in self.sides:
            side.take_up()
        return all(side.is_bounded for side in self.sides)

    @property
    def is_due(self) -> bool:
        """Whether it is time for a look at the Ritz values."""
        space = self._space
        return space.is_full or space.is_whole or space.size % self._every == 0

    def look(self) -> tuple[Floats, bool]:
        """Ritz values outside the limits, and whether this is settled.

        Where they are eigenvalues, or none is there, or no product is left, that is the end.
        """
        ritz = self._space.ritz()
        is_outside = (ritz.values < self._low) | (ritz.values > self._high)
        outside = np.flatnonzero(is_outside)
        if not len(outside):
            return np.zeros(0), all(side.is_settled(ritz, self._tolerance) for side in self.sides)
        converged = outside[ritz.residuals[outside] <= self._tolerance]
        # all are waited for, unless some would be lost at a restart
        if len(converged) == len(outside) or (self._space.is_full and len(converged)):
            self._space.restart(ritz, converged)
            return ritz.values[converged], True
        return np.zeros(0), False

    def restart(self) -> None:
        """Goes on with half of the Ritz vectors, those outermost at the ends in question."""
        space = self._space
        most = len(space.rows) - space.locked - 2 * space.pending
        kept = max(len(self.sides), most // 2)
        signs = [side.sign for side in self.sides]
        from_above = kept // len(signs) if 1 in signs else 0
        from_below = kept - from_above if -1 in signs else 0
        above = np.arange(space.size - from_above, space.size)
        space.restart(space.ritz(), np.concatenate([np.arange(from_below), above]))


class _Side:
    """One end of the spectrum: is an eigenvalue beyond ``t`` excluded?"""

    def __init__(self, space: Krylov, t: float, sign: int) -> None:
        self.sign = sign  # 1: above t, -1: below
        self.is_bounded = False
        self._space = space
        self._t = t
        self._previous = 0.0
        self._current = 1.0  # p_j(t)
        self._beta = 0.0
        self._total = 1.0
        free = space.products.operator.size - space.locked
        self._enough = 2 * free / (math.pi * _OVERLOOKED**2)

    def take_up(self) -> None:
        """Adds the step just made to the sum of p_j(t)^2; after a restart there are no more p_j."""
        if self.is_bounded or self._space.restarts:
            return
        last = self._space.size - 1
        alpha = self._space.projected[last, last]
        beta = np.linalg.norm(self._space.coupling[last])
        if beta == 0:  # an invariant space: its Ritz values tell
            return
        following = (self._t - alpha) * self._current - self._beta * self._previous
        self._previous, self._current = self._current, float(following / beta)
        self._beta = float(beta)
        self._total += self._current**2
        self.is_bounded = self._total > self._enough

    def is_settled(self, ritz: Ritz, tolerance: float) -> bool:
        """Whether no eigenvalue is beyond t, where no Ritz value is."""
        outermost = ritz.residuals[-1 if self.sign > 0 else 0]
        return self.is_bounded or bool(outermost <= tolerance)
