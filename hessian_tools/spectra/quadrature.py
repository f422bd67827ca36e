"""Spectra as nodes and weights: what stochastic Lanczos quadrature, or a dense matrix, leaves.

For a unit vector u the Ritz values x_i of its tridiagonal T and the squared first components w_i of
T's eigenvectors are the Gauss quadrature of u's spectral measure:
    u' f(A) u ~ sum_i w_i f(x_i),   exact for polynomials up to degree 2m - 1
(Golub & Meurant 2010). The mean over probes estimates (1/n) tr f(A); the weights of every probe sum
to 1. :mod:`hessian_tools.spectra.slq` makes these results.

Shapes: k probes, m nodes (Lanczos steps), n size of the operator, B blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from hessian_tools.errors import NumericalError
from hessian_tools.results import registered
from hessian_tools.shown import Drawable, Record, Tabular

_INVARIANT = 1e-4  # of the largest |node|: with residuals below, the error of a moment is rounding
KNOWN = 0.05  # residual bound of an extreme Ritz value that is an eigenvalue's, relative

Floats = NDArray[np.float64]


@registered
@dataclass(frozen=True)
class Estimate:
    """A mean over probes; ``standard_error`` is sd / sqrt(k), with k - 1 degrees of freedom.

    It is 0 when the value is exact, and nan with a single probe.
    """

    value: float
    standard_error: float
    freedom: float = np.inf

    @property
    def half_width(self) -> float:
        """Of the interval that covers 95 times in 100, by Student's t; nan with a single probe."""
        if self.standard_error == 0:
            return 0.0
        return float(t.ppf(0.975, self.freedom)) * self.standard_error

    def times(self, factor: float) -> "Estimate":
        """The estimate of ``factor`` (> 0) times the quantity."""
        return replace(self, value=factor * self.value, standard_error=factor * self.standard_error)


@registered
@dataclass(frozen=True)
class RitzValue:
    """An extreme Ritz value: an eigenvalue lies within ``residual_bound`` of ``value``.

    (Parlett 1998, theorem 4.5.1.) ``value`` is the most extreme over all probes, which lies inside
    the spectrum up to rounding; ``standard_error`` is that of the probes' extremes, a measure of
    how far they agree (0 when exact, nan with a single probe).
    """

    value: float
    residual_bound: float
    standard_error: float

    @property
    def is_known(self) -> bool:
        """Whether it is an eigenvalue's to 5 %; otherwise it bounds the spectrum's end."""
        return self.residual_bound <= KNOWN * abs(self.value)


