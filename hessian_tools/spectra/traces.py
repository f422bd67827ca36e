"""Trace and diagonal of an operator from products with random vectors, with standard errors.

Hutchinson (1990): for Rademacher z, E[z'Az] = tr A; the mean over m probes has the variance
2 (|A|_F^2 - sum_i a_ii^2) / m. And E[z * Az] = diag A (Bekas, Kokiopoulou & Saad 2007).

Hutch++ (Meyer, Musco, Musco & Woodruff 2021): Q is an orthonormal basis of A S for a random S. With
the projector P = Q'Q
    tr A = tr(Q A Q') + tr((I - P) A (I - P)),
the first part exactly, the second by Hutchinson with probes independent of Q. Large eigenvalues are
in the first part and add nothing to the variance. Diag++ does the same for the diagonal, with
    A = P A + A P - P A P + (I - P) A (I - P)   (Baston & Nakatsukasa 2022).

XTrace (Epperly, Tropp & Webber 2024): every probe w_i serves twice. Q_i is an orthonormal basis of
A times all probes but w_i, and w_i estimates what Q_i leaves:
    t_i = tr(Q_i A Q_i') + (n - k + 1) u'Au / u'u,   u = (I - Q_i'Q_i) w_i.
The estimate is the mean of t_1 ... t_k. For Gaussian probes u has a uniform direction, so each t_i
is unbiased, whatever the other probes are. All Q_i come from one QR decomposition A W = Q R:
Q_i'Q_i = Q'(I - s s')Q, where s is column i of the transposed inverse of R, of length 1.

The t_i share most of each Q_i and are positively correlated, so that sd / sqrt(k), the error
estimate of that paper, is too small: its 95 % intervals covered 76 to 95 %. What is missing can be
estimated. Let b_ij be the change of t_i when w_j is added to the probes that make Q_i. Over w_i
alone, with all others given, t_i has the mean tr A and b_ij the mean 0, which leaves
cov(t_i, t_j) = E[b_ij b_ji]. The sample variance s^2 of the t_i has the mean var(t_i) -
cov(t_i, t_j), so that
    var(mean) = E[s^2] / k + E[b_ij b_ji].
Both terms are estimated without bias here, the second as the mean over all pairs. That takes
matrices of k rows and columns, k^4 operations, and no further product.

Letters: n size of the operator, m products, k vectors of a sketch, r probes of the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import SymmetricOperator, unit_vectors
from hessian_tools.curvature.target import (
    Shape,
    by_name,
    names_and_shapes,
    single_operator,
    vector_bytes,
)
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.spectra.krylov import Products
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.row_arithmetic import dot_table, dots

Floats = NDArray[np.float64]

# the fewest products of each method: two samples of what is random
TRACE_METHODS = {"hutchinson": 2, "hutch++": 6, "xtrace": 4}
DIAGONAL_METHODS = {"hutchinson": 2, "diag++": 6}

_ROWS = 64  # of a batch, at most
_HELD = 6  # tensors of a batch's size that are alive at once
_SKETCHES = 5  # the sketch, its basis, their products, and two of the factorisation


@registered
@dataclass(frozen=True)
class TraceEstimate:
    """An estimate of the trace; ``exact`` when it is the sum of all diagonal entries."""

    value: float
    standard_error: float  # 0 when exact
    freedom: float  # degrees of freedom of the standard error; inf when exact
    num_matvecs: int  # products spent
    method: str  # "hutchinson" | "hutch++" | "xtrace", as asked for
    exact: bool

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """(low, high) that cover the trace with probability ``level``, by Student's t.

        Raises:
            ValueError: for a ``level`` outside (0, 1).
        """
        reach = _quantile(level, self.freedom) * self.standard_error
        return self.value - reach, self.value + reach


@registered
@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """Estimates of all diagonal entries; ``exact`` when they come from the unit vectors."""

    values: Floats  # (n,)
    standard_errors: Floats  # (n,), 0 when exact
    freedom: float  # degrees of freedom of the standard errors; inf when exact
    num_matvecs: int  # products spent
    method: str  # "hutchinson" | "diag++", as asked for
    exact: bool
    names: tuple[str, ...] = ()  # of the tensors that make up a vector, where they are known
    shapes: tuple[Shape, ...] = ()  # of these tensors

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """(low, high), (n,) each: every entry is covered with probability ``level``, one by one.

        By Student's t, which is wide where probes are few.

        Raises:
            ValueError: for a ``level`` outside (0, 1).
        """
        reach = _quantile(level, self.freedom) * self.standard_errors
        return self.values - reach, self.values + reach

    def named(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and standard errors as float64 tensors, by the names of the parameters.

        Of a whole curvature operator they have the parameters' shapes, of one of its blocks those
        of the pieces that the block is made of.

        Raises:
            ValueError: for an operator that belongs to no parameters.
        """
        values = by_name(self.values, self.names, self.shapes)
        return values, by_name(self.standard_errors, self.names, self.shapes)


