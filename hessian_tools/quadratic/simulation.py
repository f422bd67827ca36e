"""Many runs of one method at once: starts, step sizes and problems are rows of one tensor.

A step is a product with H (one matrix product for all runs of a problem), the loss of every run,
and the method's update in place. Runs go through in pieces small enough that a piece's vectors stay
in the second-level cache for all its steps, on one thread a core; on a GPU all go together. Every
``_WINDOW`` steps :mod:`hessian_tools.quadratic.watch` looks through the losses of that window.

A run whose loss exceeds ``DIVERGED`` times its first, or is not a number, is flagged with the step
and taken out: its row is zero from then on and its losses are inf. Rows never meet, so this changes
nothing for the others. Losses below ``VANISHED`` of the first count as zero, before denormal
numbers slow everything down.

Shapes: N problems, E step sizes, S starts, R = E S runs of a problem, d coordinates; n problems and
r runs of each in a piece; T recorded steps, K tolerances, P last iterates.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.quadratic.methods import METHODS
from hessian_tools.quadratic.plan import Plan
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.watch import VANISHED, Watch
from hessian_tools.spectra.quadrature import Floats

_WINDOW = 64  # steps between two looks
_PIECE_BYTES = 3 << 16  # of one (R, d) tensor of a piece: four or five of them fit a megabyte
_TILE = 16  # blocks are joined until a product has this many columns

Piece = tuple[slice, slice]  # problems, and runs of each
T = TypeVar("T")


def simulate(
    problem: Quadratic,
    plan: Plan,
    starts: Tensor,
    steps: Tensor,
    *,
    progress: bool = True,
) -> dict[str, Floats]:
    """Runs the plan's method from ``starts`` (N, S, d) with eta ``steps`` (N, E, S), all valid.

    Returns:
        by name, as in :class:`hessian_tools.quadratic.runs.Runs`: first_losses (N, E, S), losses
        (N, E, S, T), reached (N, E, S, K), diverged_at (N, E, S), final (N, E, S, d) and tail
        (P, N, E, S, d).
    """
    n, e, s = steps.shape
    w0 = starts[:, None].expand(n, e, s, problem.size).reshape(n, e * s, problem.size)
    eta = steps.reshape(n, e * s, 1).to(w0)
    device = w0.device.type
    pieces = list(pieces_of(n, e * s, problem.size, device))
    total = n * e * s * plan.num_steps
    hidden = None if progress else True  # None hides the bar only where there is no terminal
    with tqdm(total=total, unit="step", unit_scale=True, disable=hidden) as bar:

        def one(piece: Piece) -> dict[str, Tensor]:
            part = problem.part(piece[0])
            return _run_piece(part, plan, piece, w0[piece].clone(), eta[piece], bar)

        parts = list(in_threads(one, pieces, device))
    return _joined(parts, pieces, (n, e, s))


def tiles_of(problem: Quadratic) -> list[tuple[slice, Tensor]]:
    """H's blocks, small neighbours joined, (n, b, b) each."""
    joined: list[slice] = []
    for where in problem.slices:
        if joined and joined[-1].stop - joined[-1].start < _TILE:
            joined[-1] = slice(joined[-1].start, where.stop)
        else:
            joined.append(where)
    return [(where, problem.hessian[:, where, where].contiguous()) for where in joined]


def product(problem: Quadratic, w: Tensor, out: Tensor) -> Callable[[], None]:
    """What writes out = w H, for the rows w (n, r, d) as they then are, tile by tile."""
    views = []
    for where, tile in tiles_of(problem):
        view = (w[..., where], tile, out[..., where])
        if len(w) == 1:  # without the axis of problems it is one call of the matrix library
            view = (view[0][0], view[1][0], view[2][0])
        views.append(view)

    def multiply() -> None:
        for rows, tile, target in views:
            torch.matmul(rows, tile, out=target)

    return multiply


