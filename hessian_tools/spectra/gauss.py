"""From Lanczos' tridiagonal matrices to Gauss quadratures.

The eigenvalues of T are the nodes, the squared first components of its eigenvectors the weights
(Golub & Meurant 2010, chapter 6).

Shapes: k probes, m Lanczos steps, n size of the operator.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.errors import NumericalError, nonfinite_product
from hessian_tools.spectra.lanczos import LanczosResult, lanczos
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.spectra.settings import Settings

Table = NDArray[np.float64]


def ritz(alphas: Table, betas: Table, steps: NDArray[np.int_]) -> tuple[Table, Table, Table]:
    """Nodes, weights and residual bounds, each (k, m), of k tridiagonal matrices.

    Row i counts up to ``steps[i]``: diagonal ``alphas[i]``, off-diagonal ``betas[i, :-1]``, norm of
    the final residual ``betas[i, steps[i] - 1]``. Rows of equal length are solved as one batch in
    float64, so nothing that pads a row can mix with its eigenvectors. The last node pads the row.
    """
    nodes = np.zeros(alphas.shape)
    weights = np.zeros(alphas.shape)
    residuals = np.zeros(alphas.shape)
    for length in np.unique(steps):
        rows = np.flatnonzero(steps == length)
        values, vectors = np.linalg.eigh(
            _lower_triangles(alphas[rows, :length], betas[rows, : length - 1])
        )
        bounds = betas[rows, length - 1, None] * np.abs(vectors[:, -1, :])
        columns = np.minimum(np.arange(alphas.shape[1]), length - 1)
        nodes[rows] = values[:, columns]
        residuals[rows] = bounds[:, columns]
        squares = vectors[:, 0, :] ** 2
        weights[rows, :length] = squares / squares.sum(axis=1, keepdims=True)
    return nodes, weights, residuals


def _lower_triangles(diagonals: Table, below: Table) -> Table:
    """Matrices (k, m, m) from (k, m) and (k, m - 1); eigh reads their lower triangle alone."""
    k, m = diagonals.shape
    matrices = np.zeros((k, m, m))
    places = np.arange(m)
    matrices[:, places, places] = diagonals
    matrices[:, places[1:], places[:-1]] = below
    return matrices


def gauss_quadratures(
    runs: Sequence[LanczosResult],
    names: Sequence[str],
    size: int,
    settings: Settings,
) -> Iterator[Quadrature | NumericalError]:
    """The quadrature of each block, or the error that names where its products were not finite.

    The rows of the blocks ``names``, all of ``size`` n, follow each other in ``runs``, equally many
    for each.
    """
    all_alphas = np.concatenate([run.alphas for run in runs])
    all_betas = np.concatenate([run.betas for run in runs])
    all_steps = np.concatenate([run.steps for run in runs])
    all_status = np.concatenate([run.status for run in runs])
    probes = len(all_steps) // len(names)
    for number, name in enumerate(names):
        rows = slice(number * probes, (number + 1) * probes)
        alphas = all_alphas[rows]
        steps = all_steps[rows]
        status = all_status[rows]
        if "nonfinite" in status:
            step = steps[status == "nonfinite"].min() + 1
            yield nonfinite_product(name, f"at Lanczos step {step} of {alphas.shape[1]}")
            continue
        nodes, weights, residuals = ritz(alphas, all_betas[rows], steps)
        yield Quadrature(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps=steps,
            size=size,
            num_matvecs=alphas.size,
            status="breakdown" if "breakdown" in status else "complete",
            probes=settings.probes,
            reorthogonalize=settings.reorthogonalize,
        )


def truncated(quadrature: Quadrature, num_steps: int) -> Quadrature:
    """What ``num_steps`` <= m steps would have left of ``quadrature``; itself when exact."""
    ((short,),) = all_truncated([quadrature], [lambda made: num_steps])
    return short


def all_truncated(
    quadratures: Sequence[Quadrature],
    lengths: Sequence[Callable[[int], int]],
) -> list[list[Quadrature]]:
    """For each of ``lengths`` what so many of their m steps would have left of all quadratures.

    No product is spent: T of fewer steps is the leading part of T, which is the Jacobi matrix of
    nodes and weights, hence what Lanczos makes of diag(nodes) from sqrt(weights) (Gragg & Harrod
    1984). Exact quadratures stay, and so do those that are no longer.
    """
    found = [list(quadratures) for _ in lengths]
    groups: dict[int, list[int]] = {}
    for index, block in enumerate(quadratures):
        if block.status != "exact":
            groups.setdefault(block.nodes.shape[1], []).append(index)
    for made, chosen in groups.items():
        group = [quadratures[index] for index in chosen]
        wanted = [min(length(made), made) for length in lengths]
        run = _jacobi(group, max(wanted))
        for column, steps in zip(found, wanted, strict=True):
            if steps < made:
                for place, part in zip(chosen, _leading(run, group, steps), strict=True):
                    column[place] = part
    return found


def _jacobi(group: Sequence[Quadrature], num_steps: int) -> LanczosResult:
    """The leading parts of the T of all probes of ``group``, whose m is the same."""
    nodes = np.concatenate([block.nodes for block in group])
    weights = np.concatenate([block.weights for block in group])
    measure = _DiagonalOfEachRow(torch.from_numpy(nodes))
    return lanczos(measure, torch.from_numpy(weights).sqrt(), num_steps)


def _leading(
    run: LanczosResult,
    group: Sequence[Quadrature],
    num_steps: int,
) -> Iterator[Quadrature]:
    steps = np.minimum(run.steps, np.concatenate([block.steps for block in group]))
    steps = np.minimum(steps, num_steps)
    tables = ritz(run.alphas[:, :num_steps], run.betas[:, :num_steps], steps)
    ends = np.cumsum([block.num_probes for block in group])[:-1]
    split = [np.split(table, ends) for table in (*tables, steps)]
    for block, nodes, weights, residuals, valid in zip(group, *split, strict=True):
        yield replace(
            block,
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps=valid,
            num_matvecs=block.num_probes * num_steps,
            status="breakdown" if (valid < num_steps).any() else "complete",
        )


class _DiagonalOfEachRow(SymmetricOperator):
    """k diagonal matrices side by side, (k, n): row i of the vectors belongs to the i-th."""

    def __init__(self, diagonals: Tensor) -> None:
        super().__init__(diagonals.shape[1], diagonals.dtype, diagonals.device)
        self.diagonals = diagonals

    def _matmat(self, vectors: Tensor) -> Tensor:
        return vectors * self.diagonals
