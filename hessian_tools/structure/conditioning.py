"""Does a diagonal preconditioner help inside a block? kappa with and without Adam's, tau, and extreme eigenvalues.

Adam with its preconditioner frozen at the first gradient g turns a block H into D H, D = diag(1 / |g|), whose
eigenvalues are those of D^(1/2) H D^(1/2). Where r = kappa(D H) / kappa(H) is below 1 it helps. It does where H is
nearly diagonal, tau = sum |H_ii| / sum |H_ij| near 1, and harms where H is dense (Zhang et al., arXiv 2406.16793).

**kappa of a matrix that is indefinite or singular**, as Hessian blocks of networks are: the largest |eigenvalue| over
the smallest one above a floor, ``relative_floor`` times the largest (default n eps of float64, what rounding leaves).
How many lie at or below the floor is told as ``dropped``, how many below minus the floor as ``negative``; with either,
kappa is no rate of convergence. A matrix that vanishes has kappa nan.

Letters: B blocks, n entries of a block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from hessian_tools.blocks.block import Cut
from hessian_tools.curvature.hessian import in_float64, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.spectra.slq import blockwise_slq
from hessian_tools.structure.dense import cuts_of

MOST_ENTRIES = 1024  # default limit on n of a block
_BYTES = 1 << 28  # dense blocks held at a time
_ROWS = 64  # unit vectors in one product, over all blocks


@registered
@dataclass(frozen=True, eq=False)
class AdamConditioning:
    """kappa, tau and r of matrices with leading shape (...), which all fields have; see :mod:`.conditioning`."""

    kappa: np.ndarray  # of H
    kappa_adam: np.ndarray  # of D H, over the coordinates whose gradient is not zero
    r: np.ndarray  # kappa_adam over kappa, the latter over these coordinates as well
    tau: np.ndarray  # sum |H_ii| / sum |H_ij|, 1 for a diagonal matrix, nan for zero
    negative: np.ndarray  # int, eigenvalues of H below minus the floor
    negative_adam: np.ndarray  # int, of D H
    dropped: (
        np.ndarray
    )  # int, eigenvalues of H at or below the floor in absolute value: kappa leaves them out
    dropped_adam: np.ndarray  # int, of D H
    without_gradient: (
        np.ndarray
    )  # int, coordinates whose gradient is zero, so that D is not defined there


@registered
@dataclass(frozen=True, eq=False)
class BlockConditioning:
    """:class:`AdamConditioning` of blocks of a Hessian, from their dense float64 matrices."""

    names: tuple[str, ...]  # (B,)
    sizes: np.ndarray  # (B,) int, n of each
    values: AdamConditioning  # every field (B,)
    symmetry_error: np.ndarray  # (B,) |A - A'|_F / |A|_F before symmetrising
    notes: tuple[str, ...]  # what was left out, one line a cut
    num_matvecs: int  # products spent
    arithmetic: str  # in what the products were computed


@registered
@dataclass(frozen=True, eq=False)
class BlockExtremes:
    """The largest and the smallest eigenvalue of every diagonal block, by Lanczos.

    ``largest`` is the highest Ritz value, never above the block's largest eigenvalue but by rounding; some eigenvalue
    lies within its bound of it (Parlett 1998, theorem 4.5.1). ``smallest`` likewise. Exact blocks have bounds of 0.
    """

    names: tuple[str, ...]  # (B,)
    sizes: np.ndarray  # (B,) int
    largest: np.ndarray  # (B,)
    smallest: np.ndarray  # (B,)
    largest_bound: np.ndarray  # (B,)
    smallest_bound: np.ndarray  # (B,)
    status: tuple[
        str, ...
    ]  # (B,) "complete" | "breakdown" (eigenvalues, invariant subspace) | "exact"
    num_matvecs: int  # products spent
    notes: tuple[str, ...]

    @property
    def top(self) -> np.ndarray:
        """(B,) the largest |eigenvalue| found."""
        return np.maximum(np.abs(self.largest), np.abs(self.smallest))


def adam_conditioning(
    matrix: np.ndarray,
    gradient: np.ndarray,
    *,
    eps: float = 0.0,
    relative_floor: float | None = None,
) -> AdamConditioning:
    """What Adam's preconditioner diag(1 / (|g| + eps)) does to the condition of H.

    Args:
        matrix: (..., n, n) symmetric H. gradient: (..., n) g.
        eps: Adam's own, 0 for the preconditioner of the theory.
        relative_floor: |eigenvalues| at or below so much of the largest count as zero; default n eps of float64.
    Raises:
        ValueError: shapes that do not fit, a negative ``eps`` or floor, numbers that are not finite.
    """
    matrix, gradient = np.asarray(matrix, np.float64), np.asarray(gradient, np.float64)
    if (
        matrix.ndim < 2
        or matrix.shape[-1] != matrix.shape[-2]
        or matrix.shape[:-1] != gradient.shape
    ):
        raise ValueError(
            f"matrix has shape {matrix.shape} and gradient {gradient.shape}; (..., n, n) and (..., n) are needed"
        )
    floor = (
        matrix.shape[-1] * np.finfo(np.float64).eps if relative_floor is None else relative_floor
    )
    if not (eps >= 0 and 0 <= floor < 1):
        raise ValueError(
            f"eps is {eps} and relative_floor {floor}; at least 0, and the floor below 1, are needed"
        )
    if not (np.isfinite(matrix).all() and np.isfinite(gradient).all()):
        raise ValueError("matrix or gradient holds NaN or inf; check how they were computed")
    scale = np.abs(gradient) + eps
    defined = scale > 0
    roots = np.where(defined, 1 / np.sqrt(np.where(defined, scale, 1.0)), 0.0)
    missing = (~defined).sum(-1)
    kappa, negative, dropped = _condition(matrix, floor)
    kappa_adam, negative_adam, dropped_adam = _condition(_scaled(matrix, roots), floor)
    compared = (
        _condition(_scaled(matrix, defined.astype(float)), floor)[0] if missing.any() else kappa
    )
    entries = np.abs(matrix)
    tau = _quotient(np.trace(entries, axis1=-2, axis2=-1), entries.sum((-2, -1)))
    return AdamConditioning(
        kappa,
        kappa_adam,
        kappa_adam / compared,
        tau,
        negative,
        negative_adam,
        dropped,
        dropped_adam - missing,
        missing,
    )


def block_conditioning(
    curvature: Problem | CurvatureOperator, partition: Any, *, max_size: int = MOST_ENTRIES,
    num_blocks: int | None = None, seed: int = 0, eps: float = 0.0, relative_floor: float | None = None,
    memory: str | int = "auto", progress: bool = True,
) -> BlockConditioning:  # fmt: skip
    """:func:`adam_conditioning` of the diagonal blocks of a partition, with the gradient of the mean loss.

    The blocks of a cut go through the engine together, in a float64 copy of the problem where one can be made.

    Args:
        partition: a Partition, or anything that :func:`hessian_tools.structure.dense.dense_block` takes as blocks.
        max_size: larger blocks are left out, and ``notes`` say so.
        num_blocks: the most blocks of each cut, drawn evenly by ``seed``; None: all.
        eps, relative_floor: see :func:`adam_conditioning`. memory: see :func:`hessian_tools.structure.dense.dense_block`.
        progress: a bar on stderr when that is a terminal.
    Raises:
        ValueError: for an argument out of range, or when no block is small enough.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    if max_size < 1 or (num_blocks is not None and num_blocks < 1):
        raise ValueError(
            f"max_size is {max_size} and num_blocks {num_blocks}; at least 1 is needed"
        )
    cuts, notes = cuts_of(partition, problem_of(curvature)), []
    for cut in cuts:
        if cut.block_size > max_size:
            notes.append(
                f"{cut.name}: {cut.num_blocks} block(s) of {cut.block_size} entries exceed {max_size=}"
            )
        elif num_blocks is not None and cut.num_blocks > num_blocks:
            notes.append(f"{cut.name}: {num_blocks} of {cut.num_blocks} blocks, drawn evenly")
    small = [cut for cut in cuts if cut.block_size <= max_size]
    if not small:
        raise ValueError(
            f"max_size is {max_size}, but the smallest block has {min(c.block_size for c in cuts)} entries"
        )
    generator = np.random.default_rng(seed)
    chosen = [chunk for cut in small for chunk in _chosen(cut, num_blocks, generator)]
    hessian, arithmetic = in_float64(curvature, memory)
    gradient, found, errors = mean_gradient(hessian.problem), [], []
    total = sum(chunk.num_blocks * chunk.block_size for chunk in chosen)
    with tqdm(
        total=total, unit="HVP", disable=None if progress else True, dynamic_ncols=True
    ) as bar:
        for chunk in chosen:
            bar.set_postfix_str(chunk.names[0])
            matrices, asymmetry = _dense_blocks(hessian, chunk, bar)
            vectors = chunk.rows(gradient).double().cpu().numpy()
            found.append(
                adam_conditioning(matrices, vectors, eps=eps, relative_floor=relative_floor)
            )
            errors.append(asymmetry)
    values = AdamConditioning(
        *(np.concatenate([vars(f)[field] for f in found]) for field in vars(found[0]))
    )
    sizes = np.array([chunk.block_size for chunk in chosen for _ in range(chunk.num_blocks)])
    names = tuple(name for chunk in chosen for name in chunk.names)
    return BlockConditioning(
        names, sizes, values, np.concatenate(errors), tuple(notes), total, arithmetic
    )


