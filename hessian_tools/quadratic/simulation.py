"""Many runs of one method at once: starts, step sizes and problems are rows of one tensor.

A step is a product with H (one matrix product for all runs of a problem), the loss of every run, and the method's
update in place. Runs go through in pieces small enough that a piece's vectors stay in the second-level cache for all
its steps, on one thread a core; on a GPU all go together. Every ``_WINDOW`` steps the losses of that window are looked
through at once: crossings of tolerances, divergence, what is recorded, and what an observer wants to see.

A run whose loss exceeds ``DIVERGED`` times its first, or is not a number, is flagged with the step and taken out (its
row is zero from then on, its losses inf): rows never meet, so that it changes nothing for the others. Losses below
``VANISHED`` of the first count as zero, before denormal numbers slow everything down.

Shapes: N problems, E step sizes, S starts, R = E S runs of a problem, d coordinates, T recorded steps, K tolerances.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.quadratic.methods import METHODS
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.results import registered

DIVERGED = 1e12
VANISHED = 1e-200
TOLERANCES = tuple(float(f"1e-{power}") for power in range(1, 13))
_WINDOW = 64  # steps between two looks
_PIECE_BYTES = 3 << 16  # of one (R, d) tensor of a piece: four or five of them fit a megabyte
_TILE = 16  # blocks are joined until a product has this many columns
Observer = Callable[[slice, slice, int, Tensor], None]
"""Called with (problems, runs, step of the first row, losses relative to the first, (window + 1, n, r))."""


@registered
@dataclass(frozen=True, eq=False)
class Runs:
    """What became of the runs. ``...`` is (N,) of a batched problem, (E,) of several step sizes, and (S,)."""

    method: str
    settings: dict[str, Any]
    step: str  # how the step size was chosen
    steps: np.ndarray  # (...) eta of each run
    num_steps: int
    first_losses: np.ndarray = field(repr=False)  # (...) f(w_0)
    recorded: np.ndarray = field(repr=False)  # (T,) steps whose losses are kept, 0 first
    losses: np.ndarray = field(
        repr=False
    )  # (..., T) f / f(w_0); inf once diverged, nan where the run was stopped
    tolerances: np.ndarray = field(repr=False)  # (K,)
    reached: np.ndarray = field(
        repr=False
    )  # (..., K) first step with f / f(w_0) <= tolerance, inf where never
    diverged_at: np.ndarray = field(
        repr=False
    )  # (...) step at which the run was taken out, inf where it was not
    final: np.ndarray = field(repr=False)  # (..., d) the last iterate, zero where the run diverged
    tail: np.ndarray = field(repr=False)  # (P, ..., d) the last P iterates that were asked for

    @property
    def diverged(self) -> np.ndarray:
        """(...) bool."""
        return np.isfinite(self.diverged_at)

    def iterations_to(self, tolerance: float) -> np.ndarray:
        """(...) first step with f / f(w_0) <= ``tolerance``, inf where never.

        Raises:
            ValueError: for a tolerance that the run did not watch.
        """
        found = np.flatnonzero(np.isclose(self.tolerances, tolerance, rtol=1e-12, atol=0))
        if not len(found):
            watched = ", ".join(f"{t:g}" for t in self.tolerances)
            raise ValueError(
                f"tolerance is {tolerance}; the run watched {watched}; pass tolerances= with yours to it"
            )
        return self.reached[..., found[0]]

    def quantiles(
        self, tolerance: float, probabilities: Sequence[float] = (0.25, 0.5, 0.75)
    ) -> np.ndarray:
        """(len(probabilities), ...) quantiles over starts of ``iterations_to``: runs' own values, inf with the rest."""
        return np.quantile(
            self.iterations_to(tolerance), probabilities, axis=-1, method="inverted_cdf"
        )

    def median_iterations(self, tolerance: float) -> np.ndarray:
        """(...) median over starts of ``iterations_to``."""
        return self.quantiles(tolerance, (0.5,))[0]


@dataclass(frozen=True)
class Plan:
    """What all pieces of a simulation share."""

    method: str
    settings: Mapping[str, Any]
    num_steps: int
    tolerances: Tensor  # (K,)
    recorded: np.ndarray  # (T,)
    tail: int
    stop_at: float | None  # a piece ends when all its runs are at this or diverged
    observe: Observer | None


