"""Routes that record graphs of a micro-batch and differentiate them again for every probe.

What is recorded, and how it is differentiated, is a subclass's:
:class:`hessian_tools.curvature.engine.double_backward.DoubleBackward` for the Hessian,
:class:`hessian_tools.curvature.engine.through_outputs.ThroughOutputs` for matrices J' M J. Probes
go through as one batch (``is_grads_batched``), or one after the other where a model has no batching
rule. Where the plan rebuilds graphs, only the block's parameters require grad meanwhile, so nothing
else is kept.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hessian_tools.curvature.engine.custom_functions import first_line, nodes_behind, refusal
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.curvature.segments.fake_problem import FakeProblem, is_fake
from hessian_tools.curvature.segments.recompute import NONE, Segments, recomputing
from hessian_tools.errors import NumericalError
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem

Graph = TypeVar("Graph")
Grad = Callable[..., tuple[Tensor | None, ...]]  # torch.autograd.grad of given outputs and inputs


class RecordedRoute(ABC, Generic[Graph]):
    """Derivatives of a Problem on one micro-batch at a time, by differentiating a recorded graph.

    ``recorded`` says whether graphs are kept for the products that follow, ``segments`` what is
    recomputed; :meth:`configure` changes them. ``name`` describes the route. ``batched`` turns
    False, with the reason in ``fallback``, once probes have not gone through as one batch.
    """

    kind: str  # of route, in words

    def __init__(
        self,
        problem: Problem | FakeProblem,
        recorded: bool = False,
        segments: Segments = NONE,
    ) -> None:
        self.problem = problem
        self.recorded = recorded
        self.segments = segments
        self.batched = True
        self.fallback = ""
        self._checked: set[str] = set()  # parameters whose gradient was seen to be finite
        # By the batch's id; the batch is kept so that no other takes its id.
        self._graphs: dict[int, tuple[Batch, Graph]] = {}
        self._recomputes = False  # whether passes over recorded graphs may run the model again

    @abstractmethod
    def _record(self, batch: Batch, names: Sequence[str]) -> Graph:
        """What products among the parameters ``names`` are derivatives of, with its graph."""

    @abstractmethod
    def _differentiated(
        self,
        graph: Graph,
        names: Sequence[str],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        """The products, (r, \\*shape) for each of ``names``; None stands for zero, in both."""

    @abstractmethod
    def _tensors(self, graph: Graph) -> Iterable[Tensor]:
        """All that has a graph behind it."""

    @property
    def name(self) -> str:
        """The route in words."""
        batching = "batched over probes" if self.batched else f"probes one by one ({self.fallback})"
        return f"{self.kind}, {batching}"

    def configure(self, recorded: bool, segments: Segments) -> None:
        """Goes on in this way, without the graphs recorded in another."""
        if (recorded, segments) != (self.recorded, self.segments):
            self.release()
            self.recorded = recorded
            self.segments = segments

    def products(
        self,
        batch: Batch,
        names: Sequence[str],
        chunks: Iterable[Sequence[Tensor | None]],
    ) -> Generator[Sequence[Tensor | None], None, None]:
        """For each chunk of vectors v_b the sums over b of A_ab v_b, a and b among ``names``.

        A chunk has a tensor (r, \\*shape) for each name; so has its result. None stands for zero,
        in both; only what the vectors given lead to is computed. Closing the generator puts the
        model back as it was; without chunks it only records.
        """
        with self._context(batch, names):
            graph = self._graph(batch, names)
            for vectors in chunks:
                yield self._differentiated(graph, names, vectors)

    def holds(self, batch: Batch) -> bool:
        """Whether the graph of ``batch`` is recorded."""
        return id(batch) in self._graphs

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._graphs = {}

    @property
    def surprises(self) -> bool:
        """Whether passes over the recorded graphs may fail, or hold more than the graphs show.

        So it is where an operation has no second derivative, and where the model runs again.
        """
        graphs = [tensor for _, graph in self._graphs.values() for tensor in self._tensors(graph)]
        names = [node.name() for node in nodes_behind(graphs)]
        is_refused = any("NotImplemented" in name or "Error" in name for name in names)
        return self._recomputes or is_refused

    def _context(
        self,
        batch: Batch,
        names: Sequence[str],
    ) -> contextlib.AbstractContextManager[None]:
        """The state of the model in which graphs are recorded and segments run again."""
        if self.recorded and self.holds(batch) and not (self.segments or self._recomputes):
            return contextlib.nullcontext()  # the model is not called
        live = None if self.recorded else names
        return recomputing(self.problem, self.segments, live)

    def _graph(self, batch: Batch, names: Sequence[str]) -> Graph:
        """What is recorded: of all parameters and kept, or of ``names`` for one call."""
        if not self.recorded:
            return self._record(batch, names)
        if id(batch) not in self._graphs:
            self._graphs[id(batch)] = batch, self._record(batch, list(self.problem.parameters))
        return self._graphs[id(batch)][1]

    @contextlib.contextmanager
    def _noticing_recomputation(self) -> Iterator[None]:
        """What the model replaces of what autograd saves inside may be computed again later."""
        with _saving_seen() as seen:
            yield
        self._recomputes |= bool(seen)

    def _check_finite(self, gradients: dict[str, Tensor], told: Callable[[], str]) -> None:
        """Looks at each parameter's gradient once: on every product it would make the GPU wait."""
        for name in gradients.keys() - self._checked:
            finite = torch.isfinite(gradients[name]).all()
            if not is_fake(finite) and not finite:
                raise NumericalError(f"the gradient of {name} is not finite, but {told()}")
        self._checked |= gradients.keys()

    def _derivatives(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        vectors: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """The derivatives of <outputs, v> for all rows v of ``vectors``, at once if possible."""
        # The graph stays for the next probes; not every input lies behind every output.
        grad = partial(torch.autograd.grad, outputs, inputs, retain_graph=True, allow_unused=True)
        if self.batched:
            try:
                return at_once(grad, vectors)
            except RuntimeError as error:  # NotImplementedError is one as well
                if is_out_of_memory(error):
                    raise
                self.batched = False
                self.fallback = first_line(error)
        try:
            return one_by_one(grad, vectors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise refusal(first_line(error), outputs) from error


@contextlib.contextmanager
def _saving_seen() -> Iterator[list[object]]:
    """A list that is filled where the model replaces what autograd saves, as checkpointing does.

    What was saved so may be computed again in every later pass.
    """
    seen: list[object] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def entered(self: torch.autograd.graph.saved_tensors_hooks) -> None:
        seen.append(self)
        enter(self)

    hooks.__enter__ = entered  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        hooks.__enter__ = enter  # type: ignore[method-assign]


def derivatives_of_rows(grad: Grad, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The derivatives for all rows of ``vectors``, as one batch if possible."""
    try:
        return at_once(grad, vectors)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
    return one_by_one(grad, vectors)


def at_once(grad: Grad, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The derivatives for all rows of ``vectors`` as one batch."""
    with warnings.catch_warnings():
        # An operation without a batching rule is looped over: still correct.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return grad(vectors, is_grads_batched=True)


def one_by_one(grad: Grad, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The same in a pass for each row."""
    rows = [grad(row) for row in zip(*vectors, strict=True)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]