def trace(
    operator: Problem | SymmetricOperator,
    method: str = "hutch++",
    *,
    num_matvecs: int = 90,
    seed: int = 0,
    memory: str | int = "auto",
    progress: bool = True,
) -> TraceEstimate:
    """The trace of a symmetric operator of size n, with a standard error.

    On seven planted spectra with 12 to 120 products, 300 seeds each, 95 % intervals covered 92 to
    97 % ("hutchinson"), 91 to 97 % ("hutch++") and 90 to 98 % ("xtrace"). Where the rank is below
    that of the sketch the value is right up to rounding, which a standard error does not contain.

    Args:
        operator: any symmetric operator, one block (``curvature.block(block)``), or a Problem (its
            Hessian).
        method: "hutchinson" takes no memory to speak of; "hutch++" and "xtrace" hold a sketch and
            gain where few eigenvalues are large, as is usual for a Hessian.
        num_matvecs: m, products to spend; n or more give the exact trace from the n unit vectors.
            At least 2, 6 and 4 for the three methods. "hutch++" spends a third each on sketch,
            its products, and the rest; "xtrace" an even number.
        seed: the only source of randomness.
        memory: bytes for vectors, such as "2GiB"; "auto" takes what the operator's own budget
            leaves.
        progress: a bar on stderr, products done, when that is a terminal.
    Raises:
        TypeError: for anything but an operator or a Problem.
        ValueError: for an argument out of range, or memory too small for the sketch.
        NumericalError: for a product with NaN or inf, naming the first such product by its number.
    """
    target = single_operator(operator)
    _check_count(num_matvecs, method, TRACE_METHODS)
    is_exact = num_matvecs >= target.size
    with _sampling(target, num_matvecs, seed, memory, progress) as sampler:
        if is_exact:
            value, error, freedom = float(sampler.diagonal().sum()), 0.0, np.inf
        else:
            value, error, freedom = _TRACES[method](sampler, num_matvecs)
    unit = sampler.products.unit
    return TraceEstimate(
        value=unit * value,
        standard_error=unit * error,
        freedom=freedom,
        num_matvecs=sampler.products.count,
        method=method,
        exact=is_exact,
    )


def diagonal(
    operator: Problem | SymmetricOperator,
    num_matvecs: int,
    method: str = "hutchinson",
    *,
    seed: int = 0,
    memory: str | int = "auto",
    progress: bool = True,
) -> DiagonalEstimate:
    """All n diagonal entries of a symmetric operator, each with a standard error.

    With "hutchinson" the error of entry i comes from the other entries of its row: its variance is
    sum_{j != i} a_ij^2 / m. On planted spectra with 6 to 60 products, 200 seeds each, the 95 %
    intervals of an entry covered 95 % on average. Where a row holds a single entry besides the
    diagonal one, all m samples are equal with probability 2^(1 - m), and the standard error is 0
    then: take m of 6 or more.

    Args:
        num_matvecs: m, products to spend; n or more give the exact diagonal from the n unit
            vectors. At least 2, and 6 for "diag++".
        method: "hutchinson", or "diag++", which takes a low-rank part exactly and holds a sketch of
            m / 3 vectors in memory.
        The others: see :func:`trace`.
    Raises:
        As :func:`trace`.
    """
    target = single_operator(operator)
    _check_count(num_matvecs, method, DIAGONAL_METHODS)
    is_exact = num_matvecs >= target.size
    with _sampling(target, num_matvecs, seed, memory, progress) as sampler:
        if is_exact:
            values, errors, freedom = sampler.diagonal(), np.zeros(target.size), np.inf
        else:
            values, errors, freedom = _diagonal(sampler, num_matvecs, method)
    unit = sampler.products.unit
    names, shapes = names_and_shapes(target)
    return DiagonalEstimate(
        values=unit * values,
        standard_errors=unit * errors,
        freedom=freedom,
        num_matvecs=sampler.products.count,
        method=method,
        exact=is_exact,
        names=names,
        shapes=shapes,
    )