@registered
@dataclass(frozen=True, eq=False)
class Quadrature(Drawable):
    """The spectrum of one operator as nodes and weights, from k probes or exact.

    A probe that ended early has ``steps`` < m; its remaining nodes repeat its last one with weight
    exactly 0. ``status`` "breakdown": at least one probe met an invariant subspace, so that its
    nodes are eigenvalues. "exact": one row holds all n eigenvalues of the dense matrix.
    """

    nodes: Floats  # (k, m) Ritz values, ascending; (1, n) when exact
    weights: Floats  # (k, m) each row sums to 1
    # (k, m) bounds beta_m |s_mi| on a node's distance from an eigenvalue; 0 when exact
    residuals: Floats
    steps: NDArray[np.int_]  # (k,) nodes of each probe that carry weight
    size: int  # n
    num_matvecs: int  # products spent
    status: str  # "complete" | "breakdown" | "exact"
    probes: str  # "rademacher" | "gaussian" | "none" (exact)
    reorthogonalize: str  # "full" | "local" | "none" (also when exact)
    # |A - A'|_F / |A|_F of the dense matrix before symmetrising; nan if none was formed
    asymmetry: float = float("nan")

    @property
    def num_probes(self) -> int:
        """k; 1 when exact."""
        return self.nodes.shape[0]

    @property
    def pooled(self) -> tuple[Floats, Floats]:
        """Nodes and weights of the mean over probes, each (at most k m,), without weights of 0."""
        carries = self.weights > 0
        return self.nodes[carries], self.weights[carries] / self.num_probes

    @property
    def pooled_residuals(self) -> Floats:
        """The residual bounds of the ``pooled`` nodes."""
        return self.residuals[self.weights > 0]

    def scaled(self, factor: float) -> "Quadrature":
        """That of the operator times ``factor`` > 0."""
        return replace(self, nodes=factor * self.nodes, residuals=factor * self.residuals)

    def without_probe(self, index: int) -> "Quadrature":
        """This quadrature from the other k - 1 probes; itself when exact."""
        if self.status == "exact":
            return self
        return self.of_probes(np.arange(self.num_probes) != index)

    def of_probes(self, chosen: slice | NDArray[np.bool_]) -> "Quadrature":
        """This quadrature from some of its probes; ``num_matvecs`` stays."""
        return replace(
            self,
            nodes=self.nodes[chosen],
            weights=self.weights[chosen],
            residuals=self.residuals[chosen],
            steps=self.steps[chosen],
        )

    def with_probes(self, other: "Quadrature") -> "Quadrature":
        """These probes followed by those of ``other``, of the same operator and number of steps."""
        broken = "breakdown" in (self.status, other.status)
        return replace(
            self,
            nodes=np.concatenate([self.nodes, other.nodes]),
            weights=np.concatenate([self.weights, other.weights]),
            residuals=np.concatenate([self.residuals, other.residuals]),
            steps=np.concatenate([self.steps, other.steps]),
            num_matvecs=self.num_matvecs + other.num_matvecs,
            status="breakdown" if broken else "complete",
        )

    def per_probe(self, function: Callable[[Floats], Floats]) -> Floats:
        """u' f(A) u for every probe, (k,); ``function`` maps arrays of eigenvalues elementwise."""
        return np.sum(self.weights * function(self.nodes), axis=1)

    def moment(self, power: int) -> Estimate:
        """(1/n) tr(A^p), the mean p-th power of the eigenvalues, p = 0, 1, ... 2m.

        For each probe u it is u'A^p u without error: the quadrature is exact up to p = 2m - 1, and
        at p = 2m it lacks (beta_1 ... beta_m)^2, which its residuals tell (of one step, p = 2 is
        alpha^2 + beta^2). A probe that met an invariant subspace has all its moments.

        Raises:
            ValueError: for a ``power`` that is no such number, with the steps that it needs. What
                the quadrature makes of it is ``per_probe(lambda x: x**power)``, not exact.
            NumericalError: for a moment that is beyond float64.
        """
        values, unit = self._moments(power)
        mean = float(values.mean())
        with np.errstate(over="ignore", under="ignore"):
            factor = float(np.float64(unit) ** power)
        if mean and not 0 < factor < np.inf:
            raise NumericalError(
                f"moment({power}) of eigenvalues up to {unit:.3g} is beyond float64's range; "
                "take a lower power, or multiply the loss by a constant"
            )
        return self._estimate(mean, self._standard_error(values)).times(factor)

    @property
    def trace(self) -> Estimate:
        """tr(A)."""
        return self.moment(1).times(self.size)

    @property
    def rms(self) -> Estimate:
        """Root mean square eigenvalue, sqrt(tr(A^2) / n).

        The standard error follows by the delta method.
        """
        squares, unit = self._moments(2)  # in the unit, as those of 1e-200 are beyond float64
        value = float(np.sqrt(squares.mean()))
        slope = 2 * value or 1  # of a zero operator: 0 +- 0
        return self._estimate(value, self._standard_error(squares) / slope).times(unit)

    @property
    def frobenius(self) -> Estimate:
        """|A|_F = sqrt(n) times ``rms``."""
        return self.rms.times(float(np.sqrt(self.size)))

    @property
    def smallest(self) -> RitzValue:
        """The lowest Ritz value."""
        return self._extreme(0, int(np.argmin(self.nodes[:, 0])))

    @property
    def largest(self) -> RitzValue:
        """The highest Ritz value."""
        return self._extreme(-1, int(np.argmax(self.nodes[:, -1])))

    def _moments(self, power: int) -> tuple[Floats, float]:
        """(k,) values u'A^p u over unit^p, and the unit, near the largest |eigenvalue|."""
        if isinstance(power, bool) or not isinstance(power, Integral) or power < 0:
            raise ValueError(f"power is {power!r}; an integer of at least 0 is needed")
        largest = max(float(np.abs(self.nodes).max()), float(self.residuals.max()))
        unit = largest or 1.0
        values = np.sum(self.weights * (self.nodes / unit) ** int(power), axis=1)
        for probe in np.flatnonzero(2 * self.steps <= power):
            if self._is_invariant(probe):
                continue
            if 2 * self.steps[probe] < power:
                raise ValueError(
                    f"power is {power}; {self.steps[probe]} Lanczos steps give moments up to "
                    f"{2 * self.steps[probe]}: take {-(-power // 2)} steps or more"
                )
            values[probe] += (self._product_of_betas(probe, unit)) ** 2
        return values, unit

    def _is_invariant(self, probe: int) -> bool:
        """Whether the probe's nodes are eigenvalues, and its quadrature exact in every degree."""
        ended = self.steps[probe] < self.nodes.shape[1] or self.steps[probe] >= self.size
        largest = float(np.abs(self.nodes[probe]).max())
        within = float(self.residuals[probe].max()) <= _INVARIANT * largest
        return bool(self.status == "exact" or ended or within)

    def _product_of_betas(self, probe: int, unit: float) -> float:
        """beta_1 ... beta_m of a probe's T, over unit^m, from its nodes, weights and residuals.

        For every node i it is sqrt(w_i) beta_m |s_mi| times the product over j of |x_i - x_j|
        (Parlett 1998, theorem 7.9.2). That of the largest w_i |s_mi|^2 has the least rounding.
        """
        steps = self.steps[probe]
        nodes = self.nodes[probe, :steps] / unit
        ends = np.sqrt(self.weights[probe, :steps]) * (self.residuals[probe, :steps] / unit)
        best = int(np.argmax(ends))
        gaps = np.abs(nodes[best] - np.delete(nodes, best))
        return float(ends[best] * np.prod(gaps))

    def _extreme(self, column: int, probe: int) -> RitzValue:
        return RitzValue(
            value=float(self.nodes[probe, column]),
            residual_bound=float(self.residuals[probe, column]),
            standard_error=self._standard_error(self.nodes[:, column]),
        )

    def _estimate(self, value: float, standard_error: float) -> Estimate:
        return Estimate(value, standard_error, max(self.num_probes - 1, 1))

    def _standard_error(self, values: Floats) -> float:
        """Of the mean of (k,) ``values``, one a probe."""
        if self.status == "exact":
            return 0.0
        if len(values) == 1:
            return float("nan")
        return float(values.std(ddof=1) / np.sqrt(len(values)))


