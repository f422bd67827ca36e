"""What composite operations are replaced by while a gradient is traced.

Operations that are awkward to differentiate once more (normalisations, losses, softmax' backward)
become sums and elementwise operations; a few are kept whole, since a rule of this folder is better
than what their pieces would give.
"""

import math
from collections.abc import Callable, Sequence
from types import NotImplementedType

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OperatorBase

_ATEN = torch.ops.aten
# kept whole: their rules keep one constant where the pieces would keep several
_KEPT = ("_softmax", "_log_softmax", "gelu", "gelu_backward", "embedding_dense_backward")
# replaced, besides those of torch's core set; not every version of torch has all of them
_REPLACED = """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward
    _native_batch_norm_legit _native_batch_norm_legit_no_training
    _softmax_backward_data _log_softmax_backward_data
    nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward
    mse_loss mse_loss_backward
    t transpose addmm baddbmm
""".split()

Taps = list[tuple[int, int]]  # by axis of a kernel: the first tap that is used, the last + 1
# of a convolution: stride, padding, dilation, transposed, output padding, groups
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


def decompositions() -> dict[OperatorBase, Callable[..., object]]:
    """By operation: the function that takes its place."""
    table: dict[OperatorBase, Callable[..., object]] = dict(core_aten_decompositions())
    packets = [getattr(_ATEN, name) for name in _REPLACED if hasattr(_ATEN, name)]
    table.update(get_decompositions(packets))
    for name in _KEPT:
        packet = getattr(_ATEN, name)
        for overload in packet.overloads():
            table.pop(getattr(packet, overload), None)
    table[_ATEN.var_mean.correction] = _var_mean
    table[_ATEN.var.correction] = lambda *args, **kwargs: _var_mean(*args, **kwargs)[0]
    table[_ATEN.convolution.default] = _convolution
    table[_ATEN.convolution_backward.default] = _convolution_backward
    return table


# ------------------------------------------------------------------------------------ variances


def _var_mean(
    x: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    dims = [d % x.ndim for d in dim] if dim else list(range(x.ndim))
    number = math.prod(x.shape[d] for d in dims)
    freedom = number - (1 if correction is None else correction)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    # sums and products, which need no rule of their own
    squares = (centred * centred).sum(dims, keepdim=keepdim)
    variance = squares / max(freedom, 0)
    return variance, mean if keepdim else mean.squeeze(dims)


# ---------------------------------------------------------------------------------- convolutions
# With a single output position a convolution is a matrix product with the taps that see an entry
# of the input; the other taps only multiply padding. NotImplemented leaves it a convolution.


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: *Geometry,
) -> Tensor | NotImplementedType:
    taps = _used_taps(x, weight, geometry)
    if taps is None:
        return NotImplemented
    out = x.flatten(1) @ _used(weight, taps).T
    if bias is not None:
        out = out + bias
    single_position = [1] * len(taps)
    return out.view(*out.shape, *single_position)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    *geometry_and_mask: *tuple[*Geometry, Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | NotImplementedType:
    taps = _used_taps(x, weight, geometry_and_mask[:-1])
    if taps is None:
        return NotImplemented
    input_asked, weight_asked, bias_asked = geometry_and_mask[-1]
    flat = gradient.flatten(1)
    to_input = to_weight = to_bias = None
    if input_asked:
        to_input = (flat @ _used(weight, taps)).view(x.shape)
    if weight_asked:
        used = flat.T @ x.flatten(1)
        by_tap = used.view(*weight.shape[:2], *x.shape[2:])
        to_weight = nn.functional.pad(by_tap, _unused(weight, taps))
    if bias_asked:
        to_bias = flat.sum(0)
    return to_input, to_weight, to_bias


def _used_taps(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Taps | None:
    """The taps that a convolution with a single output position holds against its input.

    None for all other convolutions, and where some entry of the input is seen by no tap.
    """
    strides, paddings, dilations, transposed, _, groups = geometry
    if transposed or groups != 1 or any(d != 1 for d in dilations):
        return None
    taps = []
    for n, size, stride, padding in zip(
        x.shape[2:],
        weight.shape[2:],
        strides,
        paddings,
        strict=True,
    ):
        has_single_position = (n + 2 * padding - size) // stride == 0
        sees_every_entry = 0 < n <= size - padding
        if not has_single_position or not sees_every_entry:
            return None
        taps.append((padding, padding + n))
    return taps


def _used(weight: Tensor, taps: Taps) -> Tensor:
    """(channels out, channels in x taps that are used)."""
    for axis, (first, last) in enumerate(taps, start=2):
        weight = weight.narrow(axis, first, last - first)
    return weight.flatten(1)


def _unused(weight: Tensor, taps: Taps) -> list[int]:
    """How many taps are left out before and after those used, last axis first, as for ``pad``."""
    pads: list[int] = []
    for (first, last), size in zip(taps, weight.shape[2:], strict=True):
        pads = [first, size - last, *pads]
    return pads
