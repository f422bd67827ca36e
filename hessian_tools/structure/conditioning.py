"""The condition of a Hessian's diagonal blocks, with and without Adam's preconditioner, and their
extreme eigenvalues.

kappa, r and tau are defined in :mod:`hessian_tools.structure.adam_preconditioning`.

Letters: B blocks, n entries of a block, r unit vectors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from tqdm import tqdm

from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.hessian import in_float64, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import unit_products
from hessian_tools.errors import NumericalError
from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.shown import Record, Tabular
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.spectra.slq import blockwise_slq
from hessian_tools.structure.adam_preconditioning import (
    AdamConditioning,
    Floats,
    Integers,
    adam_conditioning,
)
from hessian_tools.structure.dense import Blocks, cuts_of

MOST_ENTRIES = 1024  # default limit on n of a block
_BYTES = 1 << 28  # dense blocks held at a time
_COPIES = 3  # of a dense block at a time: itself, symmetrised, scaled
_UNITS = 64  # unit vectors in one product, over all blocks


@registered
@dataclass(frozen=True, eq=False)
class BlockConditioning(Tabular):
    """:class:`AdamConditioning` of blocks of a Hessian, from their dense float64 matrices."""

    names: tuple[str, ...]  # (B,)
    sizes: Integers  # (B,) n of each
    values: AdamConditioning  # every field (B,)
    symmetry_error: Floats  # (B,) |A - A'|_F / |A|_F before symmetrising
    notes: tuple[str, ...]  # what was left out, one line a cut
    num_matvecs: int  # products spent
    arithmetic: str  # in what the products were computed
    curvature: str = "Hessian"  # which matrix, in words

    def records(self) -> list[Record]:
        """A row a block; ``kappa`` to ``tau`` as in AdamConditioning."""
        return [
            {
                "block": name,
                "size": int(self.sizes[place]),
                "kappa": float(self.values.kappa[place]),
                "kappa_adam": float(self.values.kappa_adam[place]),
                "r": float(self.values.r[place]),
                "tau": float(self.values.tau[place]),
                "symmetry_error": float(self.symmetry_error[place]),
            }
            for place, name in enumerate(self.names)
        ]


@registered
@dataclass(frozen=True, eq=False)
class BlockExtremes(Tabular):
    """The largest and the smallest eigenvalue of every diagonal block, by Lanczos.

    ``largest`` is the highest Ritz value, never above the block's largest eigenvalue but by
    rounding; some eigenvalue lies within its bound of it (Parlett 1998, theorem 4.5.1).
    ``smallest`` likewise. Exact blocks have bounds of 0.
    """

    names: tuple[str, ...]  # (B,)
    sizes: Integers  # (B,)
    largest: Floats  # (B,)
    smallest: Floats  # (B,)
    largest_bound: Floats  # (B,)
    smallest_bound: Floats  # (B,)
    # (B,) "complete" | "breakdown" (they are eigenvalues, of an invariant subspace) | "exact"
    status: tuple[str, ...]
    num_matvecs: int  # products spent
    notes: tuple[str, ...]
    curvature: str = "Hessian"  # which matrix, in words

    def records(self) -> list[Record]:
        """A row a block."""
        return [
            {
                "block": name,
                "size": int(self.sizes[place]),
                "smallest": float(self.smallest[place]),
                "smallest_bound": float(self.smallest_bound[place]),
                "largest": float(self.largest[place]),
                "largest_bound": float(self.largest_bound[place]),
                "status": self.status[place],
            }
            for place, name in enumerate(self.names)
        ]

    @property
    def top(self) -> Floats:
        """(B,) the largest |eigenvalue| that was reached."""
        return np.maximum(np.abs(self.largest), np.abs(self.smallest))


def block_conditioning(
    curvature: Problem | CurvatureOperator,
    partition: Blocks,
    *,
    max_size: int = MOST_ENTRIES,
    num_blocks: int | None = None,
    seed: int = 0,
    eps: float = 0.0,
    relative_floor: float | None = None,
    memory: str | int = "auto",
    progress: bool = True,
) -> BlockConditioning:
    """:func:`adam_conditioning` of the diagonal blocks of a partition.

    The gradient is that of the mean loss. The blocks of a cut go through the engine together, in a
    float64 copy of the problem where one can be made.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator.
        partition: a Partition, or anything that :func:`hessian_tools.structure.dense.dense_block`
            takes as blocks.
        max_size: larger blocks are left out, and ``notes`` say so.
        num_blocks: the most blocks of each cut, drawn evenly by ``seed``; None: all.
        eps, relative_floor: see :func:`adam_conditioning`.
        memory: see :func:`hessian_tools.structure.dense.dense_block`.
        progress: a bar on stderr when that is a terminal.
    Raises:
        ValueError: for an argument out of range, or when no block is small enough.
        NumericalError: for a product with NaN or inf, naming the block.
    """
    if max_size < 1 or (num_blocks is not None and num_blocks < 1):
        raise ValueError(
            f"max_size is {max_size} and num_blocks {num_blocks}; at least 1 is needed"
        )
    cuts = cuts_of(partition, problem_of(curvature))
    chosen = _chosen_runs(cuts, max_size, num_blocks, seed)
    operator, arithmetic = in_float64(curvature, memory)
    gradient = mean_gradient(operator.problem)
    total = sum(run.numel for run in chosen)
    values: list[AdamConditioning] = []
    errors: list[Floats] = []
    with product_bar(total, shown=progress) as bar:
        for run in chosen:
            bar.set_postfix_str(run.names[0])
            matrices, asymmetry = _dense_blocks(operator, run, bar)
            vectors = run.rows(gradient).double().cpu().numpy()
            values.append(
                adam_conditioning(matrices, vectors, eps=eps, relative_floor=relative_floor)
            )
            errors.append(asymmetry)
    return BlockConditioning(
        names=tuple(name for run in chosen for name in run.names),
        sizes=np.array([run.block_size for run in chosen for _ in range(run.num_blocks)]),
        values=_concatenated(values),
        symmetry_error=np.concatenate(errors),
        notes=tuple(_notes(cuts, max_size, num_blocks)),
        num_matvecs=total,
        arithmetic=arithmetic,
        curvature=operator.title,
    )


def block_extremes(
    curvature: Problem | CurvatureOperator,
    partition: Partition,
    *,
    num_steps: int = 12,
    num_probes: int = 1,
    seed: int = 0,
    finished: Mapping[str, Quadrature] | None = None,
    on_block: Callable[[str, Quadrature], None] | None = None,
    progress: bool = True,
) -> BlockExtremes:
    """The largest and smallest eigenvalue of every block of ``partition``, by batched Lanczos.

    Blocks with no more entries than the products that ``num_steps`` steps take are solved exactly.
    The arguments are those of :func:`hessian_tools.spectra.slq.blockwise_slq`, whose ``finished``
    and ``on_block`` let a killed run be continued.
    """
    spectra = blockwise_slq(
        curvature,
        partition,
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        finished=finished,
        on_block=on_block,
        progress=progress,
    )
    blocks = list(spectra.values())
    return BlockExtremes(
        names=spectra.names,
        sizes=np.array([block.size for block in blocks]),
        largest=np.array([block.largest.value for block in blocks]),
        smallest=np.array([block.smallest.value for block in blocks]),
        largest_bound=np.array([block.largest.residual_bound for block in blocks]),
        smallest_bound=np.array([block.smallest.residual_bound for block in blocks]),
        status=tuple(block.status for block in blocks),
        num_matvecs=spectra.num_matvecs,
        notes=spectra.notes,
        curvature=spectra.curvature,
    )


def _chosen_runs(
    cuts: Sequence[Cut],
    max_size: int,
    num_blocks: int | None,
    seed: int,
) -> list[Cut]:
    """Runs of the blocks that are asked for; ValueError where none is small enough."""
    small = [cut for cut in cuts if cut.block_size <= max_size]
    if not small:
        smallest = min(cut.block_size for cut in cuts)
        raise ValueError(f"max_size is {max_size}, but the smallest block has {smallest} entries")
    generator = np.random.default_rng(seed)
    return [run for cut in small for run in _runs(cut, num_blocks, generator)]


def _runs(
    cut: Cut,
    num_blocks: int | None,
    generator: np.random.Generator,
) -> Iterator[Cut]:
    """Runs of blocks of ``cut``, all or some drawn, each small enough for memory."""
    together = max(1, _BYTES // (_COPIES * 8 * cut.block_size**2))
    positions = np.arange(cut.num_blocks)
    if num_blocks is not None and num_blocks < cut.num_blocks:
        positions = np.sort(generator.choice(cut.num_blocks, num_blocks, replace=False))
    gaps = np.flatnonzero(np.diff(positions) > 1) + 1
    for run in np.split(positions, gaps):
        for first in range(0, len(run), together):
            piece = run[first : first + together]
            yield cut.chunk(int(piece[0]), int(piece[-1]) + 1)


def _notes(
    cuts: Sequence[Cut],
    max_size: int,
    num_blocks: int | None,
) -> Iterator[str]:
    """What is left out of ``cuts``, a line each."""
    for cut in cuts:
        count = cut.num_blocks
        if cut.block_size > max_size:
            yield f"{cut.name}: {count} block(s) of {cut.block_size} entries exceed {max_size=}"
        elif num_blocks is not None and count > num_blocks:
            yield f"{cut.name}: {num_blocks} of {count} blocks, drawn evenly"


def _dense_blocks(
    operator: CurvatureOperator,
    cut: Cut,
    bar: tqdm,
) -> tuple[Floats, Floats]:
    """(B, n, n) symmetrised diagonal blocks of a cut, and (B,) how far from symmetric they were."""
    size = cut.block_size
    count = cut.num_blocks
    dense = np.empty((count, size, size))
    strips = unit_products(operator.stacked(cut), num_blocks=count, rows=_UNITS)
    for numbers, products in strips:
        dense[:, numbers.cpu().numpy()] = products.double().cpu().numpy()
        bar.update(count * len(numbers))
    finite = np.isfinite(dense).all((1, 2))
    if not finite.all():
        name = cut.names[int(finite.argmin())]
        raise NumericalError(
            f"a product with the Hessian of block {name} is NaN or inf; check the loss"
        )
    mirrored = dense.transpose(0, 2, 1)
    largest = np.abs(dense).max((1, 2), keepdims=True)
    units = np.where(largest > 0, largest, 1.0)  # squares may leave float64's range
    norms = np.linalg.norm(dense / units, axis=(1, 2))
    differences = np.linalg.norm((dense - mirrored) / units, axis=(1, 2))
    asymmetry = differences / np.where(norms > 0, norms, 1.0)
    return (dense + mirrored) / 2, asymmetry


def _concatenated(parts: Sequence[AdamConditioning]) -> AdamConditioning:
    names = [field.name for field in fields(AdamConditioning)]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return AdamConditioning(**arrays)
