"""In what arithmetic the products of a Hessian are computed, and in what everything around them is.

The dtype of the parameters decides about the model: forward pass, gradient and second derivatives. Vectors, scalars
and the sums over batches are in that dtype or in float32, whichever is wider: a Lanczos vector in bfloat16 would lose
its orthogonality to the first vectors at once, a sum over micro-batches its small terms. A vector is cast once where it
enters the model and its product once where it leaves.

TF32 is no dtype but a setting of the process: matrix products and convolutions of float32 tensors on CUDA round their
operands to 10 explicit mantissa bits and sum in float32 (Ampere and later). PyTorch starts with it on for convolutions
and off for matrix products. Here the default is true float32 ("ieee"): in networks with kinks TF32 moves extreme
eigenvalues by 4 % (``experiments/precision.py``), and nobody should get that unasked. It is set inside products only
and put back behind them, so the orthogonalisation of Lanczos vectors, made of matrix products as well, keeps float32.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

PRECISIONS = (
    "ieee",
    "tf32",
    "as given",
)  # the first is the default; the last is what the process is set to
_AMPERE = (8, 0)  # the first compute capability with TF32


@dataclass(frozen=True)
class Arithmetic:
    """How products are computed: ``model`` for the network, ``vectors`` around it, TF32 as ``precision`` says.

    ``str`` of it says so in words, and where TF32 was asked for but is not to be had.
    """

    model: torch.dtype  # the coarsest of the parameters'
    vectors: torch.dtype  # of vectors, products and sums; float32 or wider
    device: torch.device
    precision: str  # of float32 matrix products and convolutions: one of PRECISIONS
    convolves: bool  # whether PyTorch's setting for convolutions matters

    @property
    def name(self) -> str:
        """ "float64", "float32", "tf32" or "bfloat16": the coarsest arithmetic that a product passes through."""
        if self.model != torch.float32:
            return str(self.model).removeprefix("torch.")
        return "tf32" if self._tf32 else "float32"

    def __str__(self) -> str:
        if self.model != torch.float32:
            kept = (
                ""
                if self.model == self.vectors
                else f", {str(self.vectors).removeprefix('torch.')} vectors and sums"
            )
            return f"{self.name} products{kept}"
        if self._tf32:
            return "TF32 products, float32 vectors and sums"
        missing = (
            f", TF32 asked for and not to be had ({self._missing})"
            if self.precision == "tf32"
            else ""
        )
        return f"float32 products{missing}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """TF32 on or off as asked for; the process's settings are as before on leaving, also after an exception."""
        if self.precision == "as given" or self.device.type != "cuda":
            yield
            return
        with tf32(self.precision == "tf32"):
            yield

    @property
    def _tf32(self) -> bool:
        if self._missing or self.precision == "ieee":
            return False
        return (
            self.precision == "tf32"
            or _is_on("matmul")
            or (self.convolves and _is_on("convolution"))
        )

    @property
    def _missing(self) -> str:
        """Why there is no TF32 here; empty where there is."""
        if self.device.type != "cuda":
            return f"device {self.device.type}"
        return (
            ""
            if torch.cuda.get_device_capability(self.device) >= _AMPERE
            else "a card older than Ampere"
        )


def arithmetic(model: nn.Module, precision: str = PRECISIONS[0]) -> Arithmetic:
    """The Arithmetic of products with the Hessian of ``model``, which has parameters that require grad.

    Raises:
        ValueError: an unknown ``precision``; parameters in float16 or narrower; TF32 asked for a model without float32
            products.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is {precision!r}; allowed are {', '.join(map(repr, PRECISIONS))}"
        )
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    coarsest = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    for dtype in {p.dtype for p in parameters} - {torch.float64, torch.float32, torch.bfloat16}:
        tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        raise ValueError(
            f"model has parameters in {dtype}, which resolves {tiny:.1g} to {largest:.3g}: second derivatives and unit "
            "vectors leave that range; use model.to(torch.bfloat16), which has the range of float32, or float32"
        )
    if precision == "tf32" and coarsest != torch.float32:
        raise ValueError(
            f"precision is 'tf32', which is about products in float32, but model has parameters in {coarsest}; use "
            "model.to(torch.float32), or leave precision out"
        )
    variables = [p for p in parameters if p.requires_grad]
    vectors = functools.reduce(torch.promote_types, (p.dtype for p in variables), torch.float32)
    convolves = any(isinstance(module, _ConvNd | nn.RNNBase) for module in model.modules())
    found = Arithmetic(coarsest, vectors, variables[0].device, precision, convolves)
    if precision == "tf32" and found.name != "tf32":
        warnings.warn(
            f"{found}; products are what precision='ieee' gives", RuntimeWarning, stacklevel=3
        )
    return found


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 in matrix products and convolutions of this process's CUDA devices, until left.

    PyTorch has two interfaces to the same switches, and reading the older one raises once they disagree. So both are
    moved together where the process has not already chosen the newer (torch 2.9), and both are put back.
    """
    switches = _switches()
    single = [(switch, switch.fp32_precision) for switch in switches]
    try:
        joint = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        joint = None
    try:
        if joint is not None:
            torch.set_float32_matmul_precision("high" if on else "highest")
            torch.backends.cudnn.allow_tf32 = on
        for switch in switches[:3]:
            switch.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        if joint is not None:
            torch.set_float32_matmul_precision(joint[0])
            torch.backends.cudnn.allow_tf32 = joint[1]
        for switch, value in single:
            switch.fp32_precision = value


def _switches() -> list[Any]:
    """The newer interface's, the CPU's last (the older one moves it along); none before torch 2.9."""
    backends = torch.backends
    if not hasattr(backends.cudnn, "fp32_precision"):
        return []
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]  # type: ignore


def _is_on(operation: str) -> bool:
    """Whether the process has TF32 on for CUDA's "matmul" or "convolution"."""
    switches = _switches()
    if switches:
        return (switches[0] if operation == "matmul" else switches[1]).fp32_precision == "tf32"
    return (
        torch.backends.cuda.matmul.allow_tf32
        if operation == "matmul"
        else torch.backends.cudnn.allow_tf32
    )