class _Sampler:
    """Random vectors, and products in batches that fit memory, over the unit of ``products``.

    Args:
        products: of the operator.
        seed: with a name the only source of randomness.
        budget: bytes for vectors.
    """

    def __init__(self, products: Products, seed: int, budget: int) -> None:
        self.products = products
        self.operator = products.operator
        self.size = products.operator.size
        self.seed = seed
        self.budget = budget
        self._row = self.size * self.operator.dtype.itemsize

    @property
    def rows(self) -> int:
        """How many vectors go together."""
        fitting = self.budget // (_HELD * self._row)
        return min(_ROWS, max(1, fitting))

    def probes(self, kind: str, name: str, count: int) -> Iterator[Tensor]:
        """``count`` probes in batches, (r, n)."""
        for first in range(0, count, self.rows):
            number = min(self.rows, count - first)
            yield self._drawn(kind, f"{name} {first}", number)

    def applied(self, vectors: Tensor) -> Tensor:
        """Products with the rows of (k, n) ``vectors``, as many at a time as go together."""
        batches = [self.products(some) for some in vectors.split(self.rows)]
        return torch.cat(batches)

    def check_room(self, count: int) -> None:
        """Raises ValueError where a sketch of ``count`` vectors does not fit the budget."""
        needed = _SKETCHES * count * self._row
        if needed > self.budget:
            raise ValueError(
                f"num_matvecs needs {format_bytes(needed)} for a sketch of {count} vectors of "
                f"size {self.size}, but memory is {format_bytes(self.budget)}; pass a smaller "
                'num_matvecs, more memory, or the method "hutchinson"'
            )

    def sketched(self, count: int) -> Tensor:
        """(k, n) orthonormal rows: a basis of A S for ``count`` random signs S."""
        self.check_room(count)
        signs = self._drawn("rademacher", "sketch", count)
        basis, _ = torch.linalg.qr(self.applied(signs).T)
        return basis.T.contiguous()

    def gaussian(self, count: int) -> Tensor:
        """(k, n) Gaussian vectors."""
        return self._drawn("gaussian", "probes", count)

    def diagonal(self) -> Floats:
        """(n,) all diagonal entries, from products with the unit vectors."""
        numbers = torch.arange(self.size, device=self.operator.device)
        entries = []
        for some in numbers.split(self.rows):
            units = unit_vectors(some, self.size, self.operator.dtype)
            products = self.products(units)
            picked = products.gather(1, some[:, None])[:, 0]
            entries.append(picked.double().cpu().numpy())
        return np.concatenate(entries)

    def _drawn(self, kind: str, name: str, count: int) -> Tensor:
        return draw_probes(
            kind,
            self.seed,
            name,
            count,
            self.size,
            dtype=self.operator.dtype,
            device=self.operator.device,
        )


@contextmanager
def _sampling(
    operator: SymmetricOperator,
    num_matvecs: int,
    seed: int,
    memory: str | int,
    progress: bool,
) -> Iterator[_Sampler]:
    """Within it products are made, by the _Sampler that it gives."""
    total = min(num_matvecs, operator.size)
    budget = vector_bytes(operator, memory)
    operator.expect(total)
    with operator.steady(), torch.no_grad(), product_bar(total, shown=progress) as bar:
        yield _Sampler(Products(operator, bar), seed, budget)


def _hutchinson(sampler: _Sampler, num_matvecs: int) -> tuple[float, float, float]:
    samples = [
        dots(probes, sampler.products(probes))
        for probes in sampler.probes("rademacher", "trace", num_matvecs)
    ]
    return _mean(samples)


