"""The referee: a finite difference of the ordinary backward pass's gradient, in float64.

Nothing of hessian_tools is imported here. The model is copied, turned to float64 and run with its
own kernels; ``backward()`` leaves its gradient in ``.grad``, as in training. The difference has
five points,

    H v ~ (8 (g(w + t v) - g(w - t v)) - (g(w + 2 t v) - g(w - 2 t v))) / 12 t,

whose error is of order t^4, so that long steps are exact where the loss is smooth. Several steps
are tried; the one that agrees best with its neighbour is taken, and their distance is its
uncertainty. Where long steps disagree with it the loss has kinks (ReLU, max-pooling) within reach.
Distances are those of the worst parameter tensor, so that a fault in a small one is not lost in a
large one.

Letters: P variables.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from family_models.setting import Setting, batch_norms

# |t v| over |w|, long ones first: tiny ones cross few kinks, but rounding grows with 1 / t
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
AGREED = 1e-8  # two steps that agree so well settle it
LONG = 1e-3  # the step at which kinks are looked for
SHARE = 0.01  # of the whole product, to which a tensor with a small part of it is held
KINKED = 1e-3  # how far the difference at the long step lies from the one taken


@dataclass(frozen=True)
class Difference:
    product: Tensor  # (P,), float64
    sizes: tuple[int, ...]  # of the parameter tensors
    uncertainty: float  # as :func:`apart` measures
    step: float
    kinks: bool


class Float64(TorchFunctionMode):
    """Casts to float32 inside a model go to float64, which leaves the function and its kernels."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(_wider(argument) for argument in args)
        kwargs = {key: _wider(argument) for key, argument in (kwargs or {}).items()}
        return function(*args, **kwargs)


def difference(setting: Setting, direction: Tensor) -> Difference:
    """H v of the pooled mean loss, v the ``direction`` (P,) in the order of the parameters."""
    gradient = Gradient(setting)
    v = direction.double()
    scale = gradient.start.norm() / v.norm()
    products: dict[float, Tensor] = {}
    best, taken = float("inf"), STEPS[0]
    products[STEPS[0]] = gradient.five_points(v, float(STEPS[0] * scale))
    for longer, step in itertools.pairwise(STEPS):
        products[step] = gradient.five_points(v, float(step * scale))
        distance = apart(products[longer], products[step], gradient.sizes)
        if distance < best:
            best, taken = distance, step
        if best < AGREED:
            break
    kinks = apart(products[LONG], products[taken], gradient.sizes) > max(KINKED, 10 * best)
    return Difference(products[taken], gradient.sizes, best, taken, kinks)


def apart(product: Tensor, reference: Tensor, sizes: Sequence[int]) -> float:
    """|a - b| over |b| + SHARE |whole of b| for the worst parameter tensor; 0 where both vanish."""
    a, b = product.double().split(list(sizes)), reference.split(list(sizes))
    whole = SHARE * float(reference.norm())
    pairs = [(float((x - y).norm()), float(y.norm()) + whole) for x, y in zip(a, b, strict=True)]
    return max((far / size if size else float(far > 0) for far, size in pairs), default=0.0)


class Gradient:
    """The gradient of the pooled mean loss at any point, by ``backward()``, in float64."""

    def __init__(self, setting: Setting) -> None:
        self.model = (setting.plain or copy.deepcopy)(setting.model).double()
        for norm in batch_norms(self.model):
            norm.train(setting.batch_stats)
        if setting.prepare:
            setting.prepare(self.model)
        self.loss = setting.loss
        self.redirected = setting.redirected
        self.batches = [in_float64(batch) for batch in setting.batches]
        total = sum(setting.counts)
        self.weights = [count / total for count in setting.counts]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.sizes = tuple(p.numel() for p in self.parameters)
        self.start = torch.cat([p.detach().flatten() for p in self.parameters])

    def at(self, point: Tensor) -> Tensor:
        """(P,) at ``point`` (P,)."""
        pieces = point.split(list(self.sizes))
        for parameter, values in zip(self.parameters, pieces, strict=True):
            parameter.data.copy_(values.view_as(parameter))
            parameter.grad = None
        with _in_float64(self.redirected):
            for weight, batch in zip(self.weights, self.batches, strict=True):
                (weight * self.loss(self.model, batch)).backward()
        return torch.cat([_gradient_of(p) for p in self.parameters])

    def five_points(self, v: Tensor, t: float) -> Tensor:
        near = self.at(self.start + t * v) - self.at(self.start - t * v)
        far = self.at(self.start + 2 * t * v) - self.at(self.start - 2 * t * v)
        return (8 * near - far) / (12 * t)


def in_float64(batch: Any) -> Any:
    """A batch of any kind with its floating-point tensors in float64; objects by attributes."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, PackedSequence):
        return batch.double()
    if isinstance(batch, Mapping):
        return {key: in_float64(item) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(in_float64, batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map(in_float64, batch))
    if dataclasses.is_dataclass(batch) or hasattr(batch, "__dict__"):
        twin = copy.copy(batch)
        for name, item in vars(batch).items():
            object.__setattr__(twin, name, in_float64(item))
        return twin
    return batch


@contextlib.contextmanager
def _in_float64(redirected: bool) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64() if redirected else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)


def _gradient_of(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=torch.float64)
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.detach().flatten().clone()


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
