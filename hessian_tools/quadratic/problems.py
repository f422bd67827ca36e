"""Block-diagonal positive definite quadratics f(w) = w' H w / 2, of which f* = 0 is at w = 0.

A problem is H = blockdiag(H_1, ..., H_L), H_l = Q_l diag(e_l) Q_l' with given eigenvalues e_l and orthogonal Q_l. N
problems of one shape make one :class:`Quadratic`, so that methods run on all of them at once. Everything is float64.

Source: Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, arXiv 2402.16788, section 3.2. tau, how diagonal a
matrix is, is that of Adam-mini, arXiv 2406.16793, read as sum_i |H_ii| / sum_ij |H_ij|.

Shapes: N problems, d size of a problem, L blocks, n_l size of block l.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature


@dataclass(frozen=True, eq=False)
class Quadratic:
    """N problems f(w) = w' H w / 2 of one shape; ``batched`` tells whether results have an axis for them."""

    name: str
    hessian: Tensor = field(repr=False)  # (N, d, d) float64, symmetric positive definite
    eigenvalues: tuple[Tensor, ...] = field(repr=False)  # L of (N, n_l) float64, ascending
    block_names: tuple[str, ...]  # (L,)
    batched: bool = False

    @property
    def num_problems(self) -> int:
        """N."""
        return self.hessian.shape[0]

    @property
    def size(self) -> int:
        """d."""
        return self.hessian.shape[-1]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """(L,) n_l."""
        return tuple(e.shape[-1] for e in self.eigenvalues)

    @property
    def slices(self) -> tuple[slice, ...]:
        """(L,) where each block lies among the d coordinates."""
        ends = np.cumsum(self.block_sizes).tolist()
        return tuple(slice(end - n, end) for end, n in zip(ends, self.block_sizes, strict=True))

    @property
    def smallest(self) -> Tensor:
        """(N,) mu, the smallest eigenvalue."""
        return torch.stack([e[:, 0] for e in self.eigenvalues]).amin(0)

    @property
    def largest(self) -> Tensor:
        """(N,) L, the largest eigenvalue."""
        return torch.stack([e[:, -1] for e in self.eigenvalues]).amax(0)

    @property
    def kappa(self) -> Tensor:
        """(N,) condition number of H."""
        return self.largest / self.smallest

    @property
    def block_kappas(self) -> Tensor:
        """(N, L) condition numbers of the blocks."""
        return torch.stack([e[:, -1] / e[:, 0] for e in self.eigenvalues], dim=1)

    @property
    def tau(self) -> Tensor:
        """(N,) how diagonal H is: sum_i |H_ii| / sum_ij |H_ij|, 1 when it is diagonal."""
        sizes = self.hessian.abs()
        return sizes.diagonal(dim1=1, dim2=2).sum(1) / sizes.sum((1, 2))

    def to(self, device: torch.device | str) -> "Quadratic":
        """The same problems on another device."""
        return replace(
            self,
            hessian=self.hessian.to(device),
            eigenvalues=tuple(e.to(device) for e in self.eigenvalues),
        )

    def part(self, problems: slice) -> "Quadratic":
        """Some of the N problems."""
        return replace(
            self,
            hessian=self.hessian[problems],
            eigenvalues=tuple(e[problems] for e in self.eigenvalues),
        )

    def spectra(self, problem: int = 0) -> BlockSpectra:
        """The eigenvalues of one problem's blocks as exact quadratures, for every function that takes block spectra."""
        found = dict(
            zip(
                self.block_names,
                (exact_quadrature(e[problem]) for e in self.eigenvalues),
                strict=True,
            )
        )
        return BlockSpectra(found, 0, 0, 0, "none", "none", "given eigenvalues")

    def heterogeneity(self, problem: int = 0) -> JSHeterogeneity:
        """Every reading of how different the blocks' spectra are (two blocks or more)."""
        return js_heterogeneity(self.spectra(problem))

    def __str__(self) -> str:
        sizes = self.block_sizes
        same = (
            f"{len(sizes)} of {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
        )
        many = f"{self.num_problems} problems, " if self.batched else ""
        return f"{self.name}: {many}d = {self.size} in blocks {same}, kappa {float(self.kappa.median()):.6g}"


