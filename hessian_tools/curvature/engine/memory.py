"""Memory budgets: what a user asks for, what is free, and what a computation holds at its peak."""

import ctypes
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

AUTO_SHARE = 0.7  # of what is free; the rest is the allocator's and other people's
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")}
_UNITS |= {f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")}
_UNKNOWN_FREE = 8 * 1024**3  # taken to be available where the system does not say

# Parameters of mallopt(3), of the C library.
_MMAP_THRESHOLD = -3
_TRIM_THRESHOLD = -1
_C = ctypes.CDLL(None) if sys.platform == "linux" else None


def budget_bytes(memory: str | int, device: torch.device) -> int:
    """Bytes meant by ``memory``: a number, "8GiB", "500MB", or "auto".

    "auto" is 70 % of what is free on ``device``.

    Raises:
        ValueError: anything else, or less than a byte.
    """
    if memory == "auto":
        return int(AUTO_SHARE * free_bytes(device))
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(memory))
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(
            f'memory is {memory!r}; use "auto", a number of bytes, '
            'or a size such as "8GiB" or "500MB"'
        )
    return size


def free_bytes(device: torch.device) -> int:
    """Bytes free on ``device``.

    On a CPU what the system calls available, within the control group's limit.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _available_bytes()
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            available = min(available, int(limit) - used)
    return available


def _available_bytes() -> int:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return _UNKNOWN_FREE


def format_bytes(number: float) -> str:
    """``number`` of bytes in words, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


class OverBudget(Exception):
    """More bytes were live than :func:`measuring` allows."""


class ByteCounter(Protocol):
    """What :func:`measuring` gives: bytes alive besides those before."""

    @property
    def now(self) -> int:
        """Bytes alive at the moment."""

    @property
    def peak(self) -> int:
        """The most bytes alive since the last :meth:`restart`."""

    def restart(self) -> None:
        """Lets ``peak`` begin again from ``now``."""


# The positional and the keyword arguments of an operation.
Arguments = tuple[tuple[object, ...], Mapping[str, object]]


def write_zeros_out(arguments: Arguments) -> Arguments:
    """``arguments`` of an operation with plain tensors for PyTorch's zeros without memory.

    An operation that a dispatch mode calls on those may crash the process.
    """
    if not any(tensor._is_zerotensor() for tensor in _tensors(arguments)):
        return arguments
    positional, keywords = tree_map_only(Tensor, torch.clone, arguments)
    return positional, keywords


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors' storages made inside it that are still alive.

    ``now`` and ``peak`` are the same at every run, unlike the process' memory. What a kernel
    allocates within itself is not seen. With a ``limit`` it raises OverBudget as soon as more is
    alive.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by the storage's address

    def restart(self) -> None:
        """Lets ``peak`` begin again from ``now``."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        args, kwargs = write_zeros_out((args, kwargs or {}))
        result = function(*args, **kwargs)
        given: set[int] | None = None
        for storage in _storages((result,) if isinstance(result, Tensor) else _tensors(result)):
            key = storage._cdata
            if key in self._alive:  # a view, or a result in place
                continue
            if given is None:
                given = {s._cdata for s in _storages(_tensors((args, kwargs)))}
            if key not in given:  # else one of a tensor that was there before
                self._count(storage, key)
        if self.now > self.limit:
            raise OverBudget
        return result

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The memory of tensors; that of sparse ones lies in the dense ones that they are made of."""
    for tensor in tensors:
        if tensor.layout == torch.strided:
            yield tensor.untyped_storage()
        elif tensor.layout == torch.sparse_coo:
            yield from _storages([tensor._indices(), tensor._values()])
        elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from _storages([tensor.crow_indices(), tensor.col_indices(), tensor.values()])
        elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from _storages([tensor.ccol_indices(), tensor.row_indices(), tensor.values()])


class _AllocatedBytes:
    """The same from CUDA's allocator; OverBudget is raised when ``peak`` is read."""

    def __init__(self, device: torch.device, limit: float) -> None:
        self.limit = limit
        self._device = device
        self._start = torch.cuda.memory_allocated(device)

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._start

    @property
    def peak(self) -> int:
        peak = torch.cuda.max_memory_allocated(self._device) - self._start
        if peak > self.limit:
            raise OverBudget
        return peak

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


@contextmanager
def measuring(device: torch.device, limit: float = math.inf) -> Iterator[ByteCounter]:
    """Counts the bytes alive on ``device`` besides those before.

    On a CPU a :class:`LiveBytes`, on CUDA the allocator's own count. Raises OverBudget beyond
    ``limit``, on CUDA when ``peak`` is read or when the device itself has no more.
    """
    if device.type != "cuda":
        with LiveBytes(limit) as live:
            yield live
        return
    allocated = _AllocatedBytes(device, limit)
    allocated.restart()
    try:
        yield allocated
    except torch.OutOfMemoryError as error:
        raise OverBudget from error


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """Has the C library keep large freed blocks for the next allocation, where that is glibc's.

    Left alone it gives them back to the system and gets them, page by page and zeroed, again: at
    eight probes a quarter to a half of a product's time on a CPU. A setting of the process, until
    :func:`return_freed_memory`.
    """
    _mallopt(_MMAP_THRESHOLD, 1 << 30)
    _mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, now and above glibc's usual thresholds from now on."""
    _mallopt(_MMAP_THRESHOLD, 32 << 20)
    _mallopt(_TRIM_THRESHOLD, 64 << 20)
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(_C, "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
