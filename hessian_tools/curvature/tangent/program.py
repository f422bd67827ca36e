"""Tangent programs: what a gradient's graph is compiled into, and how it runs.

Letters: k probes. A tangent of a value of shape s is a tensor (k, *s).
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.graph import Node

Tangents = Sequence[Tensor | None]  # (k, *shape) each, None for zero
Values = Sequence[Tensor]
Call = Callable[[int, Tangents, Values], Tensor]  # k, tangents, constants -> a tangent


@dataclass(frozen=True, eq=False)
class Tangent:
    """A tangent that a program computes and holds; ``shape`` is without the probes' axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def is_like(self, other: "Tangent") -> bool:
        return (self.shape, self.dtype) == (other.shape, other.dtype)

    @property
    def probe_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Step:
    """out = call(k, tangents, constants); a tangent that is zero in a program comes as None."""

    out: Tangent
    inputs: tuple[Tangent, ...]
    constants: tuple[Node, ...]
    call: Call
    view: bool = False  # shares its input's memory


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A step in one program."""

    step: Step
    live: tuple[bool, ...]  # by input: whether its tangent is not zero
    finished: tuple[Tangent, ...]  # what no later step reads


@dataclass(frozen=True, eq=False)
class Program:
    """The steps between some parameters' tangents and some gradients', in order."""

    steps: list[Scheduled]
    inputs: list[Tangent]
    outputs: list[Tangent | None]  # None: zero

    @torch.no_grad()
    def __call__(
        self,
        cotangents: Sequence[Tensor],
        values: Mapping[Node, Tensor],
    ) -> list[Tensor | None]:
        """(k, *shape) tangents of the parameters to those of the gradients, None for zeros."""
        probes = len(cotangents[0])
        held = {
            tangent: given.to(tangent.dtype)
            for tangent, given in zip(self.inputs, cotangents, strict=True)
        }
        with warnings.catch_warnings():
            # torch's own, under vmap
            warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
            for scheduled in self.steps:
                _run(scheduled, probes, held, values)
        return [None if tangent is None else held[tangent] for tangent in self.outputs]

    def live_bytes(self) -> int:
        """Most bytes of tangents held at a time, a probe, without those of the caller."""
        owner: dict[Tangent, Tangent] = {}  # whose memory a tangent lies in
        holders: Counter[Tangent] = Counter()  # by owner: how many tangents lie in its memory
        now = 0
        most = 0
        for scheduled in self.steps:
            out = scheduled.step.out
            if scheduled.step.view:
                # no new memory, but that of what is viewed stays until the view is finished
                viewed = scheduled.step.inputs[0]
                owner[out] = owner.get(viewed, viewed)
            else:
                owner[out] = out
                now += out.probe_bytes
            holders[owner[out]] += 1
            most = max(most, now)
            for tangent in scheduled.finished:
                root = owner.get(tangent, tangent)
                holders[root] -= 1
                if holders[root] == 0 and root in owner:  # else it is the caller's
                    now -= root.probe_bytes
        return most


def _run(
    scheduled: Scheduled,
    probes: int,
    held: dict[Tangent, Tensor],
    values: Mapping[Node, Tensor],
) -> None:
    """Adds what the step computes to ``held``, and frees there what no later step reads."""
    step = scheduled.step
    tangents = [
        held[tangent] if live else None
        for tangent, live in zip(step.inputs, scheduled.live, strict=True)
    ]
    constants = [values[node] for node in step.constants]
    held[step.out] = step.call(probes, tangents, constants)
    # at once: what is alive at the peak limits how many probes go together
    del tangents
    for tangent in scheduled.finished:
        del held[tangent]
