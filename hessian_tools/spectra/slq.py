"""Stochastic Lanczos quadrature: spectra of operators and of all blocks of a Hessian.

For a unit vector u, m Lanczos steps give the Gauss quadrature of u's spectral measure
(:mod:`hessian_tools.spectra.gauss`). The mean over random probes estimates (1/n) tr f(A) (Bai,
Fahey & Golub 1996; Ubaru, Chen & Saad 2017).

Normalisation: the weights of every probe sum to 1, for the probe is divided by its length. Both
kinds of probe are then unbiased: a Rademacher vector has |v|^2 = n, and a Gaussian one divided by
its length is uniform on the sphere, with E[u' M u] = tr(M) / n exactly (a ratio of v'Mv and v'v,
but not a biased one, as direction and length are independent).

Shapes: k probes, m nodes (Lanczos steps), n size of the operator, B blocks.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.blocks.block import Block, Cut
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.spectra.batching import batches, local_note
from hessian_tools.spectra.exact import exact_quadratures
from hessian_tools.spectra.gauss import gauss_quadratures
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.settings import Settings

ASYMMETRY_NOTED = 1e-3  # of a dense block's norm; more is rounding noise, or not a Hessian


def slq(
    operator: SymmetricOperator,
    *,
    num_probes: int,
    num_steps: int,
    seed: int = 0,
    probes: str = "rademacher",
    reorthogonalize: str = "full",
    name: str = "",
    exact: bool | str | int = "auto",
) -> Quadrature:
    """Stochastic Lanczos quadrature of one symmetric operator of size n.

    Args:
        operator: any symmetric operator.
        num_probes: k random vectors.
        num_steps: m Lanczos steps for each; at most n are made.
        seed: with ``name`` the only source of randomness
            (see :mod:`hessian_tools.spectra.probes`).
        probes: "rademacher" | "gaussian".
        reorthogonalize: "full" | "local" | "none" (see :mod:`hessian_tools.spectra.lanczos`).
        name: of the block, when there are several: each has probes of its own.
        exact: "auto" forms the dense matrix and takes its eigenvalues, in float64, where n <= k m,
            since that costs no more products and leaves no error; a number does so up to that n as
            well; True always, False never. The matrix is symmetrised first. How far from symmetric
            it was is reported in ``asymmetry`` and not judged: a block that vanishes up to rounding
            (a key bias under softmax) has no symmetric digits at all.
    Raises:
        TypeError: for anything but an operator.
        ValueError: for an argument out of range.
        NumericalError: for a product with NaN or inf, naming the Lanczos step (or unit vector)
            where it appeared first.
    """
    if not isinstance(operator, SymmetricOperator):
        raise TypeError(
            f"operator is a {type(operator).__name__}; pass a symmetric operator, such as "
            "ht.HessianOperator(problem)"
        )
    settings = Settings(num_probes, num_steps, seed, probes, reorthogonalize, exact)
    operator.expect(settings.matvecs(operator.size))
    ((_, quadrature),) = _solved_together(operator, (name,), operator.size, settings)
    return quadrature


def blockwise_slq(
    curvature: Problem | CurvatureOperator,
    partition: Partition | Iterable[Block],
    *,
    num_probes: int = 4,
    num_steps: int = 40,
    seed: int = 0,
    probes: str = "rademacher",
    reorthogonalize: str = "full",
    exact: bool | str | int = "auto",
    finished: Mapping[str, Quadrature] | None = None,
    on_block: Callable[[str, Quadrature], None] | None = None,
    progress: bool = True,
) -> BlockSpectra:
    """:func:`slq` of every diagonal block; blocks of one shape go through the engine together.

    A seed gives a block the same probes whatever the other blocks in the run. Where the Lanczos
    basis does not fit ``krylov_bytes`` of the operator, fewer blocks, then fewer probes go
    together; where not even one basis fits, that block runs with "local" re-orthogonalisation, says
    so in its ``reorthogonalize`` and in ``notes``, and warns.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator.
        partition: a Partition or a list of its Blocks.
        finished: results of an earlier run with the same arguments, by name: these blocks are not
            computed again.
        on_block: called with name and Quadrature as each block is done, also before an error is
            raised for another.
        progress: a bar on stderr, products done and left, when that is a terminal.
        The others: see :func:`slq`.
    Raises:
        ValueError: for an argument out of range, no block, or a name that occurs twice.
        TypeError: for a ``curvature`` that is neither, or a ``partition`` that holds no Blocks.
        NumericalError: for a product with NaN or inf, naming the block and the Lanczos step where
            it appeared first.
    """
    settings = Settings(num_probes, num_steps, seed, probes, reorthogonalize, exact)
    operator = as_operator(curvature)
    names, cuts = names_and_cuts(partition)
    finished = finished or {}
    done = {name: finished[name] for name in names if name in finished}
    total = sum(_matvecs_left(cut, done, settings) for cut in cuts)
    operator.expect(total, len(names))
    with product_bar(total, shown=progress) as bar:
        for name, quadrature in solved(operator, cuts, done, settings, bar):
            done[name] = quadrature
            if on_block is not None:
                on_block(name, quadrature)
    return BlockSpectra(
        quadratures={name: done[name] for name in names},
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        probes=probes,
        reorthogonalize=reorthogonalize,
        route=operator.route,
        notes=tuple(note for name in names for note in notes_on(name, done[name], settings)),
        curvature=operator.title,
    )


def _matvecs_left(cut: Cut, done: Collection[str], settings: Settings) -> int:
    missing = sum(name not in done for name in cut.names)
    return missing * settings.matvecs(cut.block_size)


def names_and_cuts(partition: Partition | Iterable[Block]) -> tuple[list[str], Sequence[Cut]]:
    """Names of all blocks, and the cuts they lie in; a Block of a list is a cut of its own.

    Raises:
        TypeError: for anything but Blocks.
        ValueError: for no block, or two of one name.
    """
    blocks = list(partition) if isinstance(partition, Iterable) else [partition]
    if not all(isinstance(block, Block) for block in blocks):
        raise TypeError(
            f"partition is {partition!r:.80}; pass ht.partition(model, ...) or a list of its Blocks"
        )
    if not blocks:
        raise ValueError("partition holds no block; choose at least one")
    names = [block.name for block in blocks]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"partition names {name!r} twice; pass each block once")
    if isinstance(partition, Partition):
        return names, partition.cuts
    return names, [block.as_cut() for block in blocks]


def notes_on(name: str, quadrature: Quadrature, settings: Settings) -> Iterator[str]:
    """What a reader should know about a block's spectrum."""
    deviates = quadrature.reorthogonalize != settings.reorthogonalize
    if quadrature.status != "exact" and deviates:
        yield f"{name}: {local_note(quadrature.size, settings.num_steps)}"
    if quadrature.asymmetry > ASYMMETRY_NOTED:
        share = f"{quadrature.asymmetry:.2g} of its norm"
        yield f"{name}: dense block asymmetric by {share}: rounding noise, or no Hessian"


