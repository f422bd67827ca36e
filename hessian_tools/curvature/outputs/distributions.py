"""Distributions of the targets that a loss is the negative log-likelihood of, given outputs z.

With the score s = d(-log p(y | z))/dz of a target y, the Fisher matrix of a mean over N rows is
(1/N) sum_rows E[s s']: (diag(p) - p p') / N for classes of probabilities p, 2/N for a Gaussian of
variance 1/2, whose -log p is the squared error. Martens (2020), "New insights and perspectives on
the natural gradient method", section 9.

Letters: z outputs, N rows (tokens, images, ...), C classes, S draws, r vectors.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hessian_tools.curvature.segments.fake_problem import FakeProblem
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.losses import CATEGORICAL, GAUSSIAN, OutputLoss
from hessian_tools.problem.problem import Problem

AnyProblem = Problem | FakeProblem


class LikelihoodLoss(OutputLoss, Protocol):
    """A loss that says from which distribution the targets are."""

    def likelihood(self, batch: Batch) -> str: ...

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor: ...


class ClassLoss(LikelihoodLoss, Protocol):
    """The cross-entropy of classes."""

    @property
    def ignore_index(self) -> int: ...

    def axis_of_classes(self, outputs: Tensor, batch: Batch) -> int: ...


@dataclass(frozen=True)
class Categorical:
    """Classes along ``axis`` of z; ``weights``, 1/N for rows that count, has length 1 there."""

    axis: int
    weights: Tensor
    targets: Tensor  # classes, or their probabilities

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The axes of z that one row takes."""
        return (self.axis,)

    @property
    def count(self) -> Tensor:
        """N."""
        return 1 / self.weights.max()

    def fisher_product(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """(diag(p) - p p') u / N for each row, u (r, \\*shape of z)."""
        p = outputs.softmax(self.axis)
        scaled = p * rows
        mean = scaled.sum(self.axis + 1, keepdim=True)
        return self.weights * (scaled - p * mean)

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Of a draw: one number for each row of z."""
        return tuple(n for axis, n in enumerate(outputs.shape) if axis != self.axis)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What draws are made from: uniform numbers."""
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sampled_product(self, outputs: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
        """(1/N S) sum over draws of s (s'u), for ``noise`` (\\*rows of z, S)."""
        p = outputs.movedim(self.axis, -1).softmax(-1)
        edges = p.cumsum(-1).contiguous()
        drawn = torch.searchsorted(edges, noise.to(p.dtype).contiguous())
        drawn = drawn.clamp(max=p.shape[-1] - 1)  # where rounding leaves the last edge below 1
        u = rows.movedim(self.axis + 1, -1)
        classes = drawn.expand(len(rows), *drawn.shape)
        # s = p - e_y for a draw y, so s'u = p'u - u_y
        slopes = (p * u).sum(-1, keepdim=True) - u.gather(-1, classes)
        product = p * slopes.sum(-1, keepdim=True)
        product = product.scatter_add(-1, classes, -slopes)
        return self.weights * product.movedim(-1, self.axis + 1) / noise.shape[-1]

    def score(self, outputs: Tensor) -> Tensor:
        """s of the targets in the data, 0 for rows that do not count."""
        p = outputs.softmax(self.axis)
        if self.targets.is_floating_point():
            return p - self.targets
        counts = self.weights > 0
        shape = self.weights.shape
        classes = self.targets.reshape(shape).where(counts, 0)
        return counts * (p - torch.zeros_like(p).scatter(self.axis, classes, 1.0))

    def score_of_draw(self, outputs: Tensor, chosen: Tensor) -> Tensor:
        """s of the class whose share of [0, 1] ``chosen`` lies in."""
        p = outputs.softmax(self.axis)
        is_reached = p.cumsum(self.axis) >= chosen.to(p.dtype).unsqueeze(self.axis)
        is_reached.select(self.axis, -1).fill_(True)
        first = is_reached.to(p.dtype).argmax(self.axis, keepdim=True)
        return p - torch.zeros_like(p).scatter(self.axis, first, 1.0)


@dataclass(frozen=True)
class Gaussian:
    """Independent entries of variance 1/2, N = ``count`` of them; a row is an example's entries."""

    count: int
    targets: Tensor

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The axes of z that one row takes: all but the first."""
        return tuple(range(1, self.targets.ndim))

    @property
    def weights(self) -> float:
        """1/N."""
        return 1 / self.count

    def fisher_product(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """2 u / N."""
        return rows * (2 / self.count)

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Of a draw: one number for each entry of z."""
        return tuple(outputs.shape)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What draws are made from: standard normal numbers."""
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def sampled_product(self, outputs: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
        """(1/N S) sum over draws of s (s'u), for ``noise`` (\\*shape of z, S)."""
        total = torch.zeros_like(rows)
        for chosen in noise.to(rows.dtype).unbind(-1):
            score = self.score_of_draw(outputs, chosen)
            total = total + rank_one(score, self.row_axes, rows)
        return total / (self.count * noise.shape[-1])

    def score(self, outputs: Tensor) -> Tensor:
        """s of the targets in the data."""
        return 2 * (outputs - self.targets)

    def score_of_draw(self, outputs: Tensor, chosen: Tensor) -> Tensor:
        """s of the target z + ``chosen`` / sqrt(2)."""
        return -math.sqrt(2) * chosen


Distribution = Categorical | Gaussian


def rank_one(score: Tensor, axes: tuple[int, ...], rows: Tensor) -> Tensor:
    """s (s'u) for each row of z, which takes ``axes`` of it, u (r, \\*shape of z)."""
    products = score * rows
    if axes:
        products = products.sum([axis + 1 for axis in axes], keepdim=True)
    return score * products


def likelihood(loss: OutputLoss, batch: Batch) -> str:
    """CATEGORICAL, GAUSSIAN, or "" where the loss does not say."""
    stated = getattr(loss, "likelihood", None)
    return stated(batch) if stated is not None else ""


def distribution(problem: AnyProblem, outputs: Tensor, batch: Batch) -> Distribution:
    """What the targets of ``batch`` are distributed like, given z.

    Raises:
        ValueError: the loss does not say.
    """
    loss = problem.in_two_steps
    kind = likelihood(loss, batch)
    if kind == CATEGORICAL:
        return _categorical(loss, outputs, batch)  # type: ignore[arg-type]  # it says it is one
    if kind == GAUSSIAN:
        targets = loss.targets(batch, outputs)  # type: ignore[attr-defined]  # as above
        return Gaussian(outputs.numel(), targets)
    raise ValueError(
        f"the Fisher matrix is over targets that the model draws, and {type(loss).__name__} does "
        "not say from which distribution; use ht.cross_entropy, ht.mse or ht.huggingface (of "
        "classes), or the Gauss-Newton or the empirical Fisher matrix, which take any ht.Loss"
    )


def _categorical(loss: ClassLoss, outputs: Tensor, batch: Batch) -> Categorical:
    axis = loss.axis_of_classes(outputs, batch)
    targets = loss.targets(batch, outputs)
    shape = outputs.select(axis, 0).shape
    if targets.is_floating_point():  # every row counts
        counts = outputs.new_ones(shape)
    else:
        counts = (targets != loss.ignore_index).to(outputs.dtype).reshape(shape)
    weights = counts / counts.sum()
    return Categorical(axis, weights.unsqueeze(axis), targets)