def from_blocks(
    blocks: Sequence[Any], *, seed: int = 0, num_problems: int | None = None, basis: str = "haar",
    names: Iterable[str] | None = None, name: str = "quadratic",
) -> Quadratic:  # fmt: skip
    """H = blockdiag(Q_l diag(e_l) Q_l') from the eigenvalues of each block.

    Args:
        blocks: L sequences of positive eigenvalues, or arrays (N, n_l) for N problems with eigenvalues of their own.
        seed: of the bases. num_problems: N; None is one problem, or as many as ``blocks`` has rows.
        basis: "haar", uniformly random orthogonal Q_l; "identity", a diagonal H.
        names: of the blocks; "block 1", "block 2", ... unless given.
    Raises:
        ValueError: for no block, an eigenvalue that is not positive and finite, counts that disagree.
    """
    given = [_eigenvalues(block, index) for index, block in enumerate(blocks)]
    rows = {len(e) for e in given if e.shape[0] > 1} | (
        {num_problems} if num_problems is not None else set()
    )
    if not given or len(rows) > 1 or not all(isinstance(n, int) and n >= 1 for n in rows):
        raise ValueError(
            f"blocks has {len(given)} blocks for {sorted(rows, key=str)} problems; one or more, and one N"
        )
    if basis not in ("haar", "identity"):
        raise ValueError(f"basis is {basis!r}; allowed are 'haar' and 'identity'")
    count = rows.pop() if rows else 1
    labels = (
        tuple(names)
        if names is not None
        else tuple(f"block {index + 1}" for index in range(len(given)))
    )
    if len(set(labels)) != len(given):
        raise ValueError(
            f"names is {labels}; one name a block is needed, each once, for {len(given)} blocks"
        )
    eigenvalues = tuple(e.expand(count, -1) for e in given)
    dense = []
    for label, e in zip(labels, eigenvalues, strict=True):
        n = e.shape[-1]
        bases = [
            haar(seed, f"{label} of problem {i}", n) if basis == "haar" else torch.eye(n).double()
            for i in range(count)
        ]
        dense.append(_with_spectrum(torch.stack(bases), e))
    hessian = torch.stack([torch.block_diag(*parts) for parts in zip(*dense, strict=True)])
    batched = num_problems is not None or any(np.ndim(block) == 2 for block in blocks)
    return Quadratic(name, hessian, eigenvalues, labels, batched)


def from_matrix(
    matrix: Any, block_sizes: Sequence[int] | None = None, *, name: str = "matrix"
) -> Quadratic:
    """A given H, (d, d) or (N, d, d), block-diagonal with blocks of ``block_sizes`` (one block unless given).

    Raises:
        ValueError: for a matrix that is not square, symmetric to rounding, positive definite, or not of these blocks.
    """
    given = torch.as_tensor(matrix).to(torch.float64)
    hessian = given[None] if given.ndim == 2 else given
    if hessian.ndim != 3 or hessian.shape[1] != hessian.shape[2] or not hessian.isfinite().all():
        raise ValueError(
            f"matrix has shape {tuple(given.shape)}; finite entries in (d, d) or (N, d, d) are needed"
        )
    d, scale = hessian.shape[-1], float(hessian.abs().max())
    sizes = [d] if block_sizes is None else list(block_sizes)
    if sum(sizes) != d or min(sizes) < 1:
        raise ValueError(
            f"block_sizes is {sizes}; sizes of at least 1 that add up to {d} are needed"
        )
    blocks = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    outside = hessian.clone()
    for where in blocks:
        outside[:, where, where] = 0
    if (hessian - hessian.mT).abs().max() > 1e-12 * scale or outside.abs().max() > 1e-12 * scale:
        raise ValueError(
            f"matrix is not symmetric and block-diagonal with blocks {sizes}; pass (A + A') / 2, or other sizes"
        )
    hessian = (hessian - outside + (hessian - outside).mT) / 2
    eigenvalues = tuple(torch.linalg.eigvalsh(hessian[:, where, where]) for where in blocks)
    if min(float(e.min()) for e in eigenvalues) <= 0:
        raise ValueError(
            "matrix is not positive definite; shift it by more than its smallest eigenvalue"
        )
    return Quadratic(
        name,
        hessian,
        eigenvalues,
        tuple(f"block {i + 1}" for i in range(len(sizes))),
        given.ndim == 3,
    )


def rotated(
    problem: Quadratic,
    angle: float | Sequence[float] | Tensor,
    *,
    seed: int = 0,
    scope: str = "blocks",
) -> Quadratic:
    """H turned by R = expm(angle S), S random and skew: the eigenvalues stay, the eigenvectors leave their place.

    S = (A - A') / sqrt(2 n) with A of standard normal entries, so that the largest rotation is about 2 ``angle``.

    Args:
        angle: one for all, or one a problem, (N,).
        scope: "blocks" turns each block within itself, "whole" all of H, which then is one block.
    Raises:
        ValueError: for another scope, or as many angles as there are no problems.
    """
    if scope not in ("blocks", "whole"):
        raise ValueError(f"scope is {scope!r}; allowed are 'blocks' and 'whole'")
    count = problem.num_problems
    angles = torch.as_tensor(angle, dtype=torch.float64, device=problem.hessian.device).reshape(
        -1, 1, 1
    )
    if len(angles) not in (1, count):
        raise ValueError(
            f"angle has {len(angles)} entries; 1 or one for each of {count} problems is needed"
        )
    sizes, names = (
        (problem.block_sizes, problem.block_names)
        if scope == "blocks"
        else ((problem.size,), ("all",))
    )
    generators = [torch.block_diag(*(_skew(seed, f"{n} of problem {i}", s) for n, s in zip(names, sizes, strict=True)))
                  for i in range(count)]  # fmt: skip
    turn = torch.linalg.matrix_exp(angles * torch.stack(generators).to(angles))
    hessian = turn @ problem.hessian @ turn.mT
    kept = (
        problem.eigenvalues
        if scope == "blocks"
        else (torch.cat(problem.eigenvalues, dim=1).sort(dim=1).values,)
    )
    return replace(
        problem, hessian=(hessian + hessian.mT) / 2, eigenvalues=kept, block_names=tuple(names)
    )


