"""Tangents of elementwise chains as combinations of few held tangents with known coefficients.

A chain of elementwise operations, whatever its length, has the tangent sum_i c_i t_i: one pass over
memory a term. Coefficients are numbers, or values that do not depend on the probes.

Letters: k probes.
"""

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


def in_order(form: Form, shape: tuple[int, ...]) -> Form:
    """The terms of a sum of this shape in the order in which they are cheapest to add up.

    Terms of the full shape come first, so that later ones can be added in place, and plain numbers
    before other coefficients.
    """

    def key(item: tuple[Tangent, Coefficient]) -> tuple[bool, bool]:
        tangent, coefficient = item
        return tangent.shape != shape, coefficient.node is not None

    return dict(sorted(form.items(), key=key))


def combination(
    form: Form,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Call:
    """The call that adds up ``form``, (k, *shape), in one pass over memory a live term.

    Its constants are the nodes of the coefficients that have one, in the form's order.
    """

    def call(k: int, tangents: Tangents, values: Values) -> Tensor:
        following = iter(values)
        total: Tensor | None = None
        written = False  # else the total is memory that others read
        for (term, coefficient), tangent in zip(form.items(), tangents, strict=True):
            value = None if coefficient.node is None else next(following)
            if tangent is None:
                continue
            if term.shape != shape:
                tangent = _aligned(tangent, len(shape))
            if total is None:
                total = _multiple(tangent, coefficient.factor, value)
                written = total is not tangent
            else:
                out = total if written and total.shape[1:] == shape else None
                total = _add_multiple(total, tangent, coefficient.factor, value, out)
                written = True
        assert total is not None  # a step runs only where some tangent is not zero
        return total.expand(k, *shape).to(dtype)

    return call


def _aligned(tangent: Tensor, ndim: int) -> Tensor:
    """With axes of length 1 after the probes', so that it broadcasts against (k, *shape)."""
    k, *shape = tangent.shape
    missing = ndim - len(shape)
    return tangent.reshape(k, *[1] * missing, *shape)


def _multiple(
    tangent: Tensor,
    factor: float,
    value: Tensor | None,
) -> Tensor:
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
