"""Route: products with a micro-batch's Hessian by differentiating the graph of its gradient once more.

    H v = d/dw <g(w), v>,  g = dL/dw                                  (Pearlmutter 1994, "double backward")

The graph of g is recorded once per micro-batch and is then differentiated again for every probe, every Lanczos step and
every block: 6 F a probe for the whole Hessian, F being the cost of one forward pass. For a diagonal block only
d g_block / d w_block is asked for, so autograd prunes to what lies downstream of the block: about 1 to 2 F. Where the
plan rebuilds graphs, only the block's parameters require grad meanwhile, so nothing else is kept. Probes go through as
one batch (``is_grads_batched``), or one after the other where a model has no batching rule.
"""

import contextlib
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_tools.curvature.engine import recompute
from hessian_tools.curvature.engine.fake_problem import Imagined, imagines
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.curvature.engine.recompute import NONE, Segments
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.problem.problem import Problem

Gradients = dict[str, Tensor]


class DoubleBackward:
    """Second derivatives of a Problem's loss on one micro-batch at a time.

    ``recorded`` and ``segments`` say how; :meth:`release` must follow a change. ``name`` describes the route.
    """

    def __init__(
        self, problem: Problem | Imagined, recorded: bool = False, segments: Segments = NONE
    ) -> None:
        self.problem, self.recorded, self.segments = problem, recorded, segments
        self.batched, self.fallback = True, ""
        self._checked: set[str] = set()
        self._graphs: dict[
            int, tuple[Any, Gradients]
        ] = {}  # by the batch's id, and the batch to keep that its own
        self._versions: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        batching = "batched over probes" if self.batched else f"probes one by one ({self.fallback})"
        return f"double backward, {batching}"

    def products(
        self, batch: Any, names: Sequence[str], chunks: Iterable[Sequence[Tensor | None]]
    ) -> Generator[Sequence[Tensor | None], None, None]:
        """For each chunk of cotangents v, (r, \\*shape) for each of ``names``, the sums over b of H_ab v_b, for each a.

        None stands for zero, in both; only what the cotangents given lead to is computed. Closing the generator puts
        the model back as it was; without chunks it only records.
        """
        self._forget_stale()
        kept = (
            self.recorded and not self.segments and self.holds(batch)
        )  # then the model is not called
        live = None if self.recorded else names
        with (
            contextlib.nullcontext()
            if kept
            else recompute.recomputing(self.problem, self.segments, live)
        ):
            gradients = self._graph(batch, names)
            for cotangents in chunks:
                yield self._differentiated(gradients, names, cotangents)

    def holds(self, batch: Any) -> bool:
        """Whether the graph of ``batch`` is recorded."""
        return id(batch) in self._graphs

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._graphs = {}

    def _forget_stale(self) -> None:
        versions = tuple(p._version for p in self.problem.parameters.values())
        if versions != self._versions:  # a step of an optimizer makes recorded graphs stale
            self.release()
            self._versions = versions

    def _graph(self, batch: Any, names: Sequence[str]) -> Gradients:
        """The gradient with its graph: of all parameters and kept, or of ``names`` and for this call."""
        if not self.recorded:
            return self._gradients(batch, names)
        if id(batch) not in self._graphs:
            self._graphs[id(batch)] = batch, self._gradients(batch, list(self.problem.parameters))
        return self._graphs[id(batch)][1]

    def _gradients(self, batch: Any, names: Sequence[str]) -> Gradients:
        parameters = [self.problem.parameters[name] for name in names]
        with torch.enable_grad():
            loss = self.problem.batch_loss(batch)
            if not loss.requires_grad:  # of none of these
                return {}
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        found = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        for name in (
            found.keys() - self._checked
        ):  # once: on every product it would make the device wait
            finite = torch.isfinite(found[name]).all()
            if not imagines(finite) and not finite:
                raise NumericalError(
                    f"the gradient of {name} is not finite, but the loss is {loss.item():.6g}"
                )
        self._checked |= found.keys()
        return {
            name: g for name, g in found.items() if g.requires_grad
        }  # others are constant: zero rows

    def _differentiated(
        self, gradients: Gradients, names: Sequence[str], cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        live = [
            (gradients[n], v)
            for n, v in zip(names, cotangents, strict=True)
            if n in gradients and v is not None
        ]
        if not live:
            return [None] * len(names)
        outputs = [gradient for gradient, _ in live]
        vectors = [v.to(gradient.dtype) for gradient, v in live]
        inputs = [self.problem.parameters[name] for name in names]
        if self.batched:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message="There is a performance drop"
                    )  # still correct, and told
                    return torch.autograd.grad(
                        outputs,
                        inputs,
                        vectors,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
            except RuntimeError as error:  # NotImplementedError is one as well
                if is_out_of_memory(error):
                    raise
                self.batched, self.fallback = False, _first_line(error)
        try:
            rows = [
                torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
                for row in zip(*vectors, strict=True)
            ]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise NotTwiceDifferentiable(_undifferentiable(_first_line(error), outputs)) from error
        return [
            None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
        ]


def refuse_once_differentiable(loss: Tensor) -> None:
    """Raises NotTwiceDifferentiable for a custom Function that autograd would silently leave out of the second pass."""
    if once := [c.__name__ for c in _custom_functions([loss]) if _is_once_differentiable(c)]:
        raise NotTwiceDifferentiable(
            _undifferentiable(f"the backward of {once[0]} is once_differentiable", [])
        )


def _custom_functions(outputs: Sequence[Tensor]) -> list[type]:
    """The Python autograd Functions in the graph behind ``outputs``, by name, but for those of segments."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    kinds = {
        type(node) for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)
    }
    functions = {kind._forward_cls for kind in kinds}  # type: ignore[attr-defined]
    return sorted(
        (f for f in functions if f.__module__ != recompute.__name__), key=lambda f: f.__name__
    )


def _is_once_differentiable(function: type) -> bool:
    code = getattr(function.backward, "__code__", None)  # type: ignore[attr-defined]
    return (
        code is not None and code.co_filename == torch.autograd.function.__file__
    )  # the decorator's wrapper


def _undifferentiable(reason: str, outputs: Sequence[Tensor]) -> str:
    names = ", ".join(c.__name__ for c in _custom_functions(outputs))
    culprits = f"; it uses the custom autograd Function(s) {names}" if names else ""
    return (
        f"the model cannot be differentiated twice: {reason}{culprits}; replace that operation by one whose backward "
        "is itself made of differentiable operations"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
