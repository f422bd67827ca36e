"""Route: products by tangent programs, traced once for each shape of micro-batch.

The same interface as :class:`hessian_tools.curvature.engine.double_backward.DoubleBackward`, and
the same operations counted (6 F a probe of the whole Hessian), but less memory traffic: no graph is
walked, elementwise chains are one pass a term. This module is the folder's door: nothing but the
route and :class:`hessian_tools.curvature.tangent.graph.Untraceable` is used outside.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from torch import Tensor

from hessian_tools.curvature.tangent.constants import Constants
from hessian_tools.curvature.tangent.graph import Node, Trace, Untraceable, traced_gradient
from hessian_tools.curvature.tangent.linearize import Linearisation, linearize
from hessian_tools.curvature.tangent.program import Program
from hessian_tools.problem.batches import Batch, outline, tensors_of
from hessian_tools.problem.problem import Problem

MOST_SHAPES = 4  # of micro-batches; each is traced on its own


class TangentRoute:
    """Second derivatives of a Problem on micro-batches, constants kept for all products.

    ``traced`` says which: the Hessian's by default.

    Attributes:
        graph_bytes: of the constants of all micro-batches, once they are computed.
        recording_bytes: needed beside them at most while those of one micro-batch are computed.
        row_bytes: needed at most for one probe of the whole Hessian.

    Raises:
        Untraceable: for a model whose gradient cannot be traced or has an operation without a rule,
            and for micro-batches of too many shapes.
    """

    name = "tangent program"

    def __init__(
        self,
        problem: Problem,
        batches: Sequence[Batch],
        traced: Callable[[Problem, Batch], Trace] = traced_gradient,
    ) -> None:
        self.problem = problem
        self._order = {name: index for index, name in enumerate(problem.parameters)}
        self._programs: dict[tuple[str, tuple[str, ...]], Program] = {}
        # by the batch's id; the batch is kept, so that no other takes its id
        self._constants: dict[int, tuple[Batch, Mapping[Node, Tensor]]] = {}
        examples = {outline(batch): batch for batch in batches}
        count = len(examples)
        if count > MOST_SHAPES:
            raise Untraceable(f"micro-batches have {count} different shapes")
        self._linearised: dict[str, Linearisation] = {}
        for signature, batch in examples.items():
            trace = traced(problem, batch)
            self._linearised[signature] = linearize(trace, len(self._order))
        self.graph_bytes = sum(self._constants_of(batch).kept_bytes() for batch in batches)
        every = range(len(self._order))
        self.recording_bytes = 0
        self.row_bytes = 0
        for linearised in self._linearised.values():
            recording = linearised.constants.recording_bytes()
            row = linearised.program(every).live_bytes()
            self.recording_bytes = max(self.recording_bytes, recording)
            self.row_bytes = max(self.row_bytes, row)

    def products(
        self,
        batch: Batch,
        names: Sequence[str],
        chunks: Iterable[Sequence[Tensor | None]],
    ) -> Generator[Sequence[Tensor | None], None, None]:
        """For each chunk of cotangents v_b the sums over b of H_ab v_b, a and b among ``names``.

        A chunk has a tensor (r, \\*shape) for each name; so has its result. None stands for zero,
        in both. Without chunks only the constants are computed.
        """
        constants = self._values(batch)
        program = self._program(batch, names)
        for cotangents in chunks:
            yield program(self._filled(names, cotangents), constants)

    def holds(self, batch: Batch) -> bool:
        """Whether the constants of ``batch`` are there."""
        return id(batch) in self._constants

    def release(self) -> None:
        """Frees the constants; the next product computes them again."""
        self._constants = {}

    def _filled(
        self,
        names: Sequence[str],
        cotangents: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """``cotangents`` with zeros, which take no memory, where they are None."""
        rows = next(len(v) for v in cotangents if v is not None)
        filled = []
        for name, cotangent in zip(names, cotangents, strict=True):
            if cotangent is None:
                parameter = self.problem.parameters[name]
                cotangent = parameter.new_zeros(()).expand(rows, *parameter.shape)
            filled.append(cotangent)
        return filled

    def _program(self, batch: Batch, names: Sequence[str]) -> Program:
        signature = outline(batch)
        key = signature, tuple(names)
        if key not in self._programs:
            indices = [self._order[name] for name in names]
            self._programs[key] = self._linearised[signature].program(indices)
        return self._programs[key]

    def _values(self, batch: Batch) -> Mapping[Node, Tensor]:
        if not self.holds(batch):
            parameters = [p.detach() for p in self.problem.parameters.values()]
            constants = self._constants_of(batch)
            computed = constants.values(parameters, tensors_of(batch))
            self._constants[id(batch)] = (batch, computed)
        _, values = self._constants[id(batch)]
        return values

    def _constants_of(self, batch: Batch) -> Constants:
        return self._linearised[outline(batch)].constants
