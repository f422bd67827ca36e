"""Memory budgets: what a user asks for, what is free, and what a computation holds at its peak."""

import ctypes
import math
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameters of mallopt(3)
_C = ctypes.CDLL(None) if sys.platform == "linux" else None
AUTO_SHARE = 0.7  # of what is free; the rest is the allocator's and other people's


def budget_bytes(memory: str | int, device: torch.device) -> int:
    """Bytes meant by ``memory``: "auto" (70 % of what is free on ``device``), a number, or e.g. "8GiB", "500MB".

    Raises:
        ValueError: anything else, or less than a byte.
    """
    if memory == "auto":
        return int(AUTO_SHARE * free_bytes(device))
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(memory))
    try:
        found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        found = 0
    if found < 1:
        raise ValueError(
            f'memory is {memory!r}; use "auto", a number of bytes, or a size such as "8GiB" or "500MB"'
        )
    return found


def free_bytes(device: torch.device) -> int:
    """Bytes free on ``device`` (on a CPU: what the system calls available, within the control group's limit)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")),
        8 * 1024**3,
    )
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (
        limit := (group / "memory.max").read_text().strip()
    ) != "max":
        available = min(available, int(limit) - int((group / "memory.current").read_text()))
    return available


def format_bytes(number: float) -> str:
    """``number`` of bytes in words, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


class OverBudget(Exception):
    """More bytes were live than :func:`measuring` was told to allow."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors' storages made inside it that are still alive: ``now``, and ``peak`` so far.

    The count is the same at every run, unlike the process' memory. It does not see what a kernel allocates within
    itself. With a ``limit`` it raises OverBudget as soon as more is alive.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit, self.now, self.peak = limit, 0, 0
        self._alive: dict[int, weakref.ref] = {}  # storages, by address

    def restart(self) -> None:
        """Lets ``peak`` begin again from ``now``."""
        self.peak = self.now

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in (result,) if isinstance(result, Tensor) else _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive:  # a view, or a result in place
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            if key not in given:  # else one of a tensor that was there before
                self._count(storage, key)
        if self.now > self.limit:
            raise OverBudget
        return result

    def _count(self, storage: Any, key: int) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _AllocatedBytes:
    """The same from CUDA's allocator."""

    def __init__(self, device: torch.device, limit: float) -> None:
        self._device, self.limit, self._start = device, limit, torch.cuda.memory_allocated(device)

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._start

    @property
    def peak(self) -> int:
        found = torch.cuda.max_memory_allocated(self._device) - self._start
        if found > self.limit:
            raise OverBudget
        return found

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


@contextmanager
def measuring(device: torch.device, limit: float = math.inf) -> Iterator[Any]:
    """Bytes alive on ``device`` besides those before: an object with ``now``, ``peak`` and ``restart()``.

    On a CPU a :class:`LiveBytes`, on CUDA the allocator's own count. Raises OverBudget beyond ``limit``, on CUDA when
    ``peak`` is read or when the device itself has no more.
    """
    if device.type != "cuda":
        with LiveBytes(limit) as live:
            yield live
        return
    live = _AllocatedBytes(device, limit)
    live.restart()
    try:
        yield live
    except torch.OutOfMemoryError as error:
        raise OverBudget from error


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def keep_freed_memory() -> None:
    """Has the C library keep large freed blocks for the next allocation, where that is glibc's.

    Left alone it gives them back to the system and gets them, page by page and zeroed, again: at eight probes a
    quarter to a half of a product's time on a CPU. A setting of the process, until :func:`return_freed_memory`.
    """
    _mallopt(_MMAP_THRESHOLD, 1 << 30)
    _mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, and from now on above the thresholds that glibc itself ends up with."""
    _mallopt(_MMAP_THRESHOLD, 32 << 20)
    _mallopt(_TRIM_THRESHOLD, 64 << 20)
    if (trim := getattr(_C, "malloc_trim", None)) is not None:
        trim(0)


def _mallopt(parameter: int, value: int) -> None:
    if (mallopt := getattr(_C, "mallopt", None)) is not None:
        mallopt(parameter, value)
