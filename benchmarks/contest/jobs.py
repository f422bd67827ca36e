"""The jobs: each is one call that a contender answers, and what is measured around it."""

import gc
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from contest import referee
from contest.cases import Case, criterion
from contest.contender import Contender

WORDS = {
    "a1": "one product with the whole Hessian",
    "a8": "{probes} products with the whole Hessian",
    "b": "one product with each of {blocks} weight matrices' blocks",
    "c": "density of the whole Hessian, {density[0]} probes x {density[1]} steps",
    "g1": "one product with the whole Gauss-Newton matrix",
    "g8": "{probes} products with the whole Gauss-Newton matrix",
    "h": "one Gauss-Newton product with each of {blocks} weight matrices' blocks",
    "d": "spectra of {blocks} weight matrices to JS0, {blockwise[0]} probes x {blockwise[1]} steps",
}
COUNTED = (
    "a1",
    "a8",
    "b",
    "g1",
    "g8",
    "h",
)  # the others are many of these


@dataclass(frozen=True)
class Repetition:
    """One repetition of a job; ``scale`` turns its seconds into those of the whole job where only a
    part was run.
    """

    seconds: float
    scale: float
    facts: dict[str, Any]


class Bench:
    """One contender on one case. Jobs a and b go on from an operator that has done a product (in a
    Lanczos run all but one do), c and d start from the model and data every time.
    """

    def __init__(self, contender: type[Contender], case: Case) -> None:
        self.kind, self.case, self.contender = contender, case, contender(case)
        self.vectors = referee.directions(case, case.work.probes if case.work else 1)
        self.block_vectors = referee.block_directions(case)
        self._prepared: dict[str, Any] = {}

    def repeat(self, job: str) -> Repetition:
        run = self._call(job)
        gc.collect()
        with sdpa_kernel(SDPBackend.MATH):
            started = _clock(self.case.device)
            scale, facts = run()
            seconds = _clock(self.case.device) - started
        if "unscaled" in facts:  # seconds that are the same for a part of the job
            scale = (seconds - facts["unscaled"]) / seconds * scale + facts["unscaled"] / seconds
        return Repetition(seconds, scale, facts)

    def warm(self) -> None:
        """The products of jobs a and b once, so that later ones find whatever is kept between
        products.
        """
        with sdpa_kernel(SDPBackend.MATH):
            self.contender.product(self.contender.layout(self.vectors))
            self.contender.block_products(self.block_vectors)

    def operations(self, job: str) -> int:
        """Floating-point operations of one repetition."""
        run = self._call(job)
        counter = FlopCounterMode(display=False)
        # what it does to follow modules breaks libraries that differentiate forwards
        counter.mod_tracker = _NoModules()
        with counter, sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops()

    def errors(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """Relative errors against the referee's products, under its names."""
        with sdpa_kernel(SDPBackend.MATH):
            whole = self.contender.product(
                self.contender.layout(referee.whole_directions(self.case))
            )
            found = dict(
                zip((referee.WHOLE, referee.SMALL), self.contender.rows(whole), strict=True)
            )
            blocks = self.contender.block_products(self.block_vectors)
        found |= {referee.BLOCK + name: product for name, product in blocks.items()}
        found |= self._gauss_newton()
        return {
            name: referee.relative_error(found[name], product)
            for name, product in expected.items()
            if name in found
        }

    def _gauss_newton(self) -> dict[str, Tensor]:
        """Gauss-Newton products under the referee's names; none where they are not offered."""
        with suppress(NotImplementedError), sdpa_kernel(SDPBackend.MATH):
            whole = self.contender.gauss_newton(
                self.contender.layout(referee.whole_directions(self.case))
            )
            names = (referee.OUTPUTS, referee.OUTPUTS_SMALL)
            found = dict(zip(names, self.contender.rows(whole), strict=True))
            blocks = self.contender.gauss_newton_blocks(self.block_vectors)
            return found | {referee.OUTPUTS_BLOCK + name: v for name, v in blocks.items()}
        return {}

    def notes(self) -> list[str]:
        with sdpa_kernel(SDPBackend.MATH):
            return self.contender.notes()

    def _call(self, job: str) -> Callable[[], tuple[float, dict[str, Any]]]:
        if job in ("a1", "a8"):
            vectors = self.contender.layout(self.vectors[: None if job == "a8" else 1])
            return lambda: (self.contender.product(vectors), (1.0, {}))[1]
        if job in ("g1", "g8"):
            vectors = self.contender.layout(self.vectors[: None if job == "g8" else 1])
            return lambda: (self.contender.gauss_newton(vectors), (1.0, {}))[1]
        if job == "h":
            return lambda: (self.contender.gauss_newton_blocks(self.block_vectors), (1.0, {}))[1]
        if job == "b":
            return lambda: (self.contender.block_products(self.block_vectors), (1.0, {}))[1]
        if job == "c":
            if job not in self._prepared:
                with sdpa_kernel(SDPBackend.MATH):
                    self._prepared[job] = self.contender.hint()
            return self._density
        if job == "d":
            return self._blockwise
        raise ValueError(f"job is {job!r}; there are {', '.join(WORDS)}")

    def _density(self) -> tuple[float, dict[str, Any]]:
        fresh = self.kind(self.case)
        grid, density = fresh.density(*self.case.work.density, self._prepared["c"])
        fresh.close()
        return 1.0, {"mass": float(np.trapezoid(density, grid))}

    def _blockwise(self) -> tuple[float, dict[str, Any]]:
        work = self.case.work
        probes, steps = work.sample if self.kind.rebuilds else work.blockwise
        fresh = self.kind(self.case)
        spectra = fresh.blockwise(probes, steps)
        fresh.close()
        started = time.perf_counter()
        js = ht.js_heterogeneity(spectra)
        facts = {name: reading.mean for name, reading in js.readings.items()} | {
            "scale_spread": js.scale_spread.value
        }
        facts |= {"probes": probes, "steps": steps, "unscaled": time.perf_counter() - started}
        return work.blockwise[0] * work.blockwise[1] / (probes * steps), facts


class _NoModules:
    """Stands for the counter's view of modules, and sees none."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def forward_operations(case: Case) -> int:
    """F, the unit of the counted operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for inputs, targets in case.batches:
            criterion(case.model(inputs), targets)
    return counter.get_total_flops()


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """What ``call`` adds at its peak to the memory taken before it; meant for a process that does
    nothing else.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # forget the peak of building the model, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
