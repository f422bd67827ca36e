"""In what arithmetic the products of a Hessian are computed, and in what everything around them is.

The dtype of the parameters decides about the model: forward pass, gradient and second derivatives.
Vectors, scalars and the sums over batches are in that dtype or in float32, whichever is wider: a
Lanczos vector in bfloat16 would lose its orthogonality to the first vectors at once, a sum over
micro-batches its small terms. A vector is cast once where it enters the model and its product once
where it leaves.

TF32 is no dtype but a setting of the process: matrix products and convolutions of float32 tensors
on CUDA round their operands to 10 explicit mantissa bits and sum in float32 (Ampere and later).
PyTorch starts with it on for convolutions and off for matrix products. Here the default is true
float32 ("ieee"): in networks with kinks TF32 moves extreme eigenvalues by 4 %
(``experiments/precision.py``), and nobody should get that unasked. It is set inside products only
and put back behind them, so the orthogonalisation of Lanczos vectors, made of matrix products as
well, keeps float32.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_tools.curvature.engine.memory import write_zeros_out
from hessian_tools.problem.problem import Problem

# Of float32 products; the first is the default, the last is what the process is set to.
PRECISIONS = ("ieee", "tf32", "as given")
_AMPERE = (8, 0)  # the first compute capability with TF32


@dataclass(frozen=True)
class Arithmetic:
    """How products are computed: ``model`` for the network, ``vectors`` around it.

    ``str`` of it says so in words, and where TF32 was asked for but cannot be had.
    """

    model: torch.dtype  # the coarsest of the parameters'
    vectors: torch.dtype  # of vectors, products and sums; float32 or wider
    device: torch.device
    precision: str  # of float32 matrix products and convolutions: one of PRECISIONS
    convolves: bool  # whether PyTorch's setting for convolutions matters
    inside: torch.dtype | None = None  # coarser than ``model``: what autocast or the model casts to

    @property
    def name(self) -> str:
        """The coarsest that a product passes through: one of "float64", "float32", "tf32",
        "float16", "bfloat16"."""
        if self.inside is not None:
            return _dtype_name(self.inside)
        if self.model != torch.float32:
            return _dtype_name(self.model)
        return "tf32" if self._tf32 else "float32"

    def __str__(self) -> str:
        if self._tf32 and self.model == torch.float32:
            return "TF32 products, float32 vectors and sums"
        words = f"{_dtype_name(self.model)} products"
        if self.inside is not None:
            words += f" with {_dtype_name(self.inside)} inside"
        if self.model != self.vectors:
            words += f", {_dtype_name(self.vectors)} vectors and sums"
        if self.precision == "tf32":
            words += f", TF32 asked for and not to be had ({self._missing})"
        return words

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """TF32 on or off as asked for.

        The process's settings are as before on leaving, also after an exception.
        """
        if self.precision == "as given" or self.device.type != "cuda":
            yield
            return
        with tf32(self.precision == "tf32"):
            yield

    @property
    def _tf32(self) -> bool:
        if self._missing or self.precision == "ieee":
            return False
        if self.precision == "tf32":
            return True
        return _is_on("matmul") or (self.convolves and _is_on("convolution"))

    @property
    def _missing(self) -> str:
        """Why there is no TF32 here; empty where there is."""
        if self.device.type != "cuda":
            return f"device {self.device.type}"
        if torch.cuda.get_device_capability(self.device) < _AMPERE:
            return "a card older than Ampere"
        return ""


def arithmetic(model: nn.Module, precision: str = PRECISIONS[0]) -> Arithmetic:
    """The Arithmetic of products with the Hessian of ``model``, which has trainable parameters.

    Raises:
        ValueError: an unknown ``precision``; parameters in float16 or narrower; TF32 asked for a
            model without float32 products.
    """
    if precision not in PRECISIONS:
        allowed = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision is {precision!r}; allowed are {allowed}")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    coarsest = _coarsest({p.dtype for p in parameters})
    if precision == "tf32" and coarsest != torch.float32:
        raise ValueError(
            "precision is 'tf32', which is about products in float32, but model has parameters in "
            f"{coarsest}; use model.to(torch.float32), or leave precision out"
        )
    trainable = [p for p in parameters if p.requires_grad]
    vectors = functools.reduce(torch.promote_types, (p.dtype for p in trainable), torch.float32)
    device = trainable[0].device
    chosen = Arithmetic(coarsest, vectors, device, precision, _convolves(model))
    if precision == "tf32" and chosen.name != "tf32":
        warnings.warn(
            f"{chosen}; products are what precision='ieee' gives", RuntimeWarning, stacklevel=3
        )
    return chosen


class _Dtypes(TorchDispatchMode):
    """Collects the floating dtypes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    # types and arguments are torch's own, of any kind
    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = write_zeros_out((args, kwargs or {}))
        result = operation(*args, **kwargs)
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {r.dtype for r in results if isinstance(r, Tensor) and r.is_floating_point()}
        return result


def dtype_inside(problem: Problem) -> torch.dtype | None:
    """The coarsest dtype in which the loss computes, where that is coarser than its parameters'.

    Found in a forward pass over one example; autocast and explicit casts show there alike.
    """
    _, batch = problem.samples[0]
    with problem.evaluating(), torch.enable_grad(), _Dtypes() as dtypes:
        problem.batch_loss(batch)
    own = torch.finfo(problem.dtype).eps
    coarser = {dtype for dtype in dtypes.seen if torch.finfo(dtype).eps > own}
    return max(coarser, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd | nn.RNNBase) for module in model.modules())


def _coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The coarsest of the parameters' dtypes; ValueError for one that is too narrow."""
    for dtype in dtypes - {torch.float64, torch.float32, torch.bfloat16}:
        tiny = torch.finfo(dtype).tiny
        largest = torch.finfo(dtype).max
        raise ValueError(
            f"model has parameters in {dtype}, which resolves {tiny:.1g} to {largest:.3g}: second "
            "derivatives and unit vectors leave that range; use model.to(torch.bfloat16), which "
            "has the range of float32, or float32"
        )
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions of this process's CUDA devices, until left.

    PyTorch has two interfaces to the same switches, and reading the older one raises once they
    disagree. So both are moved together where the process has not already chosen the newer (torch
    2.9), and both are put back.
    """
    switches = _switches()
    before = [switch.fp32_precision for switch in switches]
    older = _older_switches()
    try:
        if older is not None:
            _set_older_switches("high" if on else "highest", on)
        for switch in switches[:3]:  # the last is the CPU's, which moves along with the older
            switch.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        if older is not None:
            _set_older_switches(*older)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _older_switches() -> tuple[str, bool] | None:
    """The older interface's, for products and convolutions; None where it cannot be read."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_older_switches(matmul: str, convolution: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution


class _Switch(Protocol):
    """One of PyTorch's settings of how float32 is computed."""

    fp32_precision: str


def _switches() -> list[_Switch]:
    """The newer interface's, for CUDA's products, convolutions and recurrent layers, and the CPU's.

    None before torch 2.9.
    """
    backends = torch.backends
    if not hasattr(backends.cudnn, "fp32_precision"):
        return []
    cuda = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]  # type: ignore
    return [*cuda, backends.mkldnn.matmul]  # type: ignore


def _is_on(operation: str) -> bool:
    """Whether the process has TF32 on for CUDA's "matmul" or "convolution"."""
    switches = _switches()
    matmul = operation == "matmul"
    if switches:
        return switches[0 if matmul else 1].fp32_precision == "tf32"
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32 if matmul else backends.cudnn.allow_tf32


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