def solved(
    curvature: CurvatureOperator,
    cuts: Iterable[Cut],
    done: Collection[str],
    settings: Settings,
    bar: tqdm,
) -> Iterator[tuple[str, Quadrature]]:
    """The blocks of ``cuts`` that are not in ``done``, as they come; each cut's go together.

    Raises:
        NumericalError: for products with NaN or inf, once the other blocks of the batch are given.
    """
    for cut in cuts:
        for batch, fitted in batches(cut, done, settings, curvature):
            bar.set_postfix_str(batch.block_name(0))
            operator = Watched(curvature.stacked(batch), bar)
            yield from _solved_together(operator, batch.names, batch.block_size, fitted)


class Watched(SymmetricOperator):
    """An operator that reports its products to a progress bar."""

    def __init__(self, operator: SymmetricOperator, bar: tqdm) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.bar = bar

    def _matmat(self, vectors: Tensor) -> Tensor:
        product = self.operator.matmat(vectors)
        self.bar.update(len(vectors))
        return product

    def steady(self) -> AbstractContextManager[None]:
        return self.operator.steady()


def _solved_together(
    operator: SymmetricOperator,
    names: Sequence[str],
    size: int,
    settings: Settings,
) -> Iterator[tuple[str, Quadrature]]:
    """The blocks that ``operator`` holds side by side; then the first error, if there is one."""
    if settings.is_exact(size):
        outcomes = exact_quadratures(operator, names, size)
    else:
        outcomes = _stochastic(operator, names, size, settings)
    errors = []
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, NumericalError):
            errors.append(outcome)
        else:
            yield name, outcome
    if errors:
        raise errors[0]


def _stochastic(
    operator: SymmetricOperator,
    names: Sequence[str],
    size: int,
    settings: Settings,
) -> Iterator[Quadrature | NumericalError]:
    """SLQ of each block, as many rows at a time as the settings allow."""
    draw = partial(
        draw_probes,
        settings.probes,
        settings.seed,
        num_probes=settings.num_probes,
        size=size,
        dtype=operator.dtype,
        device=operator.device,
    )
    start = torch.cat([draw(name) for name in names])
    mode = settings.reorthogonalize
    runs = [
        lanczos(operator, rows, settings.num_steps, reorthogonalize=mode)
        for rows in start.split(settings.rows or len(start))
    ]
    yield from gauss_quadratures(runs, names, size, settings)