def _hutch_plus_plus(sampler: _Sampler, num_matvecs: int) -> tuple[float, float, float]:
    basis = sampler.sketched(num_matvecs // 3)
    exactly = float(dots(basis, sampler.applied(basis)).sum())
    samples = []
    for probes in sampler.probes("rademacher", "trace", num_matvecs - 2 * len(basis)):
        outside = probes - (probes @ basis.T) @ basis
        samples.append(dots(outside, sampler.products(outside)))
    value, error, freedom = _mean(samples)
    return exactly + value, error, freedom


def _xtrace(sampler: _Sampler, num_matvecs: int) -> tuple[float, float, float]:
    count = num_matvecs // 2
    sampler.check_room(count)
    probes = sampler.gaussian(count)
    products = sampler.applied(probes)
    columns, triangle = torch.linalg.qr(products.T)
    basis = columns.T.contiguous()
    squares = dots(probes, probes).cpu().numpy()
    forms = dots(probes, products).cpu().numpy()
    del products, columns
    basis_products = sampler.applied(basis)
    small = _Small(
        inside=_gram(basis, basis_products),
        triangle=triangle.double().cpu().numpy(),
        coefficients=_gram(basis, probes),
        product_coefficients=_gram(basis_products, probes),
        squares=squares,
        forms=forms,
        size=sampler.size,
    )
    estimates = small.estimates()
    variance = estimates.var(ddof=1) / count + max(0.0, _covariance(small, estimates))
    # the mean over pairs may be negative, where the covariance is near zero
    return float(estimates.mean()), float(variance**0.5), float(count - 1)


@dataclass(frozen=True, eq=False)
class _Small:
    """All that XTrace needs of k probes W: matrices of k rows and columns."""

    inside: Floats  # (k, k) Q A Q'
    triangle: Floats  # (k, k) R of the QR decomposition A W' = Q' R
    coefficients: Floats  # (k, k) Q W', a column for each probe
    product_coefficients: Floats  # (k, k) Q A W'
    squares: Floats  # (k,) w'w
    forms: Floats  # (k,) w'Aw
    size: int  # n

    def estimates(self) -> Floats:
        """(k,) t_i."""
        count = len(self.triangle)
        left_out = _unit_columns(_with_diagonal(self.triangle))
        along = (left_out * self.coefficients).sum(axis=0)
        shares = self.coefficients - left_out * along  # Q_i w_i in the basis Q
        crossed = (self.product_coefficients * shares).sum(axis=0)
        within = (shares * (self.inside @ shares)).sum(axis=0)
        rest = self.forms - 2 * crossed + within
        lengths = self.squares - (shares**2).sum(axis=0)
        dropped = (left_out * (self.inside @ left_out)).sum(axis=0)
        exactly = np.trace(self.inside) - dropped
        return np.asarray(exactly + (self.size - count + 1) * rest / lengths)

    def without(self, probe: int) -> "_Small":
        """That of all probes but one."""
        kept = np.arange(len(self.triangle)) != probe
        turn, triangle = np.linalg.qr(self.triangle[:, kept])
        return _Small(
            inside=turn.T @ self.inside @ turn,
            triangle=triangle,
            coefficients=turn.T @ self.coefficients[:, kept],
            product_coefficients=turn.T @ self.product_coefficients[:, kept],
            squares=self.squares[kept],
            forms=self.forms[kept],
            size=self.size,
        )


def _covariance(small: _Small, estimates: Floats) -> float:
    """An unbiased estimate of the covariance of two t_i: the mean of b_ij b_ji."""
    count = len(estimates)
    changes = np.zeros((count, count))  # b_ij
    for probe in range(count):
        others = np.arange(count) != probe
        changes[others, probe] = estimates[others] - small.without(probe).estimates()
    return float((changes * changes.T).sum() / (count * (count - 1)))


def _with_diagonal(triangle: Floats) -> Floats:
    """``triangle`` without zeros on the diagonal, which stand for products that are dependent.

    What a basis vector beyond the rank adds is nothing but rounding, so any number will do.
    """
    entries = np.abs(np.diag(triangle))
    least = np.finfo(np.float64).eps * (entries.max() or 1.0)
    missing = np.where(entries < least, least, 0.0)
    return triangle + np.diag(missing)


def _unit_columns(triangle: Floats) -> Floats:
    """Columns of the transposed inverse, of length 1: each orthogonal to all of R but its own."""
    inverse = np.linalg.solve(triangle.T, np.eye(len(triangle)))
    return np.asarray(inverse / np.linalg.norm(inverse, axis=0))


def _gram(left: Tensor, right: Tensor) -> Floats:
    """(k, k) float64 dot products of all rows of two batches."""
    return dot_table(left, right).cpu().numpy()


def _mean(samples: list[Tensor]) -> tuple[float, float, float]:
    """The mean of all ``samples``, its standard error and degrees of freedom."""
    values = torch.cat(samples).cpu().numpy()
    error = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(error), float(len(values) - 1)


_Trace = Callable[[_Sampler, int], tuple[float, float, float]]
_TRACES: dict[str, _Trace] = {
    "hutchinson": _hutchinson,
    "hutch++": _hutch_plus_plus,
    "xtrace": _xtrace,
}


def _diagonal(sampler: _Sampler, num_matvecs: int, method: str) -> tuple[Floats, Floats, float]:
    """Values and standard errors, (n,) each, and degrees of freedom."""
    left = num_matvecs
    exactly: Floats | float = 0.0
    basis: Tensor | None = None
    if method == "diag++":
        basis = sampler.sketched(num_matvecs // 3)
        exactly = _low_rank_diagonal(basis, sampler.applied(basis))
        left -= 2 * len(basis)
    moments = _Moments(sampler.size)
    for probes in sampler.probes("rademacher", "diagonal", left):
        moments.add(probes * _product_outside(sampler, probes, basis))
    return exactly + moments.mean, moments.standard_error, float(left - 1)


def _low_rank_diagonal(basis: Tensor, products: Tensor) -> Floats:
    """(n,) the diagonal of P A + A P - P A P, from (k, n) ``basis`` and its products."""
    inside = basis @ products.T
    once = (basis * products).sum(0, dtype=torch.float64)
    twice = (basis * (inside @ basis)).sum(0, dtype=torch.float64)
    return (2 * once - twice).cpu().numpy()


def _product_outside(sampler: _Sampler, probes: Tensor, basis: Tensor | None) -> Tensor:
    """(I - P) A (I - P) z for each of ``probes``; A z without a basis."""
    if basis is None:
        return sampler.products(probes)
    outside = probes - (probes @ basis.T) @ basis
    products = sampler.products(outside)
    return products - (products @ basis.T) @ basis


class _Moments:
    """Mean and spread of each of n entries, over batches (Chan, Golub & LeVeque 1983)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(size)
        self._squares: Floats = np.zeros(size)

    def add(self, samples: Tensor) -> None:
        """Takes up the rows of (r, n) ``samples``."""
        mean = samples.mean(0, dtype=torch.float64)
        apart = (samples - mean.to(samples.dtype)).square().sum(0, dtype=torch.float64)
        number = len(samples)
        total = self.count + number
        step = mean.cpu().numpy() - self.mean
        self.mean += step * (number / total)
        self._squares += apart.cpu().numpy() + step**2 * (self.count * number / total)
        self.count = total

    @property
    def standard_error(self) -> Floats:
        """(n,) of the mean."""
        return np.sqrt(self._squares / (self.count * (self.count - 1)))


def _check_count(num_matvecs: int, method: str, methods: Mapping[str, int]) -> None:
    if method not in methods:
        allowed = ", ".join(map(repr, methods))
        raise ValueError(f"method is {method!r}; allowed are {allowed}")
    least = methods[method]
    is_whole = isinstance(num_matvecs, Integral) and not isinstance(num_matvecs, bool)
    if not is_whole or num_matvecs < least:
        raise ValueError(
            f"num_matvecs is {num_matvecs!r}; {method!r} needs a whole number, at least {least}"
        )


def _quantile(level: float, freedom: float) -> float:
    """What a Student t variable stays below in absolute value with probability ``level``."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; pass a probability between 0 and 1, such as 0.95")
    return float(stdtrit(min(freedom, 1e9), (1 + level) / 2))
