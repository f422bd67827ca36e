"""Batches of any structure: their tensors, their length, pieces of them, and a fixed list of them.

A batch is a tensor, or tuples, lists, mappings and objects (dataclasses, graphs, whatever torch's
pytrees know) that hold tensors, nested in any way. Whatever else it holds is passed on as it is.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

# A batch is whatever the user's loss function takes, so its type is not ours to say.
Batch = Any
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)  # told by their repr
_CODE = (type, nn.Module, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """``batch`` with ``function`` applied to every tensor in it; the structure stays.

    Containers and objects that hold tensors are copied, never changed; all else is passed on.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    parts = _apart(batch)
    if parts is None:
        return batch
    return parts.rebuilt([map_tensors(function, item) for item in parts.items])


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors in a batch, in the order in which :func:`map_tensors` meets them."""
    if isinstance(batch, Tensor):
        return [batch]
    parts = _apart(batch)
    return [] if parts is None else [tensor for item in parts.items for tensor in tensors_of(item)]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a container or an object holds, and how the like of it is made of other things."""

    items: list[Batch]
    rebuilt: Callable[[list[Batch]], Batch]


def _apart(batch: Batch) -> _Parts | None:
    """A batch's parts; None for what is not looked into."""
    return _container_apart(batch) or _object_apart(batch)


def _container_apart(batch: Batch) -> _Parts | None:
    """The parts of a container; None for anything else."""
    if isinstance(batch, Mapping):
        return _Parts(list(batch.values()), partial(_mapping_of, batch))
    if isinstance(batch, PackedSequence):
        # its batch_sizes are no data, and stay on the CPU
        items = [batch.data, batch.sorted_indices, batch.unsorted_indices]
        return _Parts(items, partial(_packed, batch.batch_sizes))
    if isinstance(batch, tuple | list):
        is_namedtuple = hasattr(batch, "_fields")
        kind = type(batch)
        return _Parts(list(batch), lambda items: kind(*items) if is_namedtuple else kind(items))
    if type(batch) in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[type(batch)]
        items, context = node.flatten_fn(batch)
        return _Parts(list(items), lambda items: node.unflatten_fn(items, context))
    return None


def _mapping_of(batch: Mapping[object, Batch], items: list[Batch]) -> Mapping[object, Batch]:
    """A mapping like ``batch`` with other values; a plain dict where its kind cannot be copied."""
    pairs = dict(zip(batch, items, strict=True))
    if type(batch) is dict:
        return pairs
    try:
        like: Any = copy.copy(batch)  # of the user's own kind
        for key, item in pairs.items():
            like[key] = item
    except Exception:
        return pairs
    return like if like is not batch else pairs


def _packed(sizes: Tensor, items: list[Batch]) -> PackedSequence:
    data, *indices = items
    return PackedSequence(data, sizes, *indices)


def _object_apart(batch: Batch) -> _Parts | None:
    """The attributes of an object that hold tensors; None where none do."""
    if not _is_record(batch):
        return None
    holding = {
        name: value
        for name, value in _attributes(batch).items()
        if _holds_tensors(value, seen=[batch])
    }
    if not holding:
        return None

    def rebuilt(items: list[Batch]) -> Batch:
        like = copy.copy(batch)
        for name, item in zip(holding, items, strict=True):
            object.__setattr__(like, name, item)  # dataclasses may be frozen
        for holder in [like, *items]:
            _redirect(holder, batch, like)
        return like

    return _Parts(list(holding.values()), rebuilt)


def _redirect(holder: object, old: object, new: object) -> None:
    """Attributes of ``holder`` that lead back to ``old`` lead to ``new``."""
    if not _is_record(holder):
        return
    for name, value in list(_attributes(holder).items()):
        if value is old:
            object.__setattr__(holder, name, new)
        elif isinstance(value, weakref.ref) and value() is old:
            object.__setattr__(holder, name, weakref.ref(new))


def _is_record(batch: object) -> bool:
    """Whether an object may hold data: it is neither code nor one of torch's own values."""
    return not isinstance(batch, _CODE + _VALUES)


def _attributes(batch: object) -> dict[str, object]:
    """An object's attributes by name, also those in slots."""
    slots = [
        name
        for kind in type(batch).__mro__
        for name in _as_names(getattr(kind, "__slots__", ()))
        if name not in ("__dict__", "__weakref__") and hasattr(batch, name)
    ]
    return {name: getattr(batch, name) for name in slots} | getattr(batch, "__dict__", {})


def _as_names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _holds_tensors(batch: object, seen: list[object]) -> bool:
    """Whether there is a tensor in ``batch``; its holders are ``seen`` and not looked at again."""
    if isinstance(batch, Tensor):
        return True
    if any(batch is holder for holder in seen):
        return False
    return any(_holds_tensors(item, [*seen, batch]) for item in _held(batch))


