"""Stochastic Lanczos quadrature: spectra of operators and of all blocks of a Hessian, as nodes and weights.

For a unit vector u the Ritz values x_i of its T and the squared first components w_i of T's eigenvectors are the Gauss
quadrature of u's spectral measure: u' f(A) u ~ sum_i w_i f(x_i), exact for polynomials up to degree 2m - 1 (Golub &
Meurant 2010). The mean over probes estimates (1/n) tr f(A) (Bai, Fahey & Golub 1996; Ubaru, Chen & Saad 2017).

Normalisation: the weights of every probe sum to 1, for the probe is divided by its length. Both kinds of probe then are
unbiased: a Rademacher vector has |v|^2 = n, and a Gaussian one divided by its length is uniform on the sphere, with
E[u' M u] = tr(M) / n exactly (it is a ratio of v'Mv and v'v, but not a biased one, as direction and length are
independent).

Shapes: k probes, m nodes (Lanczos steps), n size of the operator, B blocks.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.errors import NumericalError
from hessian_tools.problem.problem import Problem
from hessian_tools.spectra.exact import dense_bytes, exact_quadratures
from hessian_tools.spectra.lanczos import REORTHOGONALIZE, LanczosResult, lanczos, ritz
from hessian_tools.spectra.probes import PROBE_KINDS, draw_probes
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature

ASYMMETRY_NOTED = 1e-3  # a dense block whose |A - A'|_F / |A|_F is above is noted: rounding noise or not a Hessian
_EXACT_BYTES = 1 << 28  # dense blocks held at a time
WORK_VECTORS = 5  # vectors of a row besides its basis: start, current, previous, product, residual


@dataclass(frozen=True)
class Settings:
    """Arguments of SLQ, validated once."""

    num_probes: int
    num_steps: int
    seed: int
    probes: str
    reorthogonalize: str
    exact: bool | str
    rows: int | None = None  # start vectors that go through at a time; None: all

    def __post_init__(self) -> None:
        for name in ("num_probes", "num_steps", "seed"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, Integral)
                or (value < 1 and name != "seed")
            ):
                need = "any integer" if name == "seed" else "an integer of at least 1"
                raise ValueError(f"{name} is {value!r}; it must be {need}")
        allowed = {
            "probes": PROBE_KINDS,
            "reorthogonalize": REORTHOGONALIZE,
            "exact": ("auto", True, False),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(repr, choices))}"
                )

    def is_exact(self, size: int) -> bool:
        return (
            bool(self.exact) if self.exact != "auto" else size <= self.num_probes * self.num_steps
        )

    def matvecs(self, size: int) -> int:
        return size if self.is_exact(size) else self.num_probes * min(self.num_steps, size)


def slq(
    operator: SymmetricOperator, *, num_probes: int, num_steps: int, seed: int = 0, probes: str = "rademacher",
    reorthogonalize: str = "full", name: str = "", exact: bool | str = "auto",
) -> Quadrature:  # fmt: skip
    """Stochastic Lanczos quadrature of one symmetric operator (size n; ``matmat``, ``dtype``, ``device``).

    Args:
        num_probes: k random vectors. num_steps: m Lanczos steps for each, at most n are made.
        seed: with ``name`` the only source of randomness (see :mod:`hessian_tools.spectra.probes`).
        probes: "rademacher" | "gaussian". reorthogonalize: see :mod:`hessian_tools.spectra.lanczos`.
        exact: "auto" forms the dense matrix and takes its eigenvalues, in float64, where n <= k m, since that costs no
            more products and leaves no error; True always, False never. It is symmetrised first; how far from symmetric
            it was is told in ``asymmetry`` and not judged, for a block that vanishes up to rounding (a key bias under
            softmax) has no symmetric digits at all.
    Raises:
        ValueError: for an argument out of range.
        NumericalError: for a product with NaN or inf, naming the Lanczos step (or column) where it appeared first.
    """
    settings = Settings(num_probes, num_steps, seed, probes, reorthogonalize, exact)
    operator.expect(settings.matvecs(operator.size))
    return dict(_solve(operator, (name,), operator.size, settings))[name]


def blockwise_slq(
    curvature: Problem | CurvatureOperator, partition: Any, *, num_probes: int = 4, num_steps: int = 40, seed: int = 0,
    probes: str = "rademacher", reorthogonalize: str = "full", exact: bool | str = "auto",
    finished: Mapping[str, Quadrature] | None = None, on_block: Callable[[str, Quadrature], None] | None = None,
    progress: bool = True,
) -> BlockSpectra:  # fmt: skip
    """:func:`slq` of every diagonal block of a Hessian, blocks of one shape going through the engine together.

    A seed gives a block the same probes alone and in company. Where the Lanczos basis does not fit
    ``hessian.krylov_bytes``, fewer blocks, then fewer probes go together; where not one basis fits, that block runs
    with "local" re-orthogonalisation, says so in its ``reorthogonalize`` and in ``notes``, and warns.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator.
        partition: a Partition or a list of its Blocks.
        finished: results of an earlier run with the same arguments, by name: these blocks are not computed again.
        on_block: called with name and Quadrature as each block is done, also before an error is raised for another.
        progress: a bar on stderr, products done and left, when that is a terminal.
        The others: see :func:`slq`.
    Raises:
        ValueError: for an argument out of range, no block, or a name that occurs twice.
        TypeError: for a ``partition`` that holds no Blocks.
        NumericalError: for a product with NaN or inf, naming the block and the Lanczos step where it appeared first.
    """
    settings = Settings(num_probes, num_steps, seed, probes, reorthogonalize, exact)
    hessian = as_operator(curvature)
    names, cuts = names_and_cuts(partition)
    done = {name: finished[name] for name in names if name in finished} if finished else {}
    total = sum(
        settings.matvecs(cut.block_size) for cut in cuts for name in cut.names if name not in done
    )
    hessian.expect(total, len(names))
    with tqdm(
        total=total, unit="HVP", disable=None if progress else True, dynamic_ncols=True
    ) as bar:
        for name, quadrature in solved(hessian, cuts, done, settings, bar):
            done[name] = quadrature
            if on_block is not None:
                on_block(name, quadrature)
    notes = tuple(note for name in names for note in notes_on(name, done[name], settings))
    ordered = {name: done[name] for name in names}
    return BlockSpectra(
        ordered, num_probes, num_steps, seed, probes, reorthogonalize, hessian.route, notes
    )


def solved(
    hessian: CurvatureOperator,
    cuts: Iterable[Any],
    done: Collection[str],
    settings: Settings,
    bar: Any,
) -> Iterator[tuple[str, Quadrature]]:
    """The blocks of ``cuts`` that are not in ``done``, as they come; blocks of one cut go through together."""
    for chunk, chosen in (c for cut in cuts for c in _chunks(cut, done, settings, hessian)):
        bar.set_postfix_str(chunk.names[0])
        yield from _solve(
            watched(hessian.stacked(chunk), bar), chunk.names, chunk.block_size, chosen
        )


def watched(operator: Any, bar: Any) -> Any:
    """``operator``, which then reports its products to a progress bar."""

    def matmat(vectors: Tensor) -> Tensor:
        product = operator.matmat(vectors)
        bar.update(len(vectors))
        return product

    return SimpleNamespace(matmat=matmat, dtype=operator.dtype, device=operator.device)


def names_and_cuts(partition: Any) -> tuple[list[str], Iterable[Any]]:
    blocks = list(partition) if isinstance(partition, Iterable) else [partition]
    if not all(hasattr(block, "as_cut") for block in blocks):
        raise TypeError(
            f"partition is {partition!r:.80}; pass ht.partition(model, ...) or a list of its Blocks"
        )
    names = [block.name for block in blocks]
    if not names:
        raise ValueError("partition holds no block; choose at least one")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"partition names {name!r} twice; pass each block once")
    return names, partition.cuts if hasattr(partition, "cuts") else [
        block.as_cut() for block in blocks
    ]


def _chunks(
    cut: Any, done: Collection[str], settings: Settings, hessian: CurvatureOperator
) -> Iterator[tuple[Any, Settings]]:
    """The unfinished runs of ``cut`` in pieces that fit the memory budget, each with its settings."""
    size, k, budget = cut.block_size, settings.num_probes, hessian.krylov_bytes
    missing = np.flatnonzero([name not in done for name in cut.names])
    if settings.is_exact(size):
        together = min(budget, _EXACT_BYTES) // dense_bytes(size)
    else:
        vector, full = size * hessian.dtype.itemsize, settings.reorthogonalize == "full"
        row = vector * (WORK_VECTORS + full * min(settings.num_steps, size))
        if row > budget and full and len(missing):
            like = f" and {len(missing) - 1} like it" if len(missing) > 1 else ""
            warnings.warn(
                f"{cut.names[missing[0]]}{like}: {local_note(size, settings)}",
                RuntimeWarning,
                stacklevel=4,
            )
            settings, row = replace(settings, reorthogonalize="local"), vector * WORK_VECTORS
        together = budget // (k * row)
        if not together:  # not even one block with all its probes
            settings = replace(settings, rows=max(1, budget // row))
    for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1):
        for piece in np.split(run, range(max(1, together), len(run), max(1, together))):
            if len(piece):
                yield cut.chunk(int(piece[0]), int(piece[-1]) + 1), settings


def local_note(size: int, settings: Settings) -> str:
    return (
        f"the Lanczos basis ({settings.num_steps} vectors of {size}) does not fit the memory budget, so it runs with "
        "reorthogonalize='local' (densities hold, counts of nodes do not); allow more memory or take fewer steps"
    )


def notes_on(name: str, quadrature: Quadrature, settings: Settings) -> Iterator[str]:
    if quadrature.status != "exact" and quadrature.reorthogonalize != settings.reorthogonalize:
        yield f"{name}: {local_note(quadrature.size, settings)}"
    if quadrature.asymmetry > ASYMMETRY_NOTED:
        yield f"{name}: dense block asymmetric by {quadrature.asymmetry:.2g} of its norm: rounding noise, or no Hessian"


def _solve(
    operator: Any, names: Sequence[str], size: int, settings: Settings
) -> Iterator[tuple[str, Quadrature]]:
    """The B blocks that ``operator`` stacks; an error for the first that failed comes last."""
    failed = []
    outcomes = (
        exact_quadratures(operator, len(names), size)
        if settings.is_exact(size)
        else _stochastic(operator, names, size, settings)
    )
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, Quadrature):
            yield name, outcome
        else:
            failed.append(nonfinite(name, outcome))
    if failed:
        raise failed[0]


def nonfinite(name: str, where: str) -> NumericalError:
    """The error for products with block ``name`` that were NaN or inf ``where`` first."""
    block = f"the Hessian of block {name}" if name else "the operator"
    return NumericalError(
        f"a product with {block} is NaN or inf, first {where}; check the loss and the dtype's range"
    )


def _stochastic(
    operator: Any, names: Sequence[str], size: int, settings: Settings
) -> Iterator[Quadrature | str]:
    """SLQ of each block, or where its products first were not finite."""
    draw = partial(
        draw_probes, settings.probes, settings.seed, dtype=operator.dtype, device=operator.device
    )
    start = torch.cat([draw(name, settings.num_probes, size) for name in names])
    runs = [
        lanczos(operator, rows, settings.num_steps, reorthogonalize=settings.reorthogonalize)
        for rows in start.split(settings.rows or len(start))
    ]
    yield from quadratures_of(runs, len(names), size, settings)


def quadratures_of(
    runs: Sequence[LanczosResult], num_blocks: int, size: int, settings: Settings
) -> Iterator[Quadrature | str]:
    """The quadrature of each block, whose rows follow each other in ``runs``, or where it first was not finite."""
    parts = [
        np.concatenate([getattr(run, part) for run in runs])
        for part in ("alphas", "betas", "steps", "status")
    ]
    for alphas, betas, steps, status in zip(
        *(np.split(part, num_blocks) for part in parts), strict=True
    ):
        if "nonfinite" in status:
            yield f"at Lanczos step {steps[status == 'nonfinite'].min() + 1} of {alphas.shape[1]}"
            continue
        ended = "breakdown" if "breakdown" in status else "complete"
        spectrum = ritz(alphas, betas, steps)
        yield Quadrature(
            *spectrum, steps, size, alphas.size, ended, settings.probes, settings.reorthogonalize
        )


class _DiagonalOfEachRow(SymmetricOperator):
    """k diagonal matrices side by side: row i of (k, n) vectors is multiplied with row i of ``diagonals``."""

    def __init__(self, diagonals: Tensor) -> None:
        super().__init__(diagonals.shape[1], diagonals.dtype, diagonals.device)
        self.diagonals = diagonals

    def _matmat(self, vectors: Tensor) -> Tensor:
        return vectors * self.diagonals


def truncated(quadrature: Quadrature, num_steps: int) -> Quadrature:
    """The quadrature that ``num_steps`` <= m steps would have left; itself when exact. No product is spent.

    Its T is the leading part of that of ``quadrature``, computed as the Jacobi matrix of nodes and weights: Lanczos on
    diag(nodes) from sqrt(weights) (Gragg & Harrod 1984).
    """
    if quadrature.status == "exact" or num_steps >= quadrature.nodes.shape[1]:
        return quadrature
    measure = _DiagonalOfEachRow(torch.from_numpy(quadrature.nodes))
    run = lanczos(measure, torch.from_numpy(quadrature.weights).sqrt(), num_steps)
    steps = np.minimum(run.steps, quadrature.steps)
    nodes, weights, residuals = ritz(run.alphas, run.betas, steps)
    return replace(
        quadrature,
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        steps=steps,
        num_matvecs=quadrature.num_probes * num_steps,
        status="breakdown" if (steps < num_steps).any() else "complete",
    )