def block_extremes(
    curvature: Problem | CurvatureOperator, partition: Any, *, num_steps: int = 12, num_probes: int = 1,
    seed: int = 0, finished: Mapping[str, Quadrature] | None = None,
    on_block: Callable[[str, Quadrature], None] | None = None, progress: bool = True,
) -> BlockExtremes:  # fmt: skip
    """The largest and smallest eigenvalue of every block of ``partition`` by ``num_steps`` batched Lanczos steps.

    Blocks with no more entries than the products that this takes are solved exactly. The arguments are those of
    :func:`hessian_tools.spectra.slq.blockwise_slq`, whose ``finished`` and ``on_block`` let a killed run go on.
    """
    spectra = blockwise_slq(
        curvature, partition, num_probes=num_probes, num_steps=num_steps, seed=seed, finished=finished,
        on_block=on_block, progress=progress,
    )  # fmt: skip
    blocks = list(spectra.values())
    columns = {
        side: np.array(
            [[value.value, value.residual_bound] for value in (getattr(b, side) for b in blocks)]
        ).T
        for side in ("largest", "smallest")
    }
    (largest, largest_bound), (smallest, smallest_bound) = columns["largest"], columns["smallest"]
    return BlockExtremes(
        spectra.names, np.array([b.size for b in blocks]), largest, smallest, largest_bound, smallest_bound,
        tuple(b.status for b in blocks), spectra.num_matvecs, spectra.notes,
    )  # fmt: skip