@registered
@dataclass(frozen=True, eq=False)
class BlockSpectra(Tabular, Drawable, Mapping[str, Quadrature]):
    """Quadratures of one matrix's diagonal blocks, by name, in the partition's order."""

    quadratures: dict[str, Quadrature] = field(repr=False)  # B of them
    num_probes: int  # k asked for
    num_steps: int  # m asked for
    seed: int
    probes: str  # kind asked for
    reorthogonalize: str  # asked for; a block that had to deviate says so itself and in ``notes``
    route: str  # how the engine computed the products
    notes: tuple[str, ...] = ()  # whatever a reader should know about single blocks
    curvature: str = "Hessian"  # which matrix, in words

    def __getitem__(self, name: str) -> Quadrature:
        return self.quadratures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.quadratures)

    def __len__(self) -> int:
        return len(self.quadratures)

    def records(self) -> list[Record]:
        """A row a block; ``trace_error`` is a standard error."""
        return [
            {
                "block": name,
                "size": found.size,
                "rms": found.rms.value,
                "smallest": found.smallest.value,
                "largest": found.largest.value,
                "trace": found.trace.value,
                "trace_error": found.trace.standard_error,
                "matvecs": found.num_matvecs,
                "status": found.status,
            }
            for name, found in self.items()
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """(B,) names of the blocks."""
        return tuple(self.quadratures)

    @property
    def num_matvecs(self) -> int:
        """Products spent on all blocks together."""
        return sum(quadrature.num_matvecs for quadrature in self.quadratures.values())


def outliers(quadrature: Quadrature, count: int) -> Floats:
    """At most ``count`` single eigenvalues far outside the bulk, ascending.

    They are Ritz values of the probe that reaches furthest: above 4 times the rms eigenvalue in
    magnitude (a semicircle ends at 2), known to 1 % by their residual bound, of a weight that is
    one eigenvalue's (1/n on average, up to 20/n by chance); the largest in magnitude, copies that
    differ by less than 1e-3 once.
    """
    best = int(np.argmax(np.abs(quadrature.nodes).max(axis=1)))
    nodes = quadrature.nodes[best]
    weights = quadrature.weights[best]
    sizes = np.abs(nodes)
    is_single = (weights > 0) & (weights < 20 / quadrature.size)
    is_known = quadrature.residuals[best] <= 0.01 * sizes
    is_far = sizes > 4 * quadrature.rms.value
    values = nodes[is_single & is_known & is_far]
    is_new = np.diff(values, prepend=-np.inf) > 1e-3 * np.abs(values)
    values = values[is_new]
    return np.sort(values[np.argsort(-np.abs(values))[:count]])