def simulate(
    problem: Quadratic, method: str, settings: Mapping[str, Any], starts: Tensor, steps: Tensor, num_steps: int, *,
    tolerances: Sequence[float] = TOLERANCES, num_recorded: int = 200, tail: int = 0, stop_at: float | None = None,
    observe: Observer | None = None, progress: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Runs ``method`` from ``starts`` with ``steps``; validated arguments (:func:`hessian_tools.quadratic.run` does).

    Args:
        starts: (N, S, d) float64. steps: (N, E, S) eta.
        settings: all of the method's. num_recorded: about so many losses of each run are kept, evenly in log t.
    Returns:
        the arrays of :class:`Runs` from ``first_losses`` on, by name, with (N, E, S) in front.
    """
    n, e, s = steps.shape
    w0 = starts[:, None].expand(n, e, s, problem.size).reshape(n, e * s, problem.size)
    eta = steps.reshape(n, e * s, 1).to(w0)
    watched = torch.tensor(sorted(tolerances, reverse=True), dtype=torch.float64, device=w0.device)
    recorded = np.unique(np.geomspace(1, num_steps + 1, num_recorded).round().astype(int) - 1)
    plan = Plan(
        method, settings, num_steps, watched, recorded, min(tail, num_steps), stop_at, observe
    )
    pieces = list(_pieces(n, e * s, problem.size, w0.device.type))
    rows = sum((p.stop - p.start) * (r.stop - r.start) for p, r in pieces)
    parts: list[dict[str, Tensor]] = []
    with tqdm(
        total=rows * num_steps, unit="step", unit_scale=True, disable=None if progress else True
    ) as bar:

        def one(piece: tuple[slice, slice]) -> dict[str, Tensor]:
            problems, runs = piece
            seen = None if observe is None else partial(observe, problems, runs)
            return _piece(
                problem.part(problems),
                w0[problems, runs].clone(),
                eta[problems, runs],
                plan,
                seen,
                bar.update,
            )

        parts = list(_mapped(one, pieces, w0.device.type))
    return {
        "recorded": recorded,
        "tolerances": watched.cpu().numpy(),
        **_joined(parts, pieces, (n, e, s)),
    }


def product(tiles: Sequence[tuple[slice, Tensor]], w: Tensor, out: Tensor) -> None:
    """out = w H for rows w (n, r, d), tile by tile."""
    for where, block in tiles:
        torch.matmul(w[..., where], block, out=out[..., where])


def tiles_of(problem: Quadratic) -> list[tuple[slice, Tensor]]:
    """H's blocks, small neighbours joined; (n, b, b) each, (b, b) of a single problem."""
    joined: list[slice] = []
    for where in problem.slices:
        if joined and joined[-1].stop - joined[-1].start < _TILE:
            joined[-1] = slice(joined[-1].start, where.stop)
        else:
            joined.append(where)
    return [(where, problem.hessian[:, where, where].contiguous()) for where in joined]


def _piece(
    problem: Quadratic, w: Tensor, eta: Tensor, plan: Plan, seen: Callable[[int, Tensor], None] | None,
    advance: Callable[[float], Any],
) -> dict[str, Tensor]:  # fmt: skip
    """All steps of one piece, w (n, r, d)."""
    n, r, d = w.shape
    tiles = tiles_of(problem)
    if n == 1:  # without the axis of problems a product is one call of the matrix library
        tiles = [(where, block[0]) for where, block in tiles]
    g, scratch, half = (
        torch.empty_like(w),
        torch.empty_like(w),
        torch.full((d,), 0.5, dtype=w.dtype, device=w.device),
    )
    flat_w, flat_g = (w[0], g[0]) if n == 1 else (w, g)
    losses = torch.empty(_WINDOW + 1, n * r, dtype=w.dtype, device=w.device)

    def evaluate(row: int) -> None:  # g = H w, f = w'g / 2
        product(tiles, flat_w, flat_g)
        torch.mv(torch.mul(w, g, out=scratch).view(n * r, d), half, out=losses[row])

    evaluate(0)
    rule = METHODS[plan.method](problem, g, eta, **plan.settings)
    watch = _Watch(losses[0].clone().view(n, r), plan)
    tail = torch.zeros(plan.tail, n, r, d, dtype=w.dtype, device=w.device)
    for begin in range(0, plan.num_steps, _WINDOW):
        count = min(_WINDOW, plan.num_steps - begin)
        for row in range(1, count + 1):
            rule.update(w, g, begin + row)
            evaluate(row)
            if begin + row > plan.num_steps - plan.tail:
                tail[begin + row - plan.num_steps + plan.tail - 1] = w
        relative = watch.window(begin, losses[: count + 1].view(-1, n, r))
        if seen is not None:
            seen(begin, relative)
        ended = ~(relative[-1] >= VANISHED) | relative[-1].isinf()
        for tensor in (w, g, *rule.state):
            tensor.masked_fill_(ended[..., None], 0.0)
        losses[0] = losses[count]
        advance(n * r * count)
        if plan.stop_at is not None and bool(watch.settled(plan.stop_at).all()):
            advance(n * r * (plan.num_steps - begin - count))
            break
    tail.masked_fill_(watch.diverged_at.isfinite()[..., None], 0.0)
    watch.close()
    return {"first_losses": watch.first, "losses": watch.losses, "reached": watch.reached,
            "diverged_at": watch.diverged_at, "final": w, "tail": tail.permute(1, 2, 0, 3)}  # fmt: skip


class _Watch:
    """Looks through the losses of a piece, window by window."""

    def __init__(self, first: Tensor, plan: Plan) -> None:
        self.first, self.plan = first, plan  # (n, r)
        never = torch.full_like(first, math.inf)
        self.diverged_at = never.clone()
        self.reached = never[..., None].repeat(1, 1, len(plan.tolerances))
        self.losses = torch.full(
            (*first.shape, len(plan.recorded)), math.nan, dtype=first.dtype, device=first.device
        )
        self.losses[..., 0] = 1.0

    def window(self, begin: int, losses: Tensor) -> Tensor:
        """Losses of the steps ``begin``, ``begin`` + 1, ... relative to the first, (count + 1, n, r), inf once
        diverged."""
        relative = losses / self.first
        bad = ~(relative <= DIVERGED)
        found = bad.any(0) & self.diverged_at.isinf()
        self.diverged_at[found] = (begin + bad.to(torch.uint8).argmax(0))[found].to(relative.dtype)
        gone = self.diverged_at.isfinite()
        if bool(gone.any()):
            steps = torch.arange(begin, begin + len(relative), device=losses.device)[:, None, None]
            relative = relative.masked_fill(steps >= self.diverged_at, math.inf)
        lowest = relative.amin(0)
        for k, tolerance in enumerate(self.plan.tolerances):
            fresh = (lowest <= tolerance) & self.reached[..., k].isinf()
            if not bool(fresh.any()):
                continue
            at = begin + (relative[:, fresh] <= tolerance).to(torch.uint8).argmax(0)
            self.reached[..., k][fresh] = at.to(relative.dtype)
        kept = np.flatnonzero(
            (self.plan.recorded > begin) & (self.plan.recorded < begin + len(relative))
        )
        if len(kept):
            rows = torch.as_tensor(self.plan.recorded[kept] - begin, device=losses.device)
            self.losses[..., torch.as_tensor(kept, device=losses.device)] = relative[rows].permute(
                1, 2, 0
            )
        return relative

    def close(self) -> None:
        """Losses recorded after a run has diverged are inf also where the piece ended early."""
        steps = torch.as_tensor(self.plan.recorded, device=self.losses.device)
        self.losses.masked_fill_(steps >= self.diverged_at[..., None], math.inf)

    def settled(self, tolerance: float) -> Tensor:
        """(n, r) whether a run has come to ``tolerance``, one of those watched, or diverged."""
        k = int((self.plan.tolerances - tolerance).abs().argmin())
        return self.reached[..., k].isfinite() | self.diverged_at.isfinite()


def _pieces(problems: int, runs: int, size: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Problems and runs that go through together."""
    rows = max(1, _PIECE_BYTES // (8 * size)) if device == "cpu" else problems * runs
    many = max(1, rows // runs)
    for first in range(0, problems, many):
        for run in range(0, runs, rows):
            yield slice(first, min(first + many, problems)), slice(run, min(run + rows, runs))


def _mapped(function: Callable[[Any], Any], pieces: Sequence[Any], device: str) -> Iterator[Any]:
    """``function`` of each piece: on a CPU one thread a core, each computing alone, as a piece is too small to share.

    torch's number of threads is a thread's own, but the last one set is what new threads get: it is set back.
    """
    cores = torch.get_num_threads()
    if device != "cpu" or cores < 2:
        yield from map(function, pieces)
        return
    try:
        with ThreadPoolExecutor(
            min(cores, len(pieces)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield from pool.map(function, pieces)
    finally:
        torch.set_num_threads(cores)


def _joined(
    parts: Sequence[dict[str, Tensor]],
    pieces: Sequence[tuple[slice, slice]],
    shape: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    """The pieces' (n, r, ...) put together as (N, E, S, ...); the tail's own axis in front."""
    whole = {}
    for name, first in parts[0].items():
        made = torch.empty(shape[0], shape[1] * shape[2], *first.shape[2:], dtype=first.dtype)
        for part, (problems, runs) in zip(parts, pieces, strict=True):
            made[problems, runs] = part[name].cpu()
        whole[name] = made.view(*shape, *first.shape[2:]).numpy()
    whole["tail"] = np.moveaxis(whole["tail"], 3, 0)
    return whole
