"""Preconditioners: symmetric positive definite matrices P, known through P^-1/2.

A preconditioned step w <- w - eta P^-1 g is gradient descent in the coordinates u = P^1/2 w, where
the curvature A becomes P^-1/2 A P^-1/2. P never mixes two parameter tensors, so P^-1/2 is applied
tensor by tensor.

Letters: r rows (vectors) of a batch; m, n the sides of a parameter seen as a matrix, its first axis
against all others.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Eigenvalues of a Kronecker factor below minus this many floors are no rounding.
_NEGATIVE_FLOORS = 10.0


class Preconditioner(ABC):
    """A symmetric positive definite P, block-diagonal over the parameter tensors."""

    @abstractmethod
    def inverse_root(self, name: str, tensor: Tensor) -> Tensor:
        """P^-1/2 of parameter ``name`` times each row of ``tensor``, (r, \\*shape).

        The result is in this preconditioner's dtype, or in that of ``tensor`` where that is wider.
        """

    @abstractmethod
    def to(self, dtype: torch.dtype, device: torch.device) -> "Preconditioner":
        """One of the same P, whose products are in ``dtype`` on ``device``."""

    @abstractmethod
    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless P is given for exactly these ``parameters``, in their shapes."""

    def inverse(self, name: str, tensor: Tensor) -> Tensor:
        """P^-1 of parameter ``name`` times each row of ``tensor``, (r, \\*shape)."""
        return self.inverse_root(name, self.inverse_root(name, tensor))


class DiagonalPreconditioner(Preconditioner):
    """P = diag(d), as of Adam, whose d is sqrt(v) over its bias correction, plus eps.

    Args:
        diagonal: d by parameter name, each of its parameter's shape, positive and finite.

    Raises:
        ValueError: for an entry that is not positive and finite, naming the parameter.
    """

    def __init__(self, diagonal: Mapping[str, Tensor]) -> None:
        for name, d in diagonal.items():
            _check_positive(name, d)
        self.diagonal = {name: d.detach().clone() for name, d in diagonal.items()}
        self._roots = {name: _inverse_roots(d) for name, d in self.diagonal.items()}

    def inverse_root(self, name: str, tensor: Tensor) -> Tensor:
        return tensor * self._roots[name]

    def to(self, dtype: torch.dtype, device: torch.device) -> "DiagonalPreconditioner":
        moved = copy.copy(self)
        # From d each time: what is widened later has lost nothing.
        moved.diagonal = {name: d.to(device) for name, d in self.diagonal.items()}
        moved._roots = {name: _inverse_roots(d).to(dtype) for name, d in moved.diagonal.items()}
        return moved

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        _check_names(self.diagonal, parameters)
        for name, d in self.diagonal.items():
            if d.shape != parameters[name].shape:
                raise ValueError(
                    f"the preconditioner's diagonal of {name} has shape {tuple(d.shape)}, and the "
                    f"parameter {tuple(parameters[name].shape)}; give a number for every entry"
                )