def _run_piece(
    problem: Quadratic,
    plan: Plan,
    piece: Piece,
    w: Tensor,
    eta: Tensor,
    bar: "tqdm[None]",
) -> dict[str, Tensor]:
    """All steps of one piece, w (n, r, d)."""
    n, r, d = w.shape
    g = torch.empty_like(w)
    evaluate = _evaluation(problem, w, g)
    losses = w.new_empty(_WINDOW + 1, n * r)
    evaluate(losses[0])  # the rule starts from the gradients at w_0
    rule = METHODS[plan.method](problem, g, eta, **plan.settings)
    watch = Watch(losses[0].clone().view(n, r), plan)
    tail = w.new_zeros(plan.tail, n, r, d)
    first_kept = plan.num_steps - plan.tail + 1
    for begin in range(0, plan.num_steps, _WINDOW):
        count = min(_WINDOW, plan.num_steps - begin)
        for row in range(1, count + 1):
            step = begin + row
            rule.update(w, g, step)
            evaluate(losses[row])
            if step >= first_kept:
                tail[step - first_kept] = w
        relative = watch.window(begin, losses[: count + 1].view(-1, n, r))
        if plan.observe is not None:
            plan.observe(*piece, begin, relative)
        _zero_ended(relative[-1], (w, g, *rule.state))
        losses[0] = losses[count]  # windows overlap: a factor f+ / f needs both
        bar.update(n * r * count)
        if plan.stop_at is not None and bool(watch.settled(plan.stop_at).all()):
            bar.update(n * r * (plan.num_steps - begin - count))
            break
    watch.close()
    # a run that diverged within its last window was not zero yet when the tail was taken
    tail.masked_fill_(watch.diverged_at.isfinite()[..., None], 0.0)
    return {
        "first_losses": watch.first,
        "losses": watch.losses,
        "reached": watch.reached,
        "diverged_at": watch.diverged_at,
        "final": w,
        "tail": tail.permute(1, 2, 0, 3),
    }


def _evaluation(problem: Quadratic, w: Tensor, g: Tensor) -> Callable[[Tensor], None]:
    """What writes g = H w, and the losses f = w'g / 2 into its argument (n r,)."""
    multiply = product(problem, w, g)
    scratch = torch.empty_like(w)
    # w'g / 2 of all rows is one product of a matrix with this vector
    half = w.new_full((w.shape[-1],), 0.5)

    def evaluate(losses: Tensor) -> None:
        multiply()
        products = torch.mul(w, g, out=scratch).view(-1, len(half))
        torch.mv(products, half, out=losses)

    return evaluate


def _zero_ended(relative: Tensor, tensors: Sequence[Tensor]) -> None:
    """Zero rows where runs have diverged or vanished, by their last losses (n, r)."""
    # ~(>=) is true of nan
    ended = ~(relative >= VANISHED) | relative.isinf()
    for tensor in tensors:
        tensor.masked_fill_(ended[..., None], 0.0)


def pieces_of(problems: int, runs: int, size: int, device: str) -> Iterator[Piece]:
    """Problems and runs that go through together."""
    # the caches of a CPU want small pieces, a GPU wants few large products
    rows = max(1, _PIECE_BYTES // (8 * size)) if device == "cpu" else problems * runs
    many = max(1, rows // runs)
    for first in range(0, problems, many):
        for run in range(0, runs, rows):
            yield slice(first, min(first + many, problems)), slice(run, min(run + rows, runs))


def in_threads(function: Callable[[Piece], T], pieces: Sequence[Piece], device: str) -> Iterator[T]:
    """``function`` of each piece: on a CPU one thread a core, each computing alone.

    A piece is too small to be shared. torch's number of threads is a thread's own, but the last one
    set is what new threads get, so it is set back.
    """
    cores = torch.get_num_threads()
    if device != "cpu" or cores < 2:
        yield from map(function, pieces)
        return
    workers = min(cores, len(pieces))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, pieces)
    finally:
        torch.set_num_threads(cores)


def _joined(
    parts: Sequence[dict[str, Tensor]],
    pieces: Sequence[Piece],
    shape: tuple[int, int, int],
) -> dict[str, Floats]:
    """The pieces' (n, r, ...) put together as (N, E, S, ...); the tail's own axis in front."""
    n, e, s = shape
    whole: dict[str, Floats] = {}
    for name, first in parts[0].items():
        rest = first.shape[2:]
        made = torch.empty(n, e * s, *rest, dtype=first.dtype)
        for part, piece in zip(parts, pieces, strict=True):
            made[piece] = part[name].cpu()
        whole[name] = made.view(n, e, s, *rest).numpy()
    whole["tail"] = np.moveaxis(whole["tail"], 3, 0)
    return whole
