"""A Problem on tensors that have shapes but no memory, so that what a computation would hold can be counted unpaid.

A pass through the model costs the same few microseconds an operation whatever its size, which is what makes the trials
of a plan (:mod:`hessian_tools.curvature.engine.plan`) cheap for models whose real passes take seconds.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hessian_tools.problem.batches import tensors_of, with_tensors
from hessian_tools.problem.problem import Problem


class Unimaginable(Exception):
    """What real passes hold would not be counted."""


class Imagined:
    """What a route needs of ``problem``, with every parameter, buffer and batch without memory.

    Only inside :meth:`entered`, and only one at a time for a model: its modules hold the imagined tensors meanwhile.
    Raises Unimaginable for recurrent layers, whose kernel keeps more than its results.
    """

    def __init__(self, problem: Problem) -> None:
        if any(isinstance(module, nn.RNNBase) for module in problem.model.modules()):
            raise Unimaginable("recurrent layers")
        self._real, self._mode = problem, FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self.evaluating = problem.model, problem.evaluating
        self.parameters = {
            name: self._mode.from_tensor(p) for name, p in problem.parameters.items()
        }

    def batch(self, batch: Any) -> Any:
        """A batch of the real problem's, imagined."""
        return with_tensors(batch, [self._mode.from_tensor(t) for t in tensors_of(batch)])

    def batch_loss(self, batch: Any) -> Tensor:
        return self._real.batch_loss(batch)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The model on imagined tensors; put back on leaving, also after an exception. Enter before ``evaluating``."""
        real = self._real
        held: list[tuple[Any, str, Tensor]] = [
            (table, name, tensor)
            for module in real.model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        log = logging.getLogger(
            "torch._subclasses.fake_tensor"
        )  # it reports what a route tries and can do without
        level = log.level
        try:
            log.setLevel(logging.CRITICAL)
            for table, name, tensor in held:
                table[name] = self._mode.from_tensor(
                    tensor
                )  # the same one for the same tensor: ties stay
            with self._mode:
                yield
        finally:
            log.setLevel(level)
            for table, name, tensor in held:
                table[name] = tensor


def imagines(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no memory, and so no values to look at."""
    return isinstance(tensor, torch._subclasses.FakeTensor)
