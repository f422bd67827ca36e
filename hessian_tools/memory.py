"""Memory budgets: what a user asks for, what is free, and what a recorded graph holds."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}}
_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
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
        raise ValueError(f'memory is {memory!r}; use "auto", a number of bytes, or a size such as "8GiB" or "500MB"')
    return found


def free_bytes(device: torch.device) -> int:
    """Bytes free on ``device`` (on a CPU: what the system calls available, within the control group's limit)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8 * 1024**3)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        available = min(available, int(limit) - int((group / "memory.current").read_text()))
    return available


def format_bytes(number: float) -> str:
    """``number`` of bytes in words, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


class SavedBytes:
    """Bytes of the distinct storages that autograd saved, without those named in ``exclude`` (the parameters')."""

    def __init__(self, exclude: Sequence[Tensor]) -> None:
        self._excluded = {t.untyped_storage().data_ptr() for t in exclude}
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is met twice

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self._storages[storage.data_ptr()] = storage
        return tensor.detach()  # an undetached output would hold its own graph alive for good

    def taken(self) -> int:
        """Bytes counted since the last call."""
        total = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()
        return total


@contextmanager
def counting_saved_bytes(exclude: Sequence[Tensor]) -> Iterator[SavedBytes]:
    """Counts what the graph recorded inside keeps for its backward passes: a count, not a measurement."""
    saved = SavedBytes(exclude)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved
