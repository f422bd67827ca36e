"""Matrices M between a model's outputs, of which J' M J are the Gauss-Newton and Fisher matrices.

L = loss(z, batch) is a mean over N rows of z (tokens, images, ...), and M joins the entries of one
row only:

- the loss's Hessian in z, by autograd, for any loss that is twice differentiable in z;
- the Fisher matrix, (1/N) sum_rows E[s s'], s the score of a target that the model itself draws
  (:mod:`hessian_tools.curvature.outputs.distributions`), exactly or as a mean over draws (Monte
  Carlo);
- the empirical one, with the score of the target in the data (Kunstner, Hennig & Balles 2019,
  "Limitations of the empirical Fisher approximation").

Letters: z outputs, N rows, S draws, r vectors.
"""

from functools import partial

import torch
from torch import Tensor

from hessian_tools.curvature.engine.custom_functions import first_line
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.curvature.engine.recorded import Grad, derivatives_of_rows
from hessian_tools.curvature.engine.through_outputs import RowMap
from hessian_tools.curvature.outputs.distributions import (
    AnyProblem,
    Gaussian,
    distribution,
    likelihood,
    rank_one,
)
from hessian_tools.errors import NotTwiceDifferentiable
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem

_STEP = 1e-6  # of differences in z, relative to its norm


class LossHessian:
    """The Hessian of the loss in the outputs."""

    name = "ggn"

    def at(self, problem: AnyProblem, outputs: Tensor, batch: Batch) -> RowMap:
        z, slope = _slope(problem, outputs, batch)
        if not slope.requires_grad:  # the loss is linear in z
            return torch.zeros_like
        return partial(_second_derivative, slope, z)

    def moving(self, problem: Problem, outputs: Tensor, fixed: Tensor, batch: Batch) -> Tensor:
        loss = problem.loss_of_outputs(outputs, batch)
        return torch.autograd.grad(loss, outputs)[0]

    def reference(self, problem: Problem, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """M u by a closed form; where none is known by differences of the loss's gradient."""
        if likelihood(problem.in_two_steps, batch):
            known = distribution(problem, outputs, batch)
            # probabilities that are given need not add up to 1, as the closed form assumes
            if isinstance(known, Gaussian) or not known.targets.is_floating_point():
                return known.fisher_product(outputs, u[None])[0]
        z, v = outputs.double(), u.double()  # in which differences of so small a step can be had
        step = _step(z, v)
        _, ahead = _slope(problem, z + step * v, batch)
        _, behind = _slope(problem, z - step * v, batch)
        return ((ahead - behind).detach() / (2 * step)).to(u.dtype)


class ExpectedFisher:
    """(1/N) sum_rows E[s s'], the expectation exact, in closed form."""

    name = "fisher"

    def at(self, problem: AnyProblem, outputs: Tensor, batch: Batch) -> RowMap:
        return partial(distribution(problem, outputs, batch).fisher_product, outputs)

    def moving(self, problem: Problem, outputs: Tensor, fixed: Tensor, batch: Batch) -> Tensor:
        return self.at(problem, fixed, batch)(outputs[None])[0]

    def reference(self, problem: Problem, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """M u by autograd: M is the loss's Hessian in z, which here does not depend on targets."""
        return LossHessian().at(problem, outputs, batch)(u[None])[0]


class EmpiricalFisher:
    """(1/N) sum_rows s s', s the score of the target in the data."""

    name = "empirical-fisher"

    def at(self, problem: AnyProblem, outputs: Tensor, batch: Batch) -> RowMap:
        _, slope = _slope(problem, outputs, batch)
        axes = tuple(range(1, outputs.ndim))  # a row is an example
        count: Tensor | float
        if likelihood(problem.in_two_steps, batch):
            known = distribution(problem, outputs, batch)
            axes, count = known.row_axes, known.count
        else:
            count = problem.count(batch)
        # the loss is the mean over rows, so its slope is the scores over N
        scores = slope.detach() * count
        return partial(_rank_one_mean, scores, axes, count)

    def moving(self, problem: Problem, outputs: Tensor, fixed: Tensor, batch: Batch) -> Tensor:
        return self.at(problem, fixed, batch)(outputs[None])[0]

    def reference(self, problem: Problem, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """M u by scores in closed form; where none is known, s'u by differences of the loss."""
        if likelihood(problem.in_two_steps, batch):
            known = distribution(problem, outputs, batch)
            product = rank_one(known.score(outputs), known.row_axes, u[None])[0]
            return known.weights * product
        z, v = outputs.double(), u.double()
        step = _step(z, v)
        total = torch.zeros_like(v)
        for example in range(len(z)):
            moved = torch.zeros_like(v)
            moved[example] = step * v[example]
            ahead = problem.loss_of_outputs(z + moved, batch)
            behind = problem.loss_of_outputs(z - moved, batch)
            total[example] = (ahead - behind) / (2 * step)
        _, slope = _slope(problem, z, batch)
        return (slope.detach() * total * problem.count(batch)).to(u.dtype)


class SampledFisher:
    """(1/N S) sum_rows, over S draws, of s s', for batches (batch, noise).

    ``key`` tells the draws from others.
    """

    def __init__(self, key: str) -> None:
        self.name = f"monte-carlo-fisher {key}"

    def at(self, problem: AnyProblem, outputs: Tensor, batch: Batch) -> RowMap:
        known = distribution(problem, outputs, batch)
        _, noise = batch
        if noise.shape[:-1] != known.noise_shape(outputs):
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, and targets were drawn for rows of "
                f"shape {tuple(noise.shape[:-1])}; the examples must lie along the outputs' first "
                "axis"
            )
        return partial(known.sampled_product, outputs, noise)

    def moving(self, problem: Problem, outputs: Tensor, fixed: Tensor, batch: Batch) -> Tensor:
        return self.at(problem, fixed, batch)(outputs[None])[0]

    def reference(self, problem: Problem, outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
        """M u by the dense scores of one draw after the other."""
        known = distribution(problem, outputs, batch)
        draws = batch[1].unbind(-1)
        total = torch.zeros_like(u)
        for chosen in draws:
            score = known.score_of_draw(outputs, chosen)
            total = total + known.weights * rank_one(score, known.row_axes, u[None])[0]
        return total / len(draws)


Matrix = LossHessian | ExpectedFisher | EmpiricalFisher | SampledFisher


def _rank_one_mean(
    scores: Tensor,
    axes: tuple[int, ...],
    count: Tensor | float,
    rows: Tensor,
) -> Tensor:
    return rank_one(scores, axes, rows) / count


def _slope(problem: AnyProblem, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """z as a leaf, and the gradient of the loss in it with its graph."""
    z = outputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = problem.loss_of_outputs(z, batch)
        if not loss.requires_grad:
            return z, torch.zeros_like(outputs)
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    return z, slope


def _second_derivative(slope: Tensor, z: Tensor, rows: Tensor) -> Tensor:
    """d<slope, u>/dz for each row u."""
    grad: Grad = partial(torch.autograd.grad, [slope], [z], retain_graph=True, allow_unused=True)
    try:
        (product,) = derivatives_of_rows(grad, [rows])
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NotTwiceDifferentiable(
            "the loss cannot be differentiated twice in the model's outputs: "
            f"{first_line(error)}; write it in operations that can"
        ) from error
    return torch.zeros_like(rows) if product is None else product


def _step(outputs: Tensor, u: Tensor) -> float:
    return _STEP * (float(outputs.norm()) or 1.0) / (float(u.norm()) or 1.0)
