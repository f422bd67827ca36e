"""Whether eigenvalues were overlooked: a run from a random vector orthogonal to those found.

A Krylov space holds one vector of each eigenspace, so in exact arithmetic the second copy of a
repeated eigenvalue is never seen. A run from a new random vector v, orthogonal to those found, sees
it. When the run may end is decided by what v would have shown: with the orthonormal polynomials p_j
of v's spectral measure, v's squared component along the eigenvectors of eigenvalues at or beyond t,
where t is outside all Ritz values, is at most
    1 / sum_j p_j(t)^2
(the Christoffel function: Golub & Meurant 2010, chapter 2). Along one direction it is below
pi d^2 / (2 n) with a probability of about d alone. The run ends where the bound falls below that,
d = 1e-4, or where its outermost Ritz pairs have converged.

Letters: n size of the operator without the locked vectors, j polynomials.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hessian_tools.spectra.krylov import Floats, Krylov, Ritz

_OVERLOOKED = 1e-4  # d


def overlooked(
    space: Krylov,
    low: float,
    high: float,
    *,
    tolerance: float,
    is_spent: Callable[[], bool],
) -> tuple[Floats, bool]:
    """Eigenvalues below ``low`` or above ``high``, and whether it is settled that they are there.

    Their vectors are the rows after the locked ones then. None, settled, is the usual outcome.

    Args:
        space: not yet stepped, from one random vector.
        low, high: -inf or inf for an end that does not matter.
        tolerance: of a residual, over the unit of the products.
        is_spent: whether no further product may be made.
    """
    if space.is_whole:  # the locked rows span everything
        return np.zeros(0), True
    sides = [_Side(space, t, sign) for t, sign in ((low, -1), (high, 1)) if math.isfinite(t)]
    every = max(1, len(space.rows) // 32)
    while True:
        space.step()
        for side in sides:
            side.take_up()
        is_bounded = all(side.is_bounded for side in sides)
        must_look = is_bounded or space.is_full or space.is_whole or is_spent()
        if not must_look and space.size % every:
            continue
        ritz = space.ritz()
        outside = np.flatnonzero((ritz.values < low) | (ritz.values > high))
        is_exact = bool((ritz.residuals[outside] <= tolerance).all())
        if len(outside) and (is_exact or is_spent()):
            space.restart(ritz, outside)
            return ritz.values[outside], is_exact
        if not len(outside) and all(side.is_settled(ritz, tolerance) for side in sides):
            return np.zeros(0), True
        if is_spent():
            return np.zeros(0), False
        if space.is_full:
            space.restart(ritz, _outermost(space, sides))


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


def _outermost(space: Krylov, sides: list[_Side]) -> NDArray[np.intp]:
    """Half of the Ritz vectors, those outermost at the ends in question."""
    most = len(space.rows) - space.locked - 2 * space.pending
    kept = max(1, most // 2)
    signs = {side.sign for side in sides}
    from_above = kept // len(signs) if 1 in signs else 0
    from_below = kept - from_above if -1 in signs else 0
    above = np.arange(space.size - from_above, space.size)
    return np.concatenate([np.arange(from_below), above])
