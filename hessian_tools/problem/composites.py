"""Formulas of operations whose fused kernels PyTorch differentiates once only, or wrongly twice.

Each is made of operations that autograd differentiates as often as asked, and takes the arguments
of the operator that it stands for (:mod:`hessian_tools.problem.kernels` says which). Letters: N
examples, C classes, D features, T time steps, S labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NONE, MEAN, SUM = range(3)  # as ATen counts reductions, and the first two modes of embedding_bag
BAG_SUM, BAG_MEAN, BAG_MAX = range(3)
IMPOSSIBLE = -1e30  # stands for log 0: the derivatives of -inf are NaN


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """g v / ||v|| and the norms, over all dimensions but ``dim``, which is the first or the last.

    Over other dimensions PyTorch itself uses this formula.
    """
    norms = torch.norm_except_dim(v, 2, dim)
    return v * (g / norms), norms


def hardsigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of clamp(x / 6 + 1/2, 0, 1)."""
    inside = (x > -3) & (x < 3)
    return torch.where(inside, grad / 6, torch.zeros_like(grad))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention by PyTorch's own kernel of plain products.

    A model that asks for a fused kernel by ``sdpa_kernel`` gets this one, too.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    return torch._scaled_dot_product_attention_math(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]


# ----------------------------------------------------------------------------------------- losses


def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    """Sum over i != y of max(0, margin - x_y + x_i)^p / C; x of shape (N, C) or (C,)."""
    scores = x.reshape(-1, x.shape[-1])
    labels = target.reshape(-1, 1)
    violations = (margin - scores.gather(1, labels) + scores).clamp(min=0) ** p
    if weight is not None:
        violations = violations * weight[labels]
    others = torch.ones_like(violations).scatter(1, labels, 0)
    losses = (violations * others).sum(1) / scores.shape[1]
    return _reduced(losses.reshape(target.shape), reduction)


def multilabel_margin_loss(
    x: Tensor,
    target: Tensor,
    reduction: int = MEAN,
) -> tuple[Tensor, Tensor]:
    """Sum over labels j and other classes i of max(0, 1 - x_j + x_i) / C, and where labels are.

    The labels of a row of ``target`` end at its first negative entry.
    """
    scores = x.reshape(-1, x.shape[-1])
    listed = target.reshape(scores.shape)
    valid = (listed < 0).cumsum(1) == 0
    labels = listed.clamp(min=0)
    is_label = torch.zeros_like(scores).scatter_add(1, labels, valid.to(scores.dtype)) > 0
    violations = (1 - scores.gather(1, labels)[:, :, None] + scores[:, None, :]).clamp(min=0)
    counted = valid[:, :, None] & ~is_label[:, None, :]
    losses = (violations * counted).sum((1, 2)) / scores.shape[1]
    loss = _reduced(losses.reshape(x.shape[:-1]), reduction)
    return loss, is_label.to(scores.dtype).reshape(x.shape)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Sequence[int] | Tensor,
    target_lengths: Sequence[int] | Tensor,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """Connectionist temporal classification by its forward recursion (Graves et al. 2006).

    ``log_probs`` has the shape (T, N, C) or (T, C); ``targets`` (N, S), or all one after the other.
    """
    scores = log_probs if log_probs.ndim == 3 else log_probs[:, None]
    sizes = torch.as_tensor(target_lengths, device=scores.device).long().reshape(-1)
    steps = torch.as_tensor(input_lengths, device=scores.device).long().reshape(-1)
    path = _with_blanks(targets, sizes, blank).to(scores.device)
    reached = _ctc_recursion(scores, path, blank, steps)
    ends = torch.stack([2 * sizes, (2 * sizes - 1).clamp(min=0)], 1)
    last = reached.gather(1, ends)
    # without labels there is one path only, all blanks
    last = torch.where((sizes == 0)[:, None] & (ends.new_tensor([0, 1]) > 0), IMPOSSIBLE, last)
    losses = -torch.logsumexp(last, 1)
    never = losses > -IMPOSSIBLE / 2
    losses = torch.where(never, 0.0 if zero_infinity else torch.inf, losses)
    if reduction == MEAN:
        return (losses / sizes.clamp(min=1)).mean()
    return losses.sum() if reduction == SUM else losses.reshape(log_probs.shape[1:-1])


