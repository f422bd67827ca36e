"""Batches of any structure: their tensors, their length, pieces of them, and a fixed list of them.

A batch is a tensor, or tuples, lists and mappings that hold tensors, nested in any way. Whatever
else it holds is passed on as it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A batch is whatever the user's loss function takes, so its type is not ours to say.
Batch = Any


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """``batch`` with ``function`` applied to every tensor in it; the structure stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        # A plain dict also for a BatchEncoding: model(**batch) needs no more.
        return {key: map_tensors(function, item) for key, item in batch.items()}
    if isinstance(batch, tuple | list):
        items = [map_tensors(function, item) for item in batch]
        is_namedtuple = hasattr(batch, "_fields")
        return type(batch)(*items) if is_namedtuple else type(batch)(items)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors in a batch, in the order in which :func:`map_tensors` meets them."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return tensors_of(list(batch.values()))
    if isinstance(batch, tuple | list):
        return [tensor for item in batch for tensor in tensors_of(item)]
    return []


def with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """``batch`` with its tensors, in the order of :func:`tensors_of`, replaced by ``tensors``."""
    replacements = iter(tensors)
    return map_tensors(lambda _: next(replacements), batch)


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """``batch`` on ``device``, with floating-point tensors cast to ``dtype`` where it is given."""

    def moved(tensor: Tensor) -> Tensor:
        cast = dtype is not None and tensor.is_floating_point()
        return tensor.to(device, dtype if cast else tensor.dtype)

    return map_tensors(moved, batch)


def batch_length(batch: Batch) -> int | None:
    """Length of the first axis of the first tensor that has axes; None without such a tensor."""
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), None)


def cut_batch(batch: Batch, first: int, last: int, length: int) -> Batch:
    """Examples ``first`` to ``last`` (exclusive) of a batch of ``length`` examples.

    Tensors without axes stay whole. Raises ValueError for a tensor of another length.
    """

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if tensor.shape[0] != length:
            raise ValueError(
                "a batch must be cut to fit the memory budget, but holds tensors of lengths "
                f"{length} and {tensor.shape[0]}; raise `memory` or pass smaller batches"
            )
        return tensor[first:last]

    return map_tensors(cut, batch)


def described(batch: Batch) -> str:
    """A batch in words, for an error message: its type, and dtype and shape of four tensors."""
    tensors = [
        f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
        for tensor in tensors_of(batch)[:4]
    ]
    return f"a {type(batch).__name__} with {', '.join(tensors) or 'no tensor'}"


def frozen(batches: Iterable[Batch]) -> list[Batch]:
    """The batches as a list, read twice where that is possible to see that they stay the same.

    Raises:
        TypeError: ``batches`` is a single batch or not iterable.
        ValueError: there are none, or the second reading differs (shuffling, augmentation).
    """
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; pass an iterable of batches, "
            "e.g. [batch] for a single one"
        )
    kept = list(batches)
    if not kept:
        raise ValueError(
            "batches is empty; pass at least one batch "
            "(a generator that was read before is empty, too)"
        )
    read_once = iter(batches) is batches  # a generator
    if not isinstance(batches, tuple | list) and not read_once:
        _check_same(kept, batches)
    return kept


def _check_same(kept: list[Batch], again: Iterable[Batch]) -> None:
    for index, (first, second) in enumerate(zip(kept, again, strict=False)):
        if not _equal(tensors_of(first), tensors_of(second)):
            raise ValueError(
                "batches gives different data each time it is read "
                f"(first in batch {index}): shuffling or random augmentation; use shuffle=False "
                "without augmentation, or pass list(batches) to freeze one draw"
            )


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    if len(first) != len(second):
        return False
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
