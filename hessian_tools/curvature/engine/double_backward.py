"""Route: products with a micro-batch's Hessian by differentiating the graph of its gradient again.

    H v = d/dw <g(w), v>,  g = dL/dw                        (Pearlmutter 1994, "double backward")

The graph of g is recorded once per micro-batch and is then differentiated again for every probe,
every Lanczos step and every block: 6 F a probe for the whole Hessian, F being the cost of one
forward pass. For a diagonal block only d g_block / d w_block is asked for, so autograd prunes to
what lies downstream of the block: about 1 to 2 F. Where the plan rebuilds graphs, only the block's
parameters require grad meanwhile, so nothing else is kept. Probes go through as one batch
(``is_grads_batched``), or one after the other where a model has no batching rule.
"""

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hessian_tools.curvature.engine import segment
from hessian_tools.curvature.engine.fake_problem import FakeProblem, is_fake
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.curvature.engine.recompute import NONE, Segments, recomputing
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.gradient import gradient_of_backward
from hessian_tools.problem.problem import Problem

Gradients = dict[str, Tensor]  # by the parameter's name, each with its graph
Grad = Callable[..., tuple[Tensor | None, ...]]  # torch.autograd.grad of given outputs and inputs


class DoubleBackward:
    """Second derivatives of a Problem's loss on one micro-batch at a time.

    ``recorded`` says whether graphs are kept for the products that follow, ``segments`` what is
    recomputed; :meth:`configure` changes them. ``name`` describes the route. ``batched`` turns
    False, with the reason in ``fallback``, once probes have not gone through as one batch.
    """

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
        self._graphs: dict[int, tuple[Batch, Gradients]] = {}
        self._recomputes = False  # whether passes over recorded graphs may run the model again

    @property
    def name(self) -> str:
        """The route in words."""
        batching = "batched over probes" if self.batched else f"probes one by one ({self.fallback})"
        return f"double backward, {batching}"

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
        """For each chunk of cotangents v_b the sums over b of H_ab v_b, a and b among ``names``.

        A chunk has a tensor (r, \\*shape) for each name; so has its result. None stands for zero,
        in both; only what the cotangents given lead to is computed. Closing the generator puts the
        model back as it was; without chunks it only records.
        """
        with self._context(batch, names):
            gradients = self._graph(batch, names)
            for cotangents in chunks:
                yield self._differentiated(gradients, names, cotangents)

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
        graphs = [tensor for _, graph in self._graphs.values() for tensor in graph.values()]
        names = [node.name() for node in _nodes(graphs)]
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

    def _graph(self, batch: Batch, names: Sequence[str]) -> Gradients:
        """The gradient with its graph: of all parameters and kept, or of ``names`` for one call."""
        if not self.recorded:
            return self._gradients(batch, names)
        if id(batch) not in self._graphs:
            self._graphs[id(batch)] = batch, self._gradients(batch, list(self.problem.parameters))
        return self._graphs[id(batch)][1]

    def _gradients(self, batch: Batch, names: Sequence[str]) -> Gradients:
        parameters = [self.problem.parameters[name] for name in names]
        with torch.enable_grad():
            with _saving_seen() as seen:
                loss = self.problem.batch_loss(batch)
            self._recomputes |= bool(seen)
            if not loss.requires_grad:  # it depends on none of these
                return {}
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        self._check_finite(used, loss)
        # A gradient without a graph is constant, so its rows of the Hessian are zero.
        return {name: gradient for name, gradient in used.items() if gradient.requires_grad}

    def _check_finite(self, gradients: Gradients, loss: Tensor) -> None:
        """Looks at each parameter's gradient once: on every product it would make the GPU wait."""
        for name in gradients.keys() - self._checked:
            finite = torch.isfinite(gradients[name]).all()
            if not is_fake(finite) and not finite:
                raise NumericalError(
                    f"the gradient of {name} is not finite, but the loss is {loss.item():.6g}"
                )
        self._checked |= gradients.keys()

    def _differentiated(
        self,
        gradients: Gradients,
        names: Sequence[str],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        pairs = [
            (gradients[name], cotangent)
            for name, cotangent in zip(names, cotangents, strict=True)
            if name in gradients and cotangent is not None
        ]
        if not pairs:
            return [None] * len(names)
        outputs = [gradient for gradient, _ in pairs]
        vectors = [cotangent.to(gradient.dtype) for gradient, cotangent in pairs]
        inputs = [self.problem.parameters[name] for name in names]
        return self._derivatives(outputs, inputs, vectors)

    def _derivatives(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        vectors: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """The derivatives of <outputs, v> for all rows v of ``vectors``, at once if possible."""
        # The graph stays for the next probes; not every parameter lies behind every output.
        grad = partial(torch.autograd.grad, outputs, inputs, retain_graph=True, allow_unused=True)
        if self.batched:
            try:
                return _at_once(grad, vectors)
            except RuntimeError as error:  # NotImplementedError is one as well
                if is_out_of_memory(error):
                    raise
                self.batched = False
                self.fallback = _first_line(error)
        try:
            return _one_by_one(grad, vectors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise _refusal(_first_line(error), outputs) from error


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


def _at_once(grad: Grad, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The derivatives for all rows of ``vectors`` as one batch."""
    with warnings.catch_warnings():
        # An operation without a batching rule is looped over: still correct.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return grad(vectors, is_grads_batched=True)


def _one_by_one(grad: Grad, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The same in a pass for each row."""
    rows = [grad(row) for row in zip(*vectors, strict=True)]
    columns = zip(*rows, strict=True)
    return [None if column[0] is None else torch.stack(column) for column in columns]


def refuse_once_differentiable(loss: Tensor) -> None:
    """Refuses custom Functions that autograd would silently leave out of the second pass.

    Raises:
        NotTwiceDifferentiable: naming the first of them.
    """
    for function in _custom_functions([loss]):
        if _is_once_differentiable(function):
            reason = f"the backward of {function.__name__} is once_differentiable"
            raise _refusal(reason, [])


def refuse_unlike_backward(problem: Problem) -> bool:
    """Refuses custom Functions that run a backward pass of their own (reentrant checkpointing).

    Their parameters get a gradient in ``.grad``, but ``autograd.grad`` does not see them, so that
    their curvature would silently be zero. Returns whether there are custom Functions at all.

    Raises:
        NotTwiceDifferentiable: naming the Functions and a parameter whose gradients differ.
    """
    _, batch = problem.samples[0]
    parameters = list(problem.parameters.values())
    with problem.evaluating(), torch.enable_grad():
        loss = problem.batch_loss(batch)
        functions = _custom_functions([loss])
        if not functions:
            return False  # torch's own operations have no such thing
        named = ", ".join(function.__name__ for function in functions)
        advice = "checkpoint with use_reentrant=False, or not at all, for the curvature"
        try:
            seen = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise NotTwiceDifferentiable(
                f"torch.autograd.grad cannot differentiate the loss: {_first_line(error)}; it uses "
                f"the custom autograd Function(s) {named}: where one of them checkpoints, {advice}"
            ) from error
    left = gradient_of_backward(problem, batch)
    allowed = torch.finfo(problem.dtype).eps ** 0.5
    for (name, ordinary), gradient in zip(left.items(), seen, strict=True):
        if (ordinary - gradient).norm() > allowed * ordinary.norm():
            raise NotTwiceDifferentiable(
                f"loss.backward() and torch.autograd.grad give different gradients for {name}: the "
                f"custom autograd Function(s) {named} run a backward pass of their own, as "
                f"reentrant checkpointing does, and second derivatives cannot see it; {advice}"
            )
    return True


def _custom_functions(outputs: Sequence[Tensor]) -> list[type[torch.autograd.Function]]:
    """The Python autograd Functions in the graph behind ``outputs``, by name.

    Those of segments are left out.
    """
    nodes = _nodes(outputs)
    kinds = {
        type(node) for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)
    }
    functions = {kind._forward_cls for kind in kinds}  # type: ignore[attr-defined]
    foreign = [f for f in functions if f.__module__ != segment.__name__]
    return sorted(foreign, key=lambda function: function.__name__)


def _nodes(outputs: Sequence[Tensor]) -> set[Node]:
    """The graph behind ``outputs``."""
    seen: set[Node] = set()
    stack = [tensor.grad_fn for tensor in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def _is_once_differentiable(function: type[torch.autograd.Function]) -> bool:
    code = getattr(function.backward, "__code__", None)
    # Torch's decorator wraps the method in a function of torch's own file.
    return code is not None and code.co_filename == torch.autograd.function.__file__


def _refusal(reason: str, outputs: Sequence[Tensor]) -> NotTwiceDifferentiable:
    names = ", ".join(function.__name__ for function in _custom_functions(outputs))
    culprits = f"; it uses the custom autograd Function(s) {names}" if names else ""
    return NotTwiceDifferentiable(
        f"the model cannot be differentiated twice: {reason}{culprits}; replace that operation by "
        "one whose backward is itself made of differentiable operations"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