def _with_blanks(targets: Tensor, sizes: Tensor, blank: int) -> Tensor:
    """(N, 2 S + 1): the labels of each example with blanks between and around them."""
    if targets.ndim == 1:
        rows = targets.split(sizes.tolist())
        targets = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=blank)
    path = targets.new_full((len(sizes), 2 * targets.shape[1] + 1), blank).long()
    path[:, 1::2] = targets
    return path


def _ctc_recursion(scores: Tensor, path: Tensor, blank: int, steps: Tensor) -> Tensor:
    """(N, 2 S + 1): log-probability to stand at each place of ``path`` after the last step."""
    emitted = scores.gather(2, path.expand(len(scores), *path.shape))  # (T, N, 2 S + 1)
    # a blank between two different labels may be left out
    skips = nn.functional.pad((path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2]), (2, 0))
    first = torch.arange(path.shape[1], device=path.device) < 2
    reached = torch.where(first, emitted[0], IMPOSSIBLE)
    for step in range(1, len(scores)):
        one = nn.functional.pad(reached, (1, 0), value=IMPOSSIBLE)[:, :-1]
        two = nn.functional.pad(reached, (2, 0), value=IMPOSSIBLE)[:, : reached.shape[1]]
        two = torch.where(skips[:, : reached.shape[1]], two, IMPOSSIBLE)
        moved = torch.logsumexp(torch.stack([reached, one, two]), 0) + emitted[step]
        reached = torch.where((step < steps)[:, None], moved, reached)
    return reached


def linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross entropy of a linear layer's outputs; the arguments that follow are about chunks.

    The operator's other results, gradients computed ahead, stay empty: nothing reads them.
    """
    logits = nn.functional.linear(x, linear_weight, linear_bias)
    loss = nn.functional.cross_entropy(
        logits, target, weight=weight, reduction=reduction, ignore_index=ignore_index
    )
    return loss, x.new_empty(0), x.new_empty(0), x.new_empty(0)


def linear_cross_entropies(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    *_: object,
) -> Tensor:
    """The same of each example, (N,)."""
    arguments = x, linear_weight, target, linear_bias, weight, "none", ignore_index
    return linear_cross_entropy(*arguments)[0]


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    if reduction == MEAN:
        return losses.mean()
    return losses.sum() if reduction == SUM else losses


# -------------------------------------------------------------------------------------- distances


def cdist(a: Tensor, b: Tensor, p: float, compute_mode: int | None = None) -> Tensor:
    """(..., N, M): the p-norms of a_i - b_j, a of shape (..., N, D) and b (..., M, D)."""
    return _norm(a[..., :, None, :] - b[..., None, :, :], p)


def pdist(a: Tensor, p: float = 2.0) -> Tensor:
    """(N (N - 1) / 2,): the p-norms of a_i - a_j for i < j."""
    first, second = torch.triu_indices(len(a), len(a), 1, device=a.device)
    return _norm(a[first] - a[second], p)


def _norm(differences: Tensor, p: float) -> Tensor:
    """The p-norm over the last dimension; where it is zero, so are all of its derivatives."""
    sizes = differences.abs()
    if p == 0:
        return ((sizes > 0) + 0 * sizes).sum(-1)  # constant, but with a graph
    if p == float("inf"):
        return sizes.amax(-1)
    if p == 1:
        return sizes.sum(-1)
    if p == 2:
        powers = differences.square()
    else:
        zero = sizes == 0  # where powers below 2 have no second derivative
        powers = torch.where(zero, 0.0, torch.where(zero, 1.0, sizes) ** p)
    total = powers.sum(-1)
    apart = total > 0
    return torch.where(apart, torch.where(apart, total, 1.0) ** (1 / p), 0.0)


# ------------------------------------------------------------------------------- sums over indices


def embedding_bag_backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    """The gradient by the table, dense; grad of shape (bags, D), the result (num_weights, D).

    It is that of the loss: not divided by the indices' frequencies.
    """
    table = grad.new_zeros(num_weights, grad.shape[1])
    if mode == BAG_MAX:
        found = (bag_size > 0)[:, None]
        return table.scatter_add(0, maximum_indices.long().clamp(min=0), grad * found)
    bags = _bags(indices, offsets, offset2bag)
    counted = (indices != padding_idx).to(grad.dtype)
    if per_sample_weights is not None:
        counted = counted * per_sample_weights
    if mode == BAG_MEAN:
        grad = grad / bag_size.clamp(min=1).to(grad.dtype)[:, None]
    return table.index_add(0, indices, grad[bags] * counted[:, None])


def embedding_bag_weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    """The gradient by the weights of the samples, (samples,)."""
    bags = _bags(indices, offsets, offset2bag)
    counted = (indices != padding_idx).to(grad.dtype)
    return (grad[bags] * weight[indices]).sum(1) * counted


def _bags(indices: Tensor, offsets: Tensor, offset2bag: Tensor) -> Tensor:
    """The bag of each index; a fast kernel leaves ``offset2bag`` empty."""
    if len(offset2bag) == len(indices):
        return offset2bag
    places = torch.arange(len(indices), device=indices.device, dtype=offsets.dtype)
    return torch.bucketize(places, offsets, right=True) - 1


def segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Tensor:
    """Sum, mean, product, maximum or minimum of consecutive segments along ``axis``."""
    if lengths is None:
        assert offsets is not None
        lengths = offsets.diff(dim=-1)
    rows = data.reshape(-1, *data.shape[axis:])
    reduced = [
        _segments(row, reduce, counts, initial)
        for row, counts in zip(rows, lengths.reshape(len(rows), -1), strict=True)
    ]
    return torch.stack(reduced).reshape(*data.shape[:axis], -1, *data.shape[axis + 1 :])


def _segments(row: Tensor, reduce: str, lengths: Tensor, initial: float | None) -> Tensor:
    pieces = row[: int(lengths.sum())].split(lengths.tolist())
    return torch.stack([_segment(piece, reduce, initial) for piece in pieces])


def _segment(piece: Tensor, reduce: str, initial: float | None) -> Tensor:
    start = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}[reduce]
    first = piece.new_full(piece.shape[1:], start if initial is None else initial)
    if reduce == "mean":
        total = piece.sum(0) + first
        # of an empty segment without an initial value there is no mean
        return total / len(piece) if len(piece) or initial is None else first
    if reduce == "sum":
        return piece.sum(0) + first
    if reduce == "prod":
        return piece.prod(0) * first
    every = torch.cat([first[None], piece])
    return every.amax(0) if reduce == "max" else every.amin(0)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One matrix product for each group, groups ending at ``offs`` along the shared or free side.

    (rows, K) @ (G, K, M) -> (rows, M); (G, R, K) @ (K, columns) -> (R, columns);
    (R, K) @ (K, M) -> (G, R, M), groups cut K; (G, R, K) @ (G, K, M) is a batched product.
    """
    if offs is None:
        return (a @ b).to(out_dtype or a.dtype)
    ends = offs.tolist()
    cuts = list(zip([0, *ends], ends, strict=False))
    if a.ndim == 2 and b.ndim == 3:
        pieces = [a[i:j] @ matrix for (i, j), matrix in zip(cuts, b, strict=True)]
        rest = a.new_zeros(len(a) - ends[-1], b.shape[2])
        product = torch.cat([*pieces, rest])
    elif a.ndim == 3 and b.ndim == 2:
        pieces = [matrix @ b[:, i:j] for (i, j), matrix in zip(cuts, a, strict=True)]
        rest = a.new_zeros(a.shape[1], b.shape[1] - ends[-1])
        product = torch.cat([*pieces, rest], 1)
    else:
        product = torch.stack([a[:, i:j] @ b[i:j] for i, j in cuts])
    return (product if bias is None else product + bias).to(out_dtype or a.dtype)
