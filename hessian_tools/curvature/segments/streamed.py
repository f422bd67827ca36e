"""Attention by blocks of queries and cross-entropy by chunks of rows, each part a segment.

Both take the function that they stand for first, and call it for what they cannot cut. Letters: T
queries, S keys, E features of a head, Ev of a value, R rows (tokens), C classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hessian_tools.curvature.segments.segment import segment


def attention(
    whole: Callable[..., Tensor],
    block: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: float | bool | None,
) -> Tensor:
    """scaled_dot_product_attention, (..., T, E) x (..., S, E) x (..., S, Ev) -> (..., T, Ev)."""
    length = query.shape[-2]
    if length <= block or dropout_p > 0 or (is_causal and attn_mask is not None):
        return whole(query, key, value, attn_mask, dropout_p, is_causal, **options)

    def rows(first: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if is_causal:  # query i sees keys 0 to i
            shape = query.shape[-2], key.shape[-2]
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(first)
        return whole(query, key, value, mask, **options)

    parts = []
    for number, part in enumerate(query.split(block, dim=-2)):
        first = number * block
        seen = key.shape[-2]
        if is_causal:
            seen = min(first + part.shape[-2], seen)
        mask = attn_mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] == length:  # else one for all
            mask = mask[..., first : first + block, :]
        parts.append(segment(rows, first, part, key[..., :seen, :], value[..., :seen, :], mask))
    return torch.cat(parts, dim=-2)


def cross_entropy(
    whole: Callable[..., Tensor],
    logits: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy of (R, C) logits and (R,) classes; any other kind as it stands."""
    rows = max(1, logits // max(1, input.shape[-1]))
    classes = input.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    summed = reduction in ("mean", "sum")
    if not (classes and plain and summed) or len(input) <= rows:
        return whole(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    parts = [
        segment(whole, x, y, ignore_index=ignore_index, reduction="sum")
        for x, y in zip(input.split(rows), target.split(rows), strict=True)
    ]
    total = torch.stack(parts).sum()
    return total / (target != ignore_index).sum() if reduction == "mean" else total
