"""How the GPU benchmark measures time, peak memory, product rates, operations, kernel launches.

Nothing here knows of Hessians: every function takes a device and a call. Times are wall times
around a call that the device has finished; inside a run, where waiting would spoil what is
measured, :class:`Clock` places CUDA events.
"""

import contextlib
import json
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hessian_tools.curvature.engine.precision import tf32
from hessian_tools.results import versions, write_atomically

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name,
            "gpu_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {**found, **versions()}


def named(hardware: Mapping[str, Any]) -> str:
    """The device of a result in a few words."""
    return str(hardware.get("gpu", f"{hardware['cpu']}, {hardware['threads']} thread(s)"))


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those the device has: TF32 is CUDA's."""
    return tuple(name for name in DTYPES if device.type == "cuda" or name != "tf32")


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Median, smallest and largest wall time of ``repeats`` calls after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    counted = times[1:]
    return {
        "median": float(np.median(counted)),
        "low": min(counted),
        "high": max(counted),
        "repeats": repeats,
    }


class Clock:
    """Sums the time of intervals without making the device wait: CUDA events, read when asked for
    the sum.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._marks, self._sum = device, [], 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((start, self._mark()))

    def taken(self) -> float:
        """Seconds since the last call; waits for the device."""
        wait(self.device)
        cuda = self.device.type == "cuda"
        total = sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in self._marks)
        self._marks.clear()
        return total

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def reset_peak(device: torch.device) -> None:
    """The next :func:`peak_bytes` counts from here; a CPU keeps no such mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes of tensors on a CUDA device since :func:`reset_peak`; on a CPU, of the process
    since it started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(precision: str, size: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Floating-point operations a second of a product of two random ``size`` x ``size`` matrices.

    Random, for a GPU multiplies zeros faster: it draws less power and keeps its clock.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, device=device, generator=generator).to(DTYPES[precision])
        for _ in range(2)
    )
    out = torch.empty_like(a)
    with tf32(precision == "tf32"):
        taken = seconds(lambda: torch.mm(a, b, out=out), device, repeats)
    return {
        "precision": precision,
        "size": size,
        "seconds": taken,
        "rate": 2 * size**3 / taken["median"],
    }


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def launches(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """What a call asks of the device, after one call that is not counted: operator calls and, on
    CUDA, kernels.

    ``device_seconds`` is the sum over kernels: where the wall time of the call is well above it,
    launches dominate.
    """
    call()
    with _Operators() as operators:
        call()
    found: dict[str, Any] = {
        "operators": operators.calls.total(),
        "kernels": None,
        "copies": None,
        "device_seconds": None,
    }
    if device.type != "cuda":
        return found
    wait(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        wait(device)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in events if e.name.startswith(("Memcpy", "Memset"))]
    busy = sum(e.time_range.elapsed_us() for e in events) / 1e6
    return {
        **found,
        "kernels": len(events) - len(copies),
        "copies": len(copies),
        "device_seconds": busy,
    }


def moves_data(function: Any) -> bool:
    """Whether an operator does more than look at a tensor in another shape."""
    return not function.is_view and function is not torch.ops.aten._unsafe_view.default


class _Operators(TorchDispatchMode):
    """Counts the operators that reach the device's backend, views left out: they launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if moves_data(function):
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


class ResultFile:
    """Rows of one benchmark in a JSON file, written whole after each: a run that was stopped goes
    on at the next row.

    Args:
        path: the file. header: all that the rows depend on (settings, hardware), JSON-able.
    Raises:
        ValueError: the file holds rows of another header, naming what differs.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, json.loads(json.dumps(header))
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            kept = json.loads(path.read_text())
            self.rows = kept.pop("rows")
            differing = [
                key for key in {**self.header, **kept} if kept.get(key) != self.header.get(key)
            ]
            if differing:
                raise ValueError(
                    f"{path} has rows of another {', '.join(differing)}; remove it or name "
                    f"another --out"
                )

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(json.loads(json.dumps(row)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.path, json.dumps({**self.header, "rows": self.rows}, indent=1).encode()
        )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
