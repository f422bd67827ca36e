"""Tangents of elementwise chains as combinations of few held tangents with known coefficients.

A chain of elementwise operations, whatever its length, has the tangent sum_i c_i t_i: one pass over
memory a term. Coefficients are numbers, or values that do not depend on the probes.

Letters: k probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.graph import Node
from hessian_tools.curvature.tangent.program import Call, Tangent, Tangents, Values


@dataclass(frozen=True)
class Coefficient:
    """``factor`` times the value of ``node`` (1 if None)."""

    factor: float = 1.0
    node: Node | None = None


ONE = Coefficient()
Form = dict[Tangent, Coefficient]  # the tangent sum_i c_i t_i, terms broadcast against each other


@dataclass(frozen=True)
class _Term:
    """One of the terms c_i t_i, as a sum reads it."""

    factor: float
    place: int | None  # of the coefficient's value among the constants; None: the factor alone
    full: bool  # the tangent has the sum's shape, so it needs no broadcasting

    @property
    def order(self) -> tuple[bool, int]:
        """Full terms first, so that the later ones can be added in place; numbers before values."""
        return not self.full, -1 if self.place is None else self.place

    def value(self, values: Values) -> Tensor | None:
        return None if self.place is None else values[self.place]


def combination(form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
    """The step's call that adds up ``form``, (k, *shape), in one pass over memory a live term.

    Its constants are the nodes of the coefficients that have one, in the form's order.
    """
    terms = _terms(form, shape)

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        live = [
            (term, tangent if term.full else _aligned(tangent, len(shape)))
            for term, tangent in zip(terms, tangents, strict=True)
            if tangent is not None
        ]
        (first, tangent), *others = sorted(live, key=lambda pair: pair[0].order)
        total = _multiple(tangent, first.factor, first.value(values))
        written = total is not tangent  # else it is someone else's memory
        for term, tangent in others:
            out = total if written and total.shape[1:] == shape else None
            total = _add_multiple(total, tangent, term.factor, term.value(values), out)
            written = True
        return total.expand(k, *shape).to(dtype)

    return call


def _terms(form: Form, shape: tuple[int, ...]) -> Sequence[_Term]:
    terms = []
    constants = 0
    for tangent, coefficient in form.items():
        place = None
        if coefficient.node is not None:
            place = constants
            constants += 1
        terms.append(_Term(coefficient.factor, place, tangent.shape == shape))
    return terms


def _aligned(tangent: Tensor, ndim: int) -> Tensor:
    """With axes of length 1 after the probes', so that it broadcasts against (k, *shape)."""
    missing = ndim - (tangent.ndim - 1)
    return tangent.reshape(tangent.shape[0], *[1] * missing, *tangent.shape[1:])


def _multiple(tangent: Tensor, factor: float, value: Tensor | None) -> Tensor:
    """factor * value * tangent; the tangent itself where that is 1."""
    if value is None:
        return tangent if factor == 1.0 else tangent * factor
    product = tangent * value
    return product if factor == 1.0 else product.mul_(factor)


def _add_multiple(
    total: Tensor,
    tangent: Tensor,
    factor: float,
    value: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """total + factor * value * tangent, written into ``out`` if given."""
    if value is None:
        return torch.add(total, tangent, alpha=factor, out=out)
    return torch.addcmul(total, tangent, value, value=factor, out=out)