class KroneckerPreconditioner(Preconditioner):
    """P = L^p kron R^p on a parameter seen as an (m, n) matrix, as of Shampoo (arXiv 1802.09568).

    P^-1/2 G = L^(-p/2) G R^(-p/2). It mixes the rows of G, and its columns. A block that is a piece
    of a tensor therefore has no P of its own: its diagonal block of P^-1/2 A P^-1/2 depends on
    entries of A outside of it.

    Roots are taken from eigenvalues in float64. Eigenvalues below ``relative_floor`` times the
    largest are raised to that.

    Args:
        factors: (L, R) by parameter name, (m, m) and (n, n) symmetric positive semidefinite, where
            m is the parameter's first axis and n all others together. For L = sum G G' and
            R = sum G'G the step of Shampoo is L^-1/4 G R^-1/4.
        power: p: 1/4 for Shampoo's step, 1/2 for that of Shampoo^2.
        others: the diagonal of P by name for parameters without factors, such as biases.
        relative_floor: default max(m, n) times the eps of the factors' dtype.

    Raises:
        ValueError: for a factor that is not square, symmetric and finite, has no positive
            eigenvalue or a negative one beyond rounding; for a ``power`` or ``relative_floor`` out
            of range; for a parameter with factors and a diagonal.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        *,
        power: float = 0.25,
        others: Mapping[str, Tensor] | None = None,
        relative_floor: float | None = None,
    ) -> None:
        if not 0 < power <= 1:
            raise ValueError(f"power is {power}; above 0 and at most 1 is needed (Shampoo: 0.25)")
        if relative_floor is not None and not 0 < relative_floor < 1:
            raise ValueError(f"relative_floor is {relative_floor}; between 0 and 1 is needed")
        self.power = power
        self._others = DiagonalPreconditioner(others or {})
        twice = sorted(self._others.diagonal.keys() & factors.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} has factors and a diagonal; give one of them")
        self._exact: dict[str, tuple[Tensor, Tensor]] = {}  # roots in float64
        for name, (left, right) in factors.items():
            exponent = -power / 2
            one = _matrix_power(f"L of {name}", left, exponent, relative_floor)
            two = _matrix_power(f"R of {name}", right, exponent, relative_floor)
            self._exact[name] = (one, two)
        self._roots = self._exact

    def inverse_root(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._roots:
            return self._others.inverse_root(name, tensor)
        left, right = self._roots[name]
        rows = tensor.reshape(len(tensor), len(left), len(right))
        dtype = torch.promote_types(rows.dtype, left.dtype)
        product = left.to(dtype) @ rows.to(dtype) @ right.to(dtype)
        return product.reshape(tensor.shape)

    def to(self, dtype: torch.dtype, device: torch.device) -> "KroneckerPreconditioner":
        moved = copy.copy(self)
        moved._others = self._others.to(dtype, device)
        moved._roots = {
            name: (left.to(device, dtype), right.to(device, dtype))
            for name, (left, right) in self._exact.items()
        }
        return moved

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        _check_names([*self._exact, *self._others.diagonal], parameters)
        rest = {name: p for name, p in parameters.items() if name not in self._exact}
        self._others.check(rest)
        for name, (left, right) in self._exact.items():
            shape = tuple(parameters[name].shape)
            rows = shape[0] if shape else 1
            if (len(left), len(right)) != (rows, math.prod(shape[1:])):
                raise ValueError(
                    f"the factors of {name} have sizes {len(left)} and {len(right)}, but the "
                    f"parameter has shape {shape}; sizes {rows} and {math.prod(shape[1:])} are "
                    "needed"
                )


def _check_names(known: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
    known = set(known)
    missing = [name for name in parameters if name not in known]
    if missing:
        raise ValueError(
            f"the preconditioner does not cover {', '.join(missing[:3])}"
            f"{_and_more(missing)}; give one for every trainable parameter of the Problem"
        )
    foreign = sorted(known - parameters.keys())
    if foreign:
        raise ValueError(
            f"the preconditioner holds {', '.join(foreign[:3])}{_and_more(foreign)}, no trainable "
            "parameter of the Problem; names are those of problem.parameters"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _check_positive(name: str, d: Tensor) -> None:
    bad = ~(torch.isfinite(d) & (d > 0))
    if bad.any():
        value = float(d[bad].flatten()[0])
        raise ValueError(
            f"the preconditioner's diagonal of {name} holds {value:g}; every entry must be "
            "positive and finite (Adam adds eps for that)"
        )


def _inverse_roots(d: Tensor) -> Tensor:
    """d^-1/2, rounded once to the dtype of d or to float64."""
    return d.double().rsqrt()


def _matrix_power(
    what: str,
    factor: Tensor,
    exponent: float,
    relative_floor: float | None,
) -> Tensor:
    """``factor`` to a negative ``exponent``, in float64."""
    size = len(factor) if factor.ndim else 0
    if factor.shape != (size, size) or not size:
        raise ValueError(
            f"{what} has shape {tuple(factor.shape)}; a square matrix is needed, one row for each "
            "row (L) or column (R) of the parameter"
        )
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"{what} holds NaN or inf; check how it was gathered")
    eps = torch.finfo(factor.dtype).eps
    floor = size * eps if relative_floor is None else relative_floor
    matrix = factor.detach().double()
    asymmetry = float((matrix - matrix.T).abs().max() / matrix.abs().max().clamp_min(1e-300))
    if asymmetry > 100 * eps:
        raise ValueError(
            f"{what} is not symmetric: max |A - A'| is {asymmetry:.1e} of its largest entry; pass "
            "(A + A') / 2 if that is meant"
        )
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    smallest, largest = float(values[0]), float(values[-1])
    if largest <= 0 or smallest < -_NEGATIVE_FLOORS * floor * largest:
        raise ValueError(
            f"{what} has eigenvalues from {smallest:.3g} to {largest:.3g}; a positive semidefinite "
            "matrix with a positive eigenvalue is needed"
        )
    raised = values.clamp_min(floor * largest)
    return (vectors * raised**exponent) @ vectors.T
