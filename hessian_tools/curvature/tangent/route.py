"""Route: products by tangent programs, traced once for each shape of micro-batch (:mod:`hessian_tools.curvature.tangent.linearize`).

The same interface as :class:`hessian_tools.curvature.engine.double_backward.DoubleBackward`, and the same operations counted (6 F a
probe of the whole Hessian), but less memory traffic: no graph is walked, elementwise chains are one pass a term.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_tools.curvature.tangent.graph import Untraceable, traced_gradient
from hessian_tools.curvature.tangent.linearize import Linearisation
from hessian_tools.curvature.tangent.program import Program
from hessian_tools.problem.batches import tensors_of, with_tensors
from hessian_tools.problem.problem import Problem

MOST_SHAPES = 4  # of micro-batches; each is traced on its own


class TangentRoute:
    """Second derivatives of a Problem's loss on given micro-batches, constants kept for all products.

    Raises:
        Untraceable: for a model whose gradient cannot be traced or has an operation without a rule, and for micro-
            batches of too many shapes.
    """

    name = "tangent program"

    def __init__(self, problem: Problem, batches: Sequence[Any]) -> None:
        self.problem = problem
        self._order = {name: index for index, name in enumerate(problem.parameters)}
        self._traced: dict[str, Linearisation] = {}
        self._programs: dict[tuple[str, tuple[str, ...]], Program] = {}
        self._constants: dict[
            int, tuple[Any, Mapping[Any, Any]]
        ] = {}  # by the batch's id, and the batch to keep that
        self._versions: tuple[int, ...] = ()
        shapes = {_signature(batch): batch for batch in batches}
        if len(shapes) > MOST_SHAPES:
            raise Untraceable(f"micro-batches have {len(shapes)} different shapes")
        for shape, batch in shapes.items():
            self._traced[shape] = Linearisation(
                traced_gradient(problem, batch), len(problem.parameters)
            )
        everything = {
            shape: traced.program(range(len(self._order))) for shape, traced in self._traced.items()
        }
        self.graph_bytes = sum(
            self._traced[_signature(batch)].constant_bytes() for batch in batches
        )
        self.recording_bytes = max(
            t.recording_bytes() - t.constant_bytes() for t in self._traced.values()
        )
        self.row_bytes = max(program.live_bytes() for program in everything.values())

    def products(
        self, batch: Any, names: Sequence[str], chunks: Iterable[Sequence[Tensor | None]]
    ) -> Generator[Sequence[Tensor | None], None, None]:
        """For each chunk of cotangents v, (r, \\*shape) for each of ``names``, the sums over b of H_ab v_b, for each a.

        None stands for zero, in both.
        """
        constants, program = self._values(batch), self._program(batch, names)
        for cotangents in chunks:
            rows = next(len(v) for v in cotangents if v is not None)
            parameters = [self.problem.parameters[name] for name in names]
            with torch.no_grad():
                zeros = (p.new_zeros(()).expand(rows, *p.shape) for p in parameters)
                yield program(
                    [z if v is None else v for v, z in zip(cotangents, zeros, strict=True)],
                    constants,
                )

    def holds(self, batch: Any) -> bool:
        """Whether the constants of ``batch`` are there."""
        return id(batch) in self._constants

    def release(self) -> None:
        """Frees the constants; the next product computes them again."""
        self._constants = {}

    def _program(self, batch: Any, names: Sequence[str]) -> Program:
        key = _signature(batch), tuple(names)
        if key not in self._programs:
            self._programs[key] = self._traced[key[0]].program(
                [self._order[name] for name in names]
            )
        return self._programs[key]

    def _values(self, batch: Any) -> Mapping[Any, Any]:
        versions = tuple(p._version for p in self.problem.parameters.values())
        if versions != self._versions:  # a step of an optimizer makes them stale
            self.release()
            self._versions = versions
        if id(batch) not in self._constants:
            traced = self._traced[_signature(batch)]
            parameters = [p.detach() for p in self.problem.parameters.values()]
            self._constants[id(batch)] = batch, traced.constants(parameters, tensors_of(batch))
        return self._constants[id(batch)][1]


def _signature(batch: Any) -> str:
    """What a trace depends on: shapes and dtypes of the tensors, and all else in the batch as it is."""
    tensors = tensors_of(batch)
    return f"{[(tuple(t.shape), t.dtype) for t in tensors]} {with_tensors(batch, [None] * len(tensors))!r}"  # type: ignore[list-item]
