"""Quadratics from the eigenvalues of their blocks, from a given matrix, and by turning a basis.

Shapes: N problems, d size of a problem, L blocks, n_l size of block l.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hessian_tools.quadratic.problems import Quadratic, check_sizes, consecutive, gaussian

BASES = ("haar", "identity")
SCOPES = ("blocks", "whole")
_ROUNDING = 1e-12  # of a matrix that is symmetric and block-diagonal, relative to its largest entry
_LARGEST_ANGLE = 4.0  # from about pi on a random rotation is as good as a Haar basis
_ANGLE_TOLERANCE = 1e-7


def from_blocks(
    blocks: Sequence[ArrayLike],
    *,
    seed: int = 0,
    num_problems: int | None = None,
    basis: str = "haar",
    names: Iterable[str] | None = None,
    name: str = "quadratic",
) -> Quadratic:
    """H = blockdiag(Q_l diag(e_l) Q_l') from the eigenvalues of each block.

    Args:
        blocks: L sequences of positive eigenvalues, or arrays (N, n_l) where each of N problems has
            eigenvalues of its own.
        seed: of the bases.
        num_problems: N; None is one problem, or as many as ``blocks`` has rows.
        basis: "haar", uniformly random orthogonal Q_l; "identity", a diagonal H.
        names: of the blocks; "block 1", "block 2", ... unless given.
    Raises:
        ValueError: for no block, an eigenvalue that is not positive and finite, counts that
            disagree.
    """
    rows = [_eigenvalues(block, index) for index, block in enumerate(blocks)]
    count = _num_problems(rows, num_problems)
    if basis not in BASES:
        raise ValueError(f"basis is {basis!r}; allowed are 'haar' and 'identity'")
    labels = _labels(names, len(rows))  # a block's basis depends on its name, not on its place
    eigenvalues = tuple(e.expand(count, -1) for e in rows)
    dense_blocks = []
    for label, e in zip(labels, eigenvalues, strict=True):
        bases = _bases(basis, seed, label, count, e.shape[-1])
        dense_blocks.append(_symmetric((bases * e[:, None]) @ bases.mT))
    hessian = torch.stack([torch.block_diag(*parts) for parts in zip(*dense_blocks, strict=True)])
    batched = num_problems is not None or any(np.ndim(block) == 2 for block in blocks)
    return Quadratic(name, hessian, eigenvalues, labels, batched)


def from_matrix(
    matrix: ArrayLike | Tensor,
    block_sizes: Sequence[int] | None = None,
    *,
    name: str = "matrix",
) -> Quadratic:
    """A given H, (d, d) or (N, d, d), whose diagonal blocks have ``block_sizes``.

    Without ``block_sizes`` H is one block.

    Raises:
        ValueError: for a matrix that is not square, symmetric to rounding, positive definite, or
            not of these blocks.
    """
    given = torch.as_tensor(matrix).to(torch.float64)
    hessian = given[None] if given.ndim == 2 else given
    if hessian.ndim != 3 or hessian.shape[1] != hessian.shape[2] or not hessian.isfinite().all():
        raise ValueError(
            f"matrix has shape {tuple(given.shape)}; "
            "finite entries in (d, d) or (N, d, d) are needed"
        )
    sizes = [hessian.shape[-1]] if block_sizes is None else list(block_sizes)
    check_sizes("block_sizes", sizes, hessian.shape[-1])
    hessian = _block_diagonal(hessian, sizes)
    eigenvalues = tuple(torch.linalg.eigvalsh(hessian[:, s, s]) for s in consecutive(sizes))
    if min(float(e.min()) for e in eigenvalues) <= 0:
        raise ValueError(
            "matrix is not positive definite; shift it by more than its smallest eigenvalue"
        )
    return Quadratic(name, hessian, eigenvalues, _labels(None, len(sizes)), given.ndim == 3)


def rotated(
    problem: Quadratic,
    angle: float | Sequence[float] | Tensor,
    *,
    seed: int = 0,
    scope: str = "blocks",
) -> Quadratic:
    """H turned by R = expm(angle S), S random and skew: R H R', with the eigenvalues of H.

    S = (A - A') / sqrt(2 n) with A of standard normal entries, so that the largest rotation is
    about 2 ``angle``.

    Args:
        angle: one for all, or one a problem, (N,).
        scope: "blocks" turns each block within itself, "whole" all of H, which then is one block.
    Raises:
        ValueError: for another scope, or a number of angles that is neither 1 nor N.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; allowed are 'blocks' and 'whole'")
    count = problem.num_problems
    device = problem.hessian.device
    angles = torch.as_tensor(angle, dtype=torch.float64, device=device).reshape(-1, 1, 1)
    if len(angles) not in (1, count):
        raise ValueError(
            f"angle has {len(angles)} entries; 1 or one for each of {count} problems is needed"
        )
    start = problem if scope == "blocks" else _as_one_block(problem)
    generators = torch.stack([_generator(start, i, seed) for i in range(count)])
    turn = torch.linalg.matrix_exp(angles * generators.to(angles))
    return replace(start, hessian=_symmetric(turn @ problem.hessian @ turn.mT))


def dense(
    size: int,
    *,
    kappa: float,
    tau: float | None = None,
    seed: int = 0,
    num_problems: int | None = None,
) -> Quadratic:
    """A dense positive definite block with eigenvalues evenly spaced from 1 to ``kappa``.

    Args:
        tau: wanted sum_i |H_ii| / sum_ij |H_ij|, met to 1e-6 by :func:`rotated` from the identity,
            at the first angle that meets it; None is a Haar basis.
    Raises:
        ValueError: for a size below 2, a kappa below 1, or a tau that no angle meets.
    """
    if size < 2 or not 1 <= kappa < math.inf:
        raise ValueError(
            f"size is {size} and kappa {kappa}; "
            "a size of at least 2 and a kappa of at least 1 are needed"
        )
    block = [np.linspace(1, kappa, size)]
    name = f"dense {size}"
    if tau is None:
        return from_blocks(block, seed=seed, num_problems=num_problems, name=name)
    diagonal = from_blocks(block, num_problems=num_problems, basis="identity", name=name)
    return rotated(diagonal, _angle_of_tau(diagonal, tau, seed), seed=seed)


def haar(seed: int, name: str, size: int) -> Tensor:
    """(n, n) uniformly random orthogonal matrix.

    Q of a Gaussian matrix' QR decomposition in which R has a positive diagonal (Mezzadri 2007).
    """
    q, r = torch.linalg.qr(gaussian(seed, f"basis of {name}", size, size))
    return q * r.diagonal().sign()


def _eigenvalues(block: ArrayLike | Tensor, index: int) -> Tensor:
    """(1 or N, n_l) ascending float64."""
    if isinstance(block, Tensor):
        values = block.double()
    else:
        _check_numbers(block, index)
        values = torch.as_tensor(np.asarray(block, dtype=np.float64))
    positive = (values > 0) & values.isfinite()
    if values.ndim not in (1, 2) or not values.numel() or not bool(positive.all()):
        raise ValueError(
            f"block {index + 1} has eigenvalues {values.flatten()[:4].tolist()}...; "
            "positive finite ones needed"
        )
    return torch.atleast_2d(values).sort(dim=1).values


def _check_numbers(block: ArrayLike, index: int) -> None:
    """Refuses strings that look like numbers, which NumPy would convert."""
    if isinstance(block, np.ndarray):
        return
    if not all(isinstance(entry, Real) for entry in np.ravel(block).tolist()):
        raise ValueError(f"block {index + 1} is {block!r:.60}; a sequence of numbers is needed")


def _num_problems(blocks: Sequence[Tensor], asked: int | None) -> int:
    """N: as many as were asked for, or as the blocks' eigenvalues have rows."""
    counts = {len(e) for e in blocks if len(e) > 1}
    if asked is not None:
        counts.add(asked)
    valid = all(isinstance(n, int) and n >= 1 for n in counts)
    if not blocks or len(counts) > 1 or not valid:
        raise ValueError(
            f"blocks has {len(blocks)} blocks for {sorted(counts, key=str)} problems; "
            "one or more, and one N"
        )
    return counts.pop() if counts else 1


def _labels(names: Iterable[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"block {index + 1}" for index in range(count))
    labels = tuple(names)
    if len(set(labels)) != count:
        raise ValueError(
            f"names is {labels}; one name a block is needed, each once, for {count} blocks"
        )
    return labels


def _bases(basis: str, seed: int, label: str, count: int, size: int) -> Tensor:
    """(N, n, n) orthogonal bases of one block."""
    if basis == "identity":
        return torch.eye(size, dtype=torch.float64).expand(count, -1, -1)
    return torch.stack([haar(seed, f"{label} of problem {i}", size) for i in range(count)])


def _block_diagonal(hessian: Tensor, sizes: Sequence[int]) -> Tensor:
    """H without the rounding that lies outside of its blocks, symmetric to the last digit."""
    outside = hessian.clone()
    for where in consecutive(sizes):
        outside[:, where, where] = 0
    most = _ROUNDING * float(hessian.abs().max())
    if (hessian - hessian.mT).abs().max() > most or outside.abs().max() > most:
        raise ValueError(
            f"matrix is not symmetric and block-diagonal with blocks {sizes}; "
            "pass (A + A') / 2, or other sizes"
        )
    return _symmetric(hessian - outside)


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _as_one_block(problem: Quadratic) -> Quadratic:
    together = torch.cat(problem.eigenvalues, dim=1).sort(dim=1).values
    return replace(problem, eigenvalues=(together,), block_names=("all",))


def _generator(problem: Quadratic, index: int, seed: int) -> Tensor:
    """(d, d) skew S of one problem, block by block."""
    blocks = zip(problem.block_names, problem.block_sizes, strict=True)
    parts = [_skew(seed, f"{name} of problem {index}", size) for name, size in blocks]
    return torch.block_diag(*parts)


def _skew(seed: int, name: str, size: int) -> Tensor:
    a = gaussian(seed, f"rotation of {name}", size, size)
    return (a - a.T) / math.sqrt(2 * size)


def _angle_of_tau(diagonal: Quadratic, tau: float, seed: int) -> Tensor:
    """(N,) the first angle at which :func:`rotated` has brought tau down to ``tau``."""

    def met(angles: Tensor) -> Tensor:
        return rotated(diagonal, angles, seed=seed).tau <= tau

    # tau falls from 1 at angle 0, not always steadily: small steps up find the first crossing
    low = torch.zeros(diagonal.num_problems, dtype=torch.float64)
    high = torch.full_like(low, 1 / 64)
    enough = met(high)
    while not enough.all():
        if high.max() > _LARGEST_ANGLE:
            reached = float(rotated(diagonal, high, seed=seed).tau.max())
            raise ValueError(
                f"tau is {tau}; turning by a random rotation reaches {reached:.3g}, "
                "choose one above"
            )
        low = torch.where(enough, low, high)
        high = torch.where(enough, high, 1.25 * high)
        enough = met(high)
    while float((high - low).max()) > _ANGLE_TOLERANCE:
        middle = (low + high) / 2
        enough = met(middle)
        low = torch.where(enough, low, middle)
        high = torch.where(enough, middle, high)
    return high
