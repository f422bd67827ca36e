"""A Problem on fake tensors, so that what a computation would hold is counted without computing it.

PyTorch's fake tensors have shapes but no memory and no values. A pass through the model on them
costs the same few microseconds an operation whatever its size, which makes the trials of a plan
(:mod:`hessian_tools.curvature.engine.trials`) cheap for models whose real passes take seconds.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hessian_tools.problem.batches import Batch, map_tensors
from hessian_tools.problem.losses import OutputLoss
from hessian_tools.problem.problem import Problem


class CannotFake(Exception):
    """Passes on fake tensors would not show what real ones hold."""


class FakeProblem:
    """What a route needs of ``problem``, with every parameter, buffer and batch a fake tensor.

    Only inside :meth:`installed`, and only one at a time for a model: its modules hold the fake
    tensors meanwhile.

    Raises:
        CannotFake: for recurrent layers, whose kernel keeps more than its results.
    """

    def __init__(self, problem: Problem) -> None:
        if any(isinstance(module, nn.RNNBase) for module in problem.model.modules()):
            raise CannotFake("recurrent layers")
        self._real = problem
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = problem.model
        self.evaluating = problem.evaluating
        self.parameters = {
            name: self._mode.from_tensor(parameter)
            for name, parameter in problem.parameters.items()
        }

    def batch(self, batch: Batch) -> Batch:
        """A batch of the real problem, of fake tensors."""
        return map_tensors(self._mode.from_tensor, batch)

    def batch_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch of fake tensors, itself fake."""
        return self._real.batch_loss(batch)

    def batch_outputs(self, batch: Batch) -> Tensor:
        """The outputs of which that is a loss, fake as well."""
        return self._real.batch_outputs(batch)

    @property
    def in_two_steps(self) -> OutputLoss:
        """The loss function."""
        return self._real.in_two_steps

    def count(self, batch: Batch) -> float:
        """The examples of a batch that count."""
        return self._real.count(batch)

    def loss_of_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of given outputs, all fake."""
        return self._real.loss_of_outputs(outputs, batch)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The model on fake tensors; put back on leaving, also after an exception.

        Enter before ``evaluating``.
        """
        # Torch types the two tables differently.
        real: list[tuple[dict[str, Any], str, Tensor]] = [
            (table, name, tensor)
            for module in self._real.model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        try:
            for table, name, tensor in real:
                # The mode gives the same fake tensor for the same tensor, so tied weights stay so.
                table[name] = self._mode.from_tensor(tensor)
            with _silenced("torch._subclasses.fake_tensor"), self._mode:
                yield
        finally:
            for table, name, tensor in real:
                table[name] = tensor


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no memory, and so no values to look at."""
    return isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """A logger without its errors: this one reports also what a route tries and can do without."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
