"""Block-diagonal positive definite quadratics f(w) = w' H w / 2, which are least at w = 0: f* = 0.

A problem is H = blockdiag(H_1, ..., H_L), where H_l = Q_l diag(e_l) Q_l' has given eigenvalues e_l
and an orthogonal Q_l. N problems of one shape make one :class:`Quadratic`, so that methods run on
all of them at once. Everything is float64.

Sources: Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, arXiv 2402.16788, section 3.2.
tau, a measure of how diagonal a matrix is, is that of Adam-mini, arXiv 2406.16793, read as
sum_i |H_ii| / sum_ij |H_ij|.

Shapes: N problems, S starts, d size of a problem, L blocks, n_l size of block l.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.readings import pair_readings
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import BlockSpectra, Floats, Quadrature


@dataclass(frozen=True, eq=False)
class Quadratic:
    """N problems f(w) = w' H w / 2 of one shape.

    ``batched`` says whether results have a leading axis for the problems; a single problem has none
    unless it was asked for.
    """

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
        return consecutive(self.block_sizes)

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

    def by_block(self, problem: int = 0) -> dict[str, Floats]:
        """The eigenvalues of one problem, (n_l,) ascending for each block by its name."""
        values = (e[problem].cpu().numpy() for e in self.eigenvalues)
        return dict(zip(self.block_names, values, strict=True))

    def spectra(self, problem: int = 0) -> BlockSpectra:
        """One problem's eigenvalues as exact quadratures, for functions that take block spectra."""
        quadratures = {name: exact_quadrature(e) for name, e in self.by_block(problem).items()}
        return BlockSpectra(
            quadratures,
            num_probes=0,
            num_steps=0,
            seed=0,
            probes="none",
            reorthogonalize="none",
            route="given eigenvalues",
        )

    def heterogeneity(self, problem: int = 0) -> JSHeterogeneity:
        """Every reading of how different the blocks' spectra are; needs two blocks or more."""
        return js_heterogeneity(self.spectra(problem), readings=pair_readings())

    def __str__(self) -> str:
        sizes = self.block_sizes
        if len(set(sizes)) == 1:
            blocks = f"{len(sizes)} of {sizes[0]}"
        else:
            blocks = " + ".join(map(str, sizes))
        many = f"{self.num_problems} problems, " if self.batched else ""
        kappa = float(self.kappa.median())
        return f"{self.name}: {many}d = {self.size} in blocks {blocks}, kappa {kappa:.6g}"


def exact_quadrature(eigenvalues: Floats) -> Quadrature:
    """All n eigenvalues of a block, (n,) ascending, as its spectrum."""
    n = len(eigenvalues)
    return Quadrature(
        nodes=eigenvalues[None],
        weights=np.full((1, n), 1 / n),
        residuals=np.zeros((1, n)),
        steps=np.array([n]),
        size=n,
        num_matvecs=0,
        status="exact",
        probes="none",
        reorthogonalize="none",
    )


def draw_starts(problem: Quadratic, num_starts: int, seed: int) -> Tensor:
    """(N, S, d) starts w_0 from N(0, I), the same on every device.

    Those of problem i do not depend on N.
    """
    starts = [
        gaussian(seed, f"starts of problem {i}", num_starts, problem.size)
        for i in range(problem.num_problems)
    ]
    return torch.stack(starts).to(problem.hessian.device)


def starts_of(problem: Quadratic, starts: ArrayLike | None, num_starts: int, seed: int) -> Tensor:
    """(N, S, d) the given starts, or ``num_starts`` drawn ones, on the problem's device.

    Args:
        starts: (S, d), or (N, S, d) for a batched problem; None draws them.
    Raises:
        ValueError: for starts of another shape, or that are zero or not finite.
    """
    check_count("num_starts", num_starts)
    if starts is None:
        return draw_starts(problem, num_starts, seed)
    given = torch.as_tensor(starts, dtype=torch.float64, device=problem.hessian.device)
    shaped = given if problem.batched else given[None]
    n, d = problem.num_problems, problem.size
    if shaped.ndim != 3 or (shaped.shape[0], shaped.shape[2]) != (n, d):
        needed = "(N, S, d)" if problem.batched else "(S, d)"
        raise ValueError(
            f"starts has shape {tuple(given.shape)}; {needed} with N {n}, d {d} is needed"
        )
    if not bool(shaped.isfinite().all()) or not bool((shaped != 0).any(-1).all()):
        raise ValueError(
            "starts holds a start that is zero, the minimum, or not finite; leave it out"
        )
    return shaped


def gaussian(seed: int, name: str, rows: int, size: int) -> Tensor:
    """(rows, size) float64 entries N(0, 1) that belong to ``seed`` and ``name``."""
    return draw_probes("gaussian", seed, name, rows, size, dtype=torch.float64)


def consecutive(sizes: Sequence[int]) -> tuple[slice, ...]:
    """Where groups of ``sizes`` coordinates lie that follow one another."""
    ends = np.cumsum(sizes).tolist()
    return tuple(slice(end - n, end) for end, n in zip(ends, sizes, strict=True))


def check_sizes(name: str, sizes: Sequence[int], total: int) -> None:
    """Raises ValueError unless groups of ``sizes`` make up ``total`` coordinates."""
    if sum(sizes) != total or min(sizes) < 1:
        raise ValueError(
            f"{name} is {tuple(sizes)}; sizes of at least 1 that add up to {total} are needed"
        )


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; an integer of at least 1 is needed")