def _chosen(cut: Cut, num_blocks: int | None, generator: np.random.Generator) -> Iterator[Cut]:
    """Runs of blocks of ``cut``, all or some drawn, each small enough for memory."""
    together = max(1, _BYTES // (3 * 8 * cut.block_size**2))
    positions = np.arange(cut.num_blocks)
    if num_blocks is not None and num_blocks < cut.num_blocks:
        positions = np.sort(generator.choice(cut.num_blocks, num_blocks, replace=False))
    for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1):
        for first in range(0, len(run), together):
            piece = run[first : first + together]
            yield cut.chunk(int(piece[0]), int(piece[-1]) + 1)


def _dense_blocks(hessian: CurvatureOperator, cut: Cut, bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """(B, n, n) symmetrised diagonal blocks of a cut, and (B,) how far from symmetric they were."""
    operator, size, count = hessian.stacked(cut), cut.block_size, cut.num_blocks
    dense = np.empty((count, size, size))
    for columns in torch.arange(size, device=hessian.device).split(max(1, _ROWS // count)):
        units = one_hot(columns, size).to(hessian.dtype).repeat(count, 1)
        products = operator.matmat(units).reshape(count, -1, size).double().cpu().numpy()
        dense[:, columns.cpu().numpy()] = products
        bar.update(len(units))
    finite = np.isfinite(dense).all((1, 2))
    if not finite.all():
        name = cut.names[int(finite.argmin())]
        raise NumericalError(
            f"a product with the Hessian of block {name} is NaN or inf; check the loss"
        )
    mirrored = dense.transpose(0, 2, 1)
    norms = np.linalg.norm(dense, axis=(1, 2))
    asymmetry = np.linalg.norm(dense - mirrored, axis=(1, 2)) / np.where(norms > 0, norms, 1.0)
    return (dense + mirrored) / 2, asymmetry


def _condition(matrix: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kappa, eigenvalues below -floor, eigenvalues within the floor), each (...)."""
    values = np.linalg.eigvalsh(matrix)
    sizes = np.abs(values)
    largest = sizes.max(-1)
    bound = floor * largest
    kept = sizes > bound[..., None]
    smallest = np.where(kept, sizes, np.inf).min(-1)
    negative = (values < -bound[..., None]).sum(-1)
    return _quotient(largest, np.where(largest > 0, smallest, 0.0)), negative, (~kept).sum(-1)


def _scaled(matrix: np.ndarray, roots: np.ndarray) -> np.ndarray:
    return roots[..., :, None] * matrix * roots[..., None, :]


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, nan where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)