def _held(batch: Batch) -> list[Batch]:
    """All that a container or an object holds, tensors or not."""
    container = _container_apart(batch)
    if container is not None:
        return container.items
    return list(_attributes(batch).values()) if _is_record(batch) else []


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


def outline(batch: Batch, holders: Sequence[object] = ()) -> str:
    """All that a trace with a batch depends on: kinds of tensors, and whatever else it holds.

    Things whose value cannot be told are described by which object they are.
    """
    if isinstance(batch, Tensor):
        return _kind(batch)
    if any(batch is holder for holder in holders):
        return "above"
    if isinstance(batch, _VALUES) or batch is None:
        return repr(batch)
    if _apart(batch) is None:
        return f"{type(batch).__qualname__} {id(batch)}"
    parts = _named_parts(batch)
    held = [f"{name}{outline(part, [*holders, batch])}" for name, part in parts]
    return f"{type(batch).__qualname__}({', '.join(held)})"


def _named_parts(batch: Batch) -> Iterator[tuple[str, Batch]]:
    """What a container or an object holds, each part with what it is told apart by, if any."""
    if isinstance(batch, Mapping):
        yield from ((f"{key!r}: ", item) for key, item in batch.items())
        return
    if isinstance(batch, PackedSequence):
        yield "", batch.batch_sizes.tolist()
    container = _container_apart(batch)
    yield from (("", item) for item in container.items) if container else ()
    yield from ((f"{name}=", value) for name, value in _attributes(batch).items())


def batch_length(batch: Batch) -> int | None:
    """Length of the first axis of the first tensor that has axes; None without such a tensor."""
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), None)


def lengths_agree(batch: Batch) -> bool:
    """Whether all tensors of a batch that have axes have the same first one."""
    return len({tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0}) == 1


def is_plain(batch: Batch) -> bool:
    """Whether a batch is of tensors, tuples, lists and mappings, without other objects in it."""
    if isinstance(batch, Mapping):
        return all(map(is_plain, batch.values()))
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return all(map(is_plain, batch))
    return isinstance(batch, Tensor) or _apart(batch) is None


def cut_batch(batch: Batch, first: int, last: int, length: int) -> Batch:
    """Examples ``first`` to ``last`` (exclusive) of a batch of ``length`` examples.

    Tensors without axes stay whole. Raises ValueError for a tensor of another length, or a sparse
    one.
    """

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if tensor.shape[0] != length:
            raise ValueError(
                "a batch must be cut to fit the memory budget, but holds tensors of lengths "
                f"{length} and {tensor.shape[0]}; raise `memory` or pass smaller batches"
            )
        if tensor.layout != torch.strided:
            raise ValueError(
                "a batch must be cut to fit the memory budget, but holds a sparse tensor; raise "
                "`memory` or pass smaller batches"
            )
        return tensor[first:last]

    return map_tensors(cut, batch)


def described(batch: Batch) -> str:
    """A batch in words, for an error message: its type, and dtype and shape of four tensors."""
    tensors = [_kind(tensor) for tensor in tensors_of(batch)[:4]]
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
        difference = _difference(tensors_of(first), tensors_of(second))
        if difference:
            raise ValueError(
                f"batches gives different data each time it is read (batch {index}: {difference}); "
                "pass an iterable that repeats itself (a DataLoader with shuffle=False over data "
                "without random transforms), or list(batches) to keep one reading"
            )


def _difference(first: list[Tensor], second: list[Tensor]) -> str:
    """How two readings of a batch differ, in words; "" where they do not."""
    if len(first) != len(second):
        return f"{len(first)} tensors, then {len(second)}"
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"tensor {number} is {_kind(a)}, then {_kind(b)}"
        differing = sum(_unequal(x, y) for x, y in zip(_stored(a), _stored(b), strict=True))
        if differing:
            return f"tensor {number}, {_kind(a)}, in {differing} of {a.numel()} entries"
    return ""


def _unequal(a: Tensor, b: Tensor) -> int:
    """How many entries differ; NaN is like itself here, and stands for a missing value."""
    if a.shape != b.shape:  # of sparse tensors with more entries, or fewer
        return max(a.numel(), b.numel())
    a, b = a.cpu(), b.cpu()
    return int(((a != b) & ~((a != a) & (b != b))).sum())


def _stored(tensor: Tensor) -> list[Tensor]:
    """The dense tensors of which a sparse one is made; a dense one by itself."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    return [tensor.to_sparse_coo().coalesce().indices(), tensor.values()]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
