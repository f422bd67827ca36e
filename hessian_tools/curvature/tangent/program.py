"""Tangent programs: what a linearised gradient is compiled into, and how it runs.

Letters: k probes. A tangent of a value of shape s is a tensor (k, *s).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Tensor]
Node = Any  # fx.Node, whose arguments have too many types to be of use


@dataclass(frozen=True, eq=False)
class Base:
    """A tangent that is computed and held."""

    shape: tuple[int, ...]  # without the probes' axis
    dtype: torch.dtype


@dataclass(frozen=True)
class Coefficient:
    """``factor`` times the value of ``node`` (1 if None)."""

    factor: float = 1.0
    node: Node | None = None


Form = dict[Base, Coefficient]  # the tangent sum_i c_i t_i, terms broadcast against each other


@dataclass(frozen=True, eq=False)
class Step:
    """out = call(k, tangents, constants); a tangent that is zero in a program comes as None."""

    out: Base
    inputs: tuple[Base, ...]
    constants: tuple[Node, ...]
    call: Call
    view: bool = False  # shares its input's memory


@dataclass(eq=False)
class Program:
    """The steps between some parameters' tangents and some gradients', in order."""

    steps: list[
        tuple[Step, tuple[bool, ...], tuple[Base, ...]]
    ]  # step, which inputs live, what is free after it
    inputs: list[Base]
    outputs: list[Base | None]  # None: zero

    def __call__(
        self, cotangents: Sequence[Tensor], values: Mapping[Node, Any]
    ) -> list[Tensor | None]:
        """(k, *shape) tangents of the parameters to those of the gradients; None stands for zeros."""
        probes = len(cotangents[0])
        held = {base: v.to(base.dtype) for base, v in zip(self.inputs, cotangents, strict=True)}
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".torch.jit.script. is deprecated"
            )  # torch's own, under vmap
            for step, live, finished in self.steps:
                tangents = [
                    held[base] if alive else None
                    for base, alive in zip(step.inputs, live, strict=True)
                ]
                held[step.out] = step.call(
                    probes, tangents, [values[node] for node in step.constants]
                )
                del tangents
                for base in finished:
                    del held[base]
        return [None if base is None else held[base] for base in self.outputs]

    def live_bytes(self) -> int:
        """Most bytes of tangents held at a time, a probe, without those of the caller."""
        owner: dict[Base, Base] = {}  # whose memory a tangent lies in
        users: dict[Base, int] = {}
        most = now = 0
        for step, _, finished in self.steps:
            owner[step.out] = owner.get(step.inputs[0], step.inputs[0]) if step.view else step.out
            root = owner[step.out]
            users[root] = users.get(root, 0) + 1
            now += 0 if step.view else tangent_bytes(root)
            most = max(most, now)
            for base in finished:
                root = owner.get(base, base)
                users[root] = users.get(root, 0) - 1
                now -= tangent_bytes(root) if users[root] == 0 and root in owner else 0
        return most


def tangent_bytes(base: Base) -> int:
    return math.prod(base.shape) * base.dtype.itemsize


def weighted(
    shape: tuple[int, ...], dtype: torch.dtype, terms: list[tuple[Base, Coefficient]]
) -> Call:
    """sum of coefficient times tangent, (k, *shape), one pass over memory a live term."""
    full = [base.shape == shape for base, _ in terms]
    places, position = [], 0
    for _, coefficient in terms:
        places.append(position if coefficient.node is not None else -1)
        position += coefficient.node is not None

    def call(k: int, tangents: list[Tensor | None], values: list[Any]) -> Tensor:
        live = sorted(
            (i for i, t in enumerate(tangents) if t is not None),
            key=lambda i: (not full[i], places[i]),
        )
        total, own = torch.empty(0), False  # own: written here, so the next term may go into it
        for i in live:
            tangent, factor = tangents[i], terms[i][1].factor
            assert tangent is not None
            value = values[places[i]] if places[i] >= 0 else None
            if not full[i]:
                tangent = tangent.reshape(
                    k, *[1] * (len(shape) - tangent.ndim + 1), *tangent.shape[1:]
                )
            if i == live[0]:
                plain = value is None and factor == 1.0
                total = tangent if plain else tangent * (factor if value is None else value)
                if value is not None and factor != 1.0:
                    total = total.mul_(factor)
                own = not plain and total.shape[1:] == shape
            elif value is None:
                total = (
                    total.add_(tangent, alpha=factor)
                    if own
                    else torch.add(total, tangent, alpha=factor)
                )
            elif own:
                total = total.addcmul_(tangent, value, value=factor)
            else:
                total = torch.addcmul(total, tangent, value, value=factor)
            own = own or (i != live[0] and total.shape[1:] == shape)
        return total.expand(k, *shape).to(dtype)

    return call
