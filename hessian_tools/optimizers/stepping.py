"""What the optimizers written here share: how a step begins, what is refused, how state comes back.

An optimizer has a rule for the tensors of one group, :meth:`Stepping.update`. Tensors without a
gradient are skipped, state included. State is at least float32, whatever the parameters are.
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from hessian_tools.blocks.param_groups import ParamGroup

Closure = Callable[[], Tensor | float]
State = dict[str, Tensor]  # of one parameter
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "damping")
_BELOW_ONE = ("betas", "momentum")


class Dense(torch.optim.Optimizer):
    """An optimizer of real, dense gradients, whose state comes back as it was saved."""

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As torch's, but state keeps its dtype and is copied.

        torch rounds all state to the parameters' dtype, which loses digits where these are bfloat16
        and state is not, and shares tensors with ``state_dict``.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        present = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, present, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.to(device, copy=True)

    def check_gradient(self, p: Tensor) -> None:
        assert p.grad is not None
        if not p.grad.is_sparse and not p.is_complex():
            return
        kind = "complex" if p.is_complex() else "sparse"
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is {kind}; "
            f"{type(self).__name__} takes real dense ones: nn.Embedding(sparse=False), or real and "
            "imaginary parts as torch.view_as_real"
        )


class Stepping(Dense):
    """An optimizer of real, dense gradients, with one rule a group.

    Raises:
        ValueError: a group whose numbers are out of range, when it is added.
        RuntimeError: a sparse or complex gradient, before anything has moved.
    """

    @abstractmethod
    def update(self, parameters: list[Tensor], group: ParamGroup) -> None:
        """Moves those ``parameters`` of a group that have gradients."""

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(_with_gradients(group), group) for group in self.param_groups]
        for p in chain.from_iterable(parameters for parameters, _ in work):
            self.check_gradient(p)
        for parameters, group in work:
            if parameters:
                self.update(parameters, group)
        return loss

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, with its numbers checked."""
        check_numbers(self.defaults | param_group)
        super().add_param_group(param_group)


def check_numbers(group: ParamGroup) -> None:
    """Raises ValueError, naming it, for a number out of range."""
    for name in _NOT_NEGATIVE:
        if name in group and not float(group[name]) >= 0:  # a NaN as well
            raise ValueError(f"{name} is {group[name]}; a number from 0 is needed")
    for name in _BELOW_ONE:
        given = group.get(name, 0.0)
        numbers = given if isinstance(given, tuple | list) else (given,)
        if not all(0 <= number < 1 for number in numbers):
            raise ValueError(f"{name} is {given}; from 0 to below 1 is needed")


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of state: that of the tensor, or float32 where that is more."""
    return torch.promote_types(tensor.dtype, torch.float32)


def gradient_of(p: Tensor) -> Tensor:
    """The gradient, in the dtype of state."""
    assert p.grad is not None
    return p.grad.to(wide(p))


def as_matrix(tensor: Tensor) -> Tensor:
    """(r, c): the first axis against all others."""
    return tensor.reshape(len(tensor), -1)


def no_steps(p: Tensor) -> ValueError:
    """The error for what is asked of an optimizer that has not moved ``p`` yet."""
    return ValueError(
        f"the optimizer has no state for a parameter of shape {tuple(p.shape)} yet; take a step "
        "first (it makes none for a parameter whose .grad is None)"
    )


def _with_gradients(group: ParamGroup) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]
