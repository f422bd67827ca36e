"""How much memory an optimizer's state takes, counted in what it really holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from hessian_tools.results import registered


@registered
@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's tensors, against Adam's two moments of every parameter."""

    held: int
    adam: int  # two numbers a parameter, in its dtype

    @property
    def percent(self) -> float:
        """Of Adam's."""
        return 100 * self.held / self.adam

    def __str__(self) -> str:
        return f"{self.held:,} bytes of state, {self.percent:.1f} % of Adam's {self.adam:,}"


def state_bytes(optimizer: Optimizer) -> StateBytes:
    """What ``optimizer`` holds now, which most make in their first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = 2 * sum(p.numel() * p.element_size() for p in parameters)
    return StateBytes(held_bytes(optimizer), moments)


def held_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; memory that several share counts once."""
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(held: object) -> Iterator[Tensor]:
    """All tensors in state, which is nested at an optimizer's pleasure."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
