"""The operations that models and losses use, as small functions of tensors (float64) to be checked.

``OPERATIONS[group][name]`` is a function and the shapes of its arguments, which are drawn from a
normal distribution: almost surely away from kinks. What must be positive, ordered or normalised is
made so inside the function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """A function of tensors of the given shapes."""

    function: Function
    shapes: tuple[tuple[int, ...], ...]


def of(function: Function, *shapes: tuple[int, ...]) -> Operation:
    return Operation(function, shapes)


def by(*path: str, **options: object) -> Function:
    """The function of that name in torch, with options; looked up at the call."""
    *modules, name = path
    place = torch
    for module in modules:
        place = getattr(place, module)
    return partial(getattr(place, name), **options)


f = partial(by, "nn", "functional")  # by its name in torch.nn.functional
linalg = partial(by, "linalg")
VECTOR, MATRIX, SEQUENCE, IMAGE, VOLUME = (5,), (3, 4), (2, 3, 6), (1, 2, 4, 4), (1, 1, 3, 3, 3)
LABELS = torch.tensor([2, 0, 3])
SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
ONES_AND_ZEROS = (torch.arange(12).reshape(3, 4) % 2).double()
TOKENS = torch.tensor([0, 2, 2, 4, 1, 3])


# ------------------------------------------------------------------------------------ activations


def activation(name: str, **options: object) -> Operation:
    return of(lambda x: f(name, **options)(4 * x), VECTOR)


ACTIVATIONS = {
    name: activation(name)
    for name in (
        *("relu", "relu6", "elu", "celu", "selu", "silu", "mish", "softplus", "logsigmoid"),
        *("hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink"),
        *("leaky_relu", "softsign", "rrelu", "sigmoid", "tanh"),
    )
} | {
    "gelu, exact": activation("gelu"),
    "gelu, tanh": activation("gelu", approximate="tanh"),
    "threshold": of(lambda x: F.threshold(x, 0.1, 0.2), VECTOR),
    "glu": of(F.glu, MATRIX),
    "prelu": of(F.prelu, (2, 3, 2), (3,)),
    "softmax": of(f("softmax", dim=1), MATRIX),
    "log_softmax": of(f("log_softmax", dim=1), MATRIX),
    "softmin": of(f("softmin", dim=1), MATRIX),
    "logit": of(lambda x: torch.logit(torch.sigmoid(x), eps=1e-6), VECTOR),
    "sinc": of(torch.sinc, VECTOR),
    "erf": of(torch.erf, VECTOR),
    "xlogy": of(lambda x, y: torch.xlogy(x, y.exp()), VECTOR, VECTOR),
}

# --------------------------------------------------------------------- normalisation and attention


def norm_of(x: Tensor, weight: Tensor, bias: Tensor, *, training: bool) -> Tensor:
    mean, variance = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    return F.batch_norm(x, mean, variance, weight, bias, training)


def normed(dim: int | None) -> Function:
    """torch._weight_norm as modules call it."""
    return lambda v, g: torch._weight_norm(v, g, -1 if dim is None else dim)


def weight_normed(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
    layer = parametrizations.weight_norm(nn.Linear(4, 3, dtype=x.dtype))
    weights = {"parametrizations.weight.original0": g, "parametrizations.weight.original1": v}
    return torch.func.functional_call(layer, weights, (x,))


def spectrally_normed(x: Tensor, weight: Tensor) -> Tensor:
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(4, 3, dtype=x.dtype)).eval()
    return torch.func.functional_call(layer, {"parametrizations.weight.original": weight}, (x,))


def attention_of(heads: int) -> Function:
    def attention(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            x, x, x, 4, heads, weight, None, None, None, False, 0.0, out, None, need_weights=False
        )[0]

    return attention


HEADS = (1, 2, 3, 4)  # batch, heads, tokens, width
NORMS_AND_ATTENTION = {
    "layer_norm": of(lambda x, w, b: F.layer_norm(x, (4,), w, b), MATRIX, (4,), (4,)),
    "group_norm": of(lambda x, w, b: F.group_norm(x, 2, w, b), (2, 4, 3), (4,), (4,)),
    "instance_norm": of(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), SEQUENCE, (3,), (3,)),
    "batch_norm, batch statistics": of(partial(norm_of, training=True), SEQUENCE, (3,), (3,)),
    "batch_norm, running statistics": of(partial(norm_of, training=False), SEQUENCE, (3,), (3,)),
    "rms_norm": of(lambda x, w: F.rms_norm(x, (4,), w), MATRIX, (4,)),
    "local_response_norm": of(f("local_response_norm", size=2), SEQUENCE),
    "normalize": of(f("normalize", dim=1), MATRIX),
    "weight_norm, first dimension": of(normed(0), (3, 2, 2), (3, 1, 1)),
    "weight_norm, middle dimension": of(normed(1), (3, 2, 2), (1, 2, 1)),
    "weight_norm, last dimension": of(normed(2), (3, 2, 2), (1, 1, 2)),
    "weight_norm, whole tensor": of(normed(None), (3, 2, 2), ()),
    "weight_norm of nn.Linear": of(weight_normed, (2, 4), MATRIX, (3, 1)),
    "spectral_norm of nn.Linear": of(spectrally_normed, (2, 4), MATRIX),
    "scaled_dot_product_attention": of(F.scaled_dot_product_attention, HEADS, HEADS, HEADS),
    "scaled_dot_product_attention, causal": of(
        f("scaled_dot_product_attention", is_causal=True), HEADS, HEADS, HEADS
    ),
    "scaled_dot_product_attention, bias": of(
        F.scaled_dot_product_attention, HEADS, HEADS, HEADS, (1, 1, 3, 3)
    ),
    "multi_head_attention_forward": of(attention_of(2), (3, 2, 4), (12, 4), (4, 4)),
}

# -------------------------------------------------------------------------------- recurrent layers


def recurrent(kind: str, gates: int, bidirectional: bool = False) -> Operation:
    """One layer of width 2 over two steps of two sequences, all weights given."""
    directions = 2 if bidirectional else 1
    layer = getattr(nn, kind)(3, 2, bidirectional=bidirectional, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def called(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))[0]

    one = ((2 * gates, 3), (2 * gates, 2), (2 * gates,), (2 * gates,))
    return of(called, (2, 2, 3), *(one * directions))


RECURRENT = {
    "RNN": recurrent("RNN", 1),
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "LSTM, both directions": recurrent("LSTM", 4, bidirectional=True),
    "lstm_cell": of(
        lambda x, h, c, w, u: torch.lstm_cell(x, (h, c), w, u)[0],
        *((2, 3), (2, 2), (2, 2), (8, 3), (8, 2)),
    ),
    "gru_cell": of(torch.gru_cell, (2, 3), (2, 2), (6, 3), (6, 2)),
    "rnn_tanh_cell": of(torch.rnn_tanh_cell, (2, 3), (2, 2), (2, 3), (2, 2)),
}

# -------------------------------------------------------------------- convolution, pooling, images


def pooled(name: str, *arguments: object, shape: tuple[int, ...] = IMAGE) -> Operation:
    return of(lambda x: f(name)(x, *arguments), shape)


def resized(mode: str, shape: tuple[int, ...] = IMAGE, **options: object) -> Operation:
    return of(f("interpolate", scale_factor=1.5, mode=mode, **options), shape)


def fractionally_pooled(x: Tensor) -> Tensor:
    samples = torch.full((1, 2, 2), 0.4, dtype=x.dtype)
    return F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=samples)


def unpooled(x: Tensor) -> Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


def sampled(mode: str, padding: str = "zeros") -> Operation:
    options = {"mode": mode, "padding_mode": padding, "align_corners": False}
    return of(lambda x, at: F.grid_sample(x, torch.tanh(at), **options), IMAGE, (1, 2, 2, 2))


IMAGES = {
    "conv1d": of(F.conv1d, (1, 2, 5), (2, 2, 2), (2,)),
    "conv2d": of(f("conv2d", padding=1, stride=2), IMAGE, (2, 2, 3, 3), (2,)),
    "conv2d, grouped and dilated": of(f("conv2d", groups=2, dilation=2), IMAGE, (2, 1, 2, 2)),
    "conv3d": of(F.conv3d, VOLUME, (1, 1, 2, 2, 2), (1,)),
    "conv_transpose1d": of(F.conv_transpose1d, (1, 2, 4), (2, 2, 2), (2,)),
    "conv_transpose2d": of(f("conv_transpose2d", stride=2), (1, 2, 3, 3), (2, 2, 2, 2), (2,)),
    "conv_transpose3d": of(F.conv_transpose3d, (1, 1, 2, 2, 2), (1, 1, 2, 2, 2)),
    "conv_tbc": of(F.conv_tbc, (4, 1, 2), (2, 2, 2), (2,)),
    "max_pool1d": pooled("max_pool1d", 2, shape=SEQUENCE),
    "max_pool2d": pooled("max_pool2d", 2),
    "max_pool3d": pooled("max_pool3d", 2, shape=VOLUME),
    "avg_pool1d": pooled("avg_pool1d", 2, shape=SEQUENCE),
    "avg_pool2d": pooled("avg_pool2d", 2),
    "avg_pool3d": pooled("avg_pool3d", 2, shape=VOLUME),
    "lp_pool1d": of(lambda x: F.lp_pool1d(x.exp(), 3, 2), SEQUENCE),
    "lp_pool2d": pooled("lp_pool2d", 2, 2),
    "adaptive_avg_pool1d": pooled("adaptive_avg_pool1d", 2, shape=SEQUENCE),
    "adaptive_avg_pool2d": pooled("adaptive_avg_pool2d", 3),
    "adaptive_avg_pool3d": pooled("adaptive_avg_pool3d", 2, shape=VOLUME),
    "adaptive_max_pool1d": pooled("adaptive_max_pool1d", 2, shape=SEQUENCE),
    "adaptive_max_pool2d": pooled("adaptive_max_pool2d", 3),
    "adaptive_max_pool3d": pooled("adaptive_max_pool3d", 2, shape=VOLUME),
    "fractional_max_pool2d": of(fractionally_pooled, IMAGE),
    "max_unpool2d": of(unpooled, IMAGE),
    "interpolate, nearest": resized("nearest"),
    "interpolate, nearest-exact": resized("nearest-exact"),
    "interpolate, linear": resized("linear", SEQUENCE),
    "interpolate, bilinear": resized("bilinear"),
    "interpolate, bilinear antialias": resized("bilinear", antialias=True),
    "interpolate, bicubic": resized("bicubic"),
    "interpolate, bicubic antialias": resized("bicubic", antialias=True),
    "interpolate, trilinear": resized("trilinear", VOLUME),
    "interpolate, area": of(f("interpolate", size=(3, 3), mode="area"), IMAGE),
    "grid_sample, bilinear": sampled("bilinear"),
    "grid_sample, nearest": sampled("nearest"),
    "grid_sample, bicubic": sampled("bicubic"),
    "grid_sample, border": sampled("bilinear", "border"),
    "grid_sample, reflection": sampled("bilinear", "reflection"),
    "affine_grid": of(lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False), (1, 2, 3)),
    "pixel_shuffle": pooled("pixel_shuffle", 2, shape=(1, 4, 2, 2)),
    "pixel_unshuffle": pooled("pixel_unshuffle", 2),
    "channel_shuffle": pooled("channel_shuffle", 2),
    "unfold": of(f("unfold", kernel_size=2), IMAGE),
    "fold": of(f("fold", output_size=(3, 3), kernel_size=2), (1, 4, 4)),
    "pad, reflect": of(f("pad", pad=(1, 1, 1, 1), mode="reflect"), IMAGE),
    "pad, replicate": of(f("pad", pad=(1, 1, 1, 1), mode="replicate"), IMAGE),
    "pad, circular": of(f("pad", pad=(1, 1, 1, 1), mode="circular"), IMAGE),
}

# ------------------------------------------------------------------------------------------ losses


def probabilities(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


def with_log_probs(targets: Tensor, **options: object) -> Operation:
    """ctc_loss of two sequences of five steps over four symbols."""
    lengths = torch.tensor([5, 4]), torch.tensor([2, 1])
    loss = partial(F.ctc_loss, targets=targets, **options)
    return of(
        lambda x: loss(x.log_softmax(2), input_lengths=lengths[0], target_lengths=lengths[1]),
        (5, 2, 4),
    )


def chunked_cross_entropy(x: Tensor, weight: Tensor, reduction: str = "mean") -> Tensor:
    """The fused linear layer and loss of newer versions of PyTorch."""
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=2, chunking_method=None, allow_retain_graph=True
    )
    return F.linear_cross_entropy(x, weight, LABELS, reduction=reduction, options=options)


LOSSES = {
    "cross_entropy": of(f("cross_entropy", target=LABELS), MATRIX),
    "cross_entropy, smoothed labels": of(
        f("cross_entropy", target=LABELS, label_smoothing=0.1), MATRIX
    ),
    "cross_entropy, class weights": of(
        f("cross_entropy", target=LABELS, weight=CLASS_WEIGHTS), MATRIX
    ),
    "cross_entropy, probabilities": of(
        lambda x, y: F.cross_entropy(x, probabilities(y)), MATRIX, MATRIX
    ),
    "linear_cross_entropy": of(f("linear_cross_entropy", target=LABELS), MATRIX, (4, 4)),
    "linear_cross_entropy, chunked": of(chunked_cross_entropy, MATRIX, (4, 4)),
    "linear_cross_entropy, chunked, each": of(
        partial(chunked_cross_entropy, reduction="none"), MATRIX, (4, 4)
    ),
    "nll_loss": of(lambda x: F.nll_loss(x.log_softmax(1), LABELS), MATRIX),
    "nll_loss of images": of(
        lambda x: F.nll_loss(x.log_softmax(1), torch.tensor([[[0, 1], [1, 0]]])), (1, 2, 2, 2)
    ),
    "ctc_loss": with_log_probs(torch.tensor([[1, 2], [3, 1]])),
    "ctc_loss, targets in one row": with_log_probs(torch.tensor([1, 1, 3])),
    "kl_div": of(
        lambda x, y: F.kl_div(x.log_softmax(1), probabilities(y), reduction="batchmean"),
        *(MATRIX, MATRIX),
    ),
    "mse_loss": of(F.mse_loss, MATRIX, MATRIX),
    "l1_loss": of(F.l1_loss, MATRIX, MATRIX),
    "smooth_l1_loss": of(F.smooth_l1_loss, MATRIX, MATRIX),
    "huber_loss": of(f("huber_loss", delta=0.7), MATRIX, MATRIX),
    "binary_cross_entropy": of(
        lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()), MATRIX, MATRIX
    ),
    "binary_cross_entropy_with_logits": of(
        f("binary_cross_entropy_with_logits", pos_weight=CLASS_WEIGHTS), MATRIX, MATRIX
    ),
    "poisson_nll_loss": of(lambda x, y: F.poisson_nll_loss(x, y.exp(), full=True), MATRIX, MATRIX),
    "gaussian_nll_loss": of(
        lambda x, y, v: F.gaussian_nll_loss(x, y, v.exp()), MATRIX, MATRIX, MATRIX
    ),
    "soft_margin_loss": of(f("soft_margin_loss", target=2 * ONES_AND_ZEROS - 1), MATRIX),
    "hinge_embedding_loss": of(f("hinge_embedding_loss", target=SIGNS), (3,)),
    "margin_ranking_loss": of(f("margin_ranking_loss", target=SIGNS, margin=0.3), (3,), (3,)),
    "triplet_margin_loss": of(F.triplet_margin_loss, MATRIX, MATRIX, MATRIX),
    "triplet_margin_with_distance_loss": of(
        F.triplet_margin_with_distance_loss, MATRIX, MATRIX, MATRIX
    ),
    "cosine_embedding_loss": of(f("cosine_embedding_loss", target=SIGNS), MATRIX, MATRIX),
    "multi_margin_loss": of(f("multi_margin_loss", target=LABELS), MATRIX),
    "multi_margin_loss, squared": of(f("multi_margin_loss", target=LABELS, p=2), MATRIX),
    "multilabel_margin_loss": of(
        f(
            "multilabel_margin_loss",
            target=torch.tensor([[1, 3, -1, 0], [-1, 1, 2, 3], [0, 1, 2, -1]]),
        ),
        MATRIX,
    ),
    "multilabel_soft_margin_loss": of(
        f("multilabel_soft_margin_loss", target=ONES_AND_ZEROS), MATRIX
    ),
}

# ------------------------------------------------------------------- distances and linear algebra


def symmetric(a: Tensor) -> Tensor:
    return a + a.mT


def definite(a: Tensor) -> Tensor:
    return a @ a.mT + torch.eye(len(a), dtype=a.dtype)


SQUARE = (3, 3)
DISTANCES = {
    "cosine_similarity": of(F.cosine_similarity, MATRIX, MATRIX),
    "pairwise_distance": of(F.pairwise_distance, MATRIX, MATRIX),
    "pairwise_distance, p = 1": of(f("pairwise_distance", p=1.0), MATRIX, MATRIX),
    "cdist, p = 1": of(by("cdist", p=1.0), MATRIX, MATRIX),
    "cdist, p = 2": of(torch.cdist, MATRIX, MATRIX),
    "cdist, p = 2 by products": of(
        by("cdist", compute_mode="use_mm_for_euclid_dist"), MATRIX, MATRIX
    ),
    "cdist, p = 3": of(by("cdist", p=3.0), MATRIX, MATRIX),
    "cdist, p = inf": of(by("cdist", p=math.inf), MATRIX, MATRIX),
    "cdist to itself": of(lambda x: torch.cdist(x, x), MATRIX),
    "pdist": of(F.pdist, MATRIX),
    "pdist, p = 1": of(f("pdist", p=1.0), MATRIX),
    "dist": of(torch.dist, MATRIX, MATRIX),
    "vector_norm": of(torch.linalg.vector_norm, MATRIX),
    "vector_norm, p = 1": of(linalg("vector_norm", ord=1), MATRIX),
    "vector_norm, p = 3": of(linalg("vector_norm", ord=3), MATRIX),
    "vector_norm, p = inf": of(linalg("vector_norm", ord=math.inf), MATRIX),
    "matrix_norm, Frobenius": of(torch.linalg.matrix_norm, MATRIX),
    "matrix_norm, nuclear": of(linalg("matrix_norm", ord="nuc"), MATRIX),
    "matrix_norm, spectral": of(linalg("matrix_norm", ord=2), MATRIX),
    "renorm": of(lambda x: torch.renorm(x, 2, 0, 1.0), MATRIX),
    "bilinear": of(F.bilinear, (2, 3), (2, 2), (2, 3, 2), (2,)),
    "linear": of(F.linear, MATRIX, (2, 4), (2,)),
    "einsum": of(lambda a, b: torch.einsum("ij,kj->ik", a, b), MATRIX, MATRIX),
    "addmm": of(torch.addmm, (3, 3), MATRIX, (4, 3)),
    "baddbmm": of(torch.baddbmm, (2, 3, 3), (2, 3, 2), (2, 2, 3)),
    "grouped_mm": of(
        lambda a, b: F.grouped_mm(a, b, offs=torch.tensor([1, 1, 3], dtype=torch.int32)),
        *((3, 2), (3, 2, 4)),
    ),
    "solve": of(lambda a, b: torch.linalg.solve(definite(a), b), SQUARE, (3, 2)),
    "solve_triangular": of(
        lambda a, b: torch.linalg.solve_triangular(definite(a).tril(), b, upper=False),
        *(SQUARE, (3, 2)),
    ),
    "lstsq": of(lambda a, b: torch.linalg.lstsq(a, b).solution, (4, 2), (4, 1)),
    "inv": of(lambda a: torch.linalg.inv(definite(a)), SQUARE),
    "pinv": of(torch.linalg.pinv, MATRIX),
    "cholesky": of(lambda a: torch.linalg.cholesky(definite(a)), SQUARE),
    "qr": of(lambda a: torch.linalg.qr(a)[1], SQUARE),
    "svdvals": of(torch.linalg.svdvals, MATRIX),
    "svd": of(lambda a: torch.linalg.svd(a, full_matrices=False)[0].abs(), SQUARE),
    "eigvalsh": of(lambda a: torch.linalg.eigvalsh(symmetric(a)), SQUARE),
    "eigh": of(lambda a: torch.linalg.eigh(symmetric(a))[1].abs(), SQUARE),
    "eigvals": of(lambda a: torch.linalg.eigvals(definite(a)).real, SQUARE),
    "det": of(torch.linalg.det, SQUARE),
    "slogdet": of(lambda a: torch.linalg.slogdet(a)[1], SQUARE),
    "matrix_exp": of(torch.linalg.matrix_exp, SQUARE),
    "matrix_power": of(lambda a: torch.linalg.matrix_power(a, 3), SQUARE),
    "householder_product": of(torch.linalg.householder_product, (3, 2), (2,)),
}

# -------------------------------------------------------------------- spectra, indices, reductions


def short_time(x: Tensor) -> Tensor:
    window = torch.hann_window(4, dtype=x.dtype)
    return torch.view_as_real(torch.stft(x, 4, 2, window=window, return_complex=True))


def round_trip(x: Tensor) -> Tensor:
    window = torch.ones(4, dtype=x.dtype)
    spectrum = torch.stft(x, 4, 1, window=window, return_complex=True)
    return torch.istft(spectrum, 4, 1, window=window)


def bags(mode: str, weighted: bool = False) -> Operation:
    offsets = torch.tensor([0, 2, 2])
    if not weighted:
        return of(lambda w: F.embedding_bag(TOKENS, w, offsets, mode=mode), (5, 3))
    return of(
        lambda w, s: F.embedding_bag(TOKENS, w, offsets, mode=mode, per_sample_weights=s),
        *((5, 3), (6,)),
    )


def segments(reduce: str) -> Operation:
    lengths = torch.tensor([2, 0, 3])
    return of(lambda x: torch.segment_reduce(x, reduce, lengths=lengths, initial=0.5), (5, 2))


def scattered(reduce: str) -> Operation:
    index = torch.tensor([0, 1, 0, 2, 1])
    return of(lambda x, y: x.scatter_reduce(0, index, y, reduce), VECTOR, VECTOR)


INDEX = torch.tensor([0, 2, 1, 2])
OTHERS = {
    "fft": of(lambda x: torch.view_as_real(torch.fft.fft(x)), MATRIX),
    "rfft": of(lambda x: torch.view_as_real(torch.fft.rfft(x)), MATRIX),
    "irfft": of(torch.fft.irfft, MATRIX),
    "fft2": of(lambda x: torch.fft.fft2(x).abs(), MATRIX),
    "stft": of(short_time, (8,)),
    "istft": of(round_trip, (8,)),
    "cumsum": of(by("cumsum", dim=1), MATRIX),
    "cumprod": of(by("cumprod", dim=1), MATRIX),
    "cummax": of(lambda x: torch.cummax(x, 1)[0], MATRIX),
    "logcumsumexp": of(by("logcumsumexp", dim=1), MATRIX),
    "logsumexp": of(by("logsumexp", dim=1), MATRIX),
    "prod": of(by("prod", dim=1), MATRIX),
    "std": of(by("std", dim=1), MATRIX),
    "var": of(by("var", dim=1), MATRIX),
    "amax": of(by("amax", dim=1), MATRIX),
    "median": of(lambda x: x.median(1)[0], MATRIX),
    "quantile": of(by("quantile", q=0.3, dim=1), MATRIX),
    "sort": of(lambda x: x.sort(1)[0], MATRIX),
    "topk": of(lambda x: x.topk(2)[0], MATRIX),
    "gather": of(lambda x: x.gather(1, torch.tensor([[0, 3], [1, 1], [2, 0]])), MATRIX),
    "scatter_add": of(lambda x, y: x.scatter_add(0, INDEX, y), VECTOR, (4,)),
    "scatter_reduce, mean": scattered("mean"),
    "scatter_reduce, prod": scattered("prod"),
    "scatter_reduce, amax": scattered("amax"),
    "index_add": of(lambda x, y: x.index_add(0, INDEX, y), VECTOR, (4,)),
    "index_reduce": of(lambda x, y: x.index_reduce(0, INDEX, y, "mean"), VECTOR, (4,)),
    "index_put": of(lambda x, y: x.index_put((INDEX,), y, accumulate=True), VECTOR, (4,)),
    "segment_reduce, sum": segments("sum"),
    "segment_reduce, mean": segments("mean"),
    "segment_reduce, max": segments("max"),
    "segment_reduce, prod": segments("prod"),
    "embedding": of(lambda w: F.embedding(TOKENS, w), (5, 3)),
    "embedding, padding": of(lambda w: F.embedding(TOKENS, w, padding_idx=2), (5, 3)),
    "embedding_bag, sum": bags("sum"),
    "embedding_bag, mean": bags("mean"),
    "embedding_bag, max": bags("max"),
    "embedding_bag, weighted": bags("sum", weighted=True),
    "clamp": of(by("clamp", min=-0.5, max=0.5), MATRIX),
    "atan2": of(torch.atan2, VECTOR, VECTOR),
    "hypot": of(torch.hypot, VECTOR, VECTOR),
    "lgamma": of(lambda x: torch.lgamma(x.exp()), VECTOR),
    "digamma": of(lambda x: torch.digamma(x.exp()), VECTOR),
    "i0e": of(torch.special.i0e, VECTOR),
}

OPERATIONS: dict[str, dict[str, Operation]] = {
    "activations": ACTIVATIONS,
    "norms and attention": NORMS_AND_ATTENTION,
    "recurrent layers": RECURRENT,
    "images": IMAGES,
    "losses": LOSSES,
    "distances and linear algebra": DISTANCES,
    "spectra, indices, reductions": OTHERS,
}