def dense(
    size: int, *, kappa: float, tau: float | None = None, seed: int = 0, num_problems: int | None = None
) -> Quadratic:  # fmt: skip
    """A dense positive definite block: eigenvalues evenly spaced from 1 to ``kappa``, eigenvectors turned to ``tau``.

    Args:
        tau: wanted sum_i |H_ii| / sum_ij |H_ij|, met to 1e-6 by turning the identity by :func:`rotated` (the first
            angle that meets it); None is a Haar basis.
    Raises:
        ValueError: for a size below 2, a kappa below 1, or a tau that no angle up to a Haar-like basis meets.
    """
    if size < 2 or not 1 <= kappa < math.inf:
        raise ValueError(
            f"size is {size} and kappa {kappa}; a size of at least 2 and a kappa of at least 1 are needed"
        )
    block, name = [np.linspace(1, kappa, size)], f"dense {size}"
    if tau is None:
        return from_blocks(block, seed=seed, num_problems=num_problems, name=name)
    diagonal = from_blocks(block, num_problems=num_problems, basis="identity", name=name)
    low, high = (
        torch.zeros(diagonal.num_problems).double(),
        torch.full((diagonal.num_problems,), 1 / 64).double(),
    )
    while not (met := rotated(diagonal, high, seed=seed).tau <= tau).all():
        if high.max() > 4:
            reached = float(rotated(diagonal, high, seed=seed).tau.max())
            raise ValueError(
                f"tau is {tau}; turning by a random rotation reaches {reached:.3g}, choose one above"
            )
        low, high = torch.where(met, low, high), torch.where(met, high, 1.25 * high)
    while float((high - low).max()) > 1e-7:
        middle = (low + high) / 2
        met = rotated(diagonal, middle, seed=seed).tau <= tau
        low, high = torch.where(met, low, middle), torch.where(met, middle, high)
    return rotated(diagonal, high, seed=seed)


def draw_starts(problem: Quadratic, num_starts: int, seed: int) -> Tensor:
    """(N, S, d) starts w_0 from N(0, I), the same for every device; problem i's do not depend on N."""
    named = (draw_probes("gaussian", seed, f"starts of problem {i}", num_starts, problem.size, dtype=torch.float64)
             for i in range(problem.num_problems))  # fmt: skip
    return torch.stack(list(named)).to(problem.hessian.device)


def haar(seed: int, name: str, size: int) -> Tensor:
    """(n, n) uniformly random orthogonal matrix: Q of a Gaussian's QR with R's diagonal positive (Mezzadri 2007)."""
    q, r = torch.linalg.qr(
        draw_probes("gaussian", seed, f"basis of {name}", size, size, dtype=torch.float64)
    )
    return q * r.diagonal().sign()


def _skew(seed: int, name: str, size: int) -> Tensor:
    a = draw_probes("gaussian", seed, f"rotation of {name}", size, size, dtype=torch.float64)
    return (a - a.T) / math.sqrt(2 * size)


def _with_spectrum(bases: Tensor, eigenvalues: Tensor) -> Tensor:
    """(N, n, n) Q diag(e) Q', symmetric to the last digit."""
    made = (bases * eigenvalues[:, None]) @ bases.mT
    return (made + made.mT) / 2


def _eigenvalues(block: Any, index: int) -> Tensor:
    """(1 or N, n_l) ascending float64."""
    if not isinstance(block, Tensor | np.ndarray) and not all(
        isinstance(e, Real) for e in np.ravel(block).tolist()
    ):
        raise ValueError(f"block {index + 1} is {block!r:.60}; a sequence of numbers is needed")
    values = (
        torch.as_tensor(np.asarray(block, dtype=np.float64))
        if not isinstance(block, Tensor)
        else block.double()
    )
    if (
        values.ndim not in (1, 2)
        or not values.numel()
        or not bool(((values > 0) & values.isfinite()).all())
    ):
        raise ValueError(
            f"block {index + 1} has eigenvalues {values.flatten()[:4].tolist()}...; positive finite ones needed"
        )
    return torch.atleast_2d(values).sort(dim=1).values


def exact_quadrature(eigenvalues: Tensor) -> Quadrature:
    """All n eigenvalues of a block as its spectrum, (n,) ascending."""
    values = eigenvalues.cpu().numpy()[None]
    n = values.shape[1]
    return Quadrature(
        values,
        np.full((1, n), 1 / n),
        np.zeros((1, n)),
        np.array([n]),
        n,
        0,
        "exact",
        "none",
        "none",
    )
