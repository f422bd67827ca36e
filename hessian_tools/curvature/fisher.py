"""Fisher matrices: exact, from drawn targets (Monte Carlo), and empirical.

All are J' M J, with M as in :mod:`hessian_tools.curvature.outputs.matrices`, normalised like the
mean loss: (1/N) times a sum over the N valid examples (tokens, for language models).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.curvature.engine_operator import EngineOperator, check_problem
from hessian_tools.curvature.gauss_newton import ThroughOutputsOperator
from hessian_tools.curvature.outputs.distributions import ClassLoss, distribution
from hessian_tools.curvature.outputs.matrices import EmpiricalFisher, ExpectedFisher, SampledFisher
from hessian_tools.curvature.referees import Reference, outputs_difference
from hessian_tools.problem.batches import Batch, batch_length
from hessian_tools.problem.problem import Problem


class FisherOperator(ThroughOutputsOperator):
    """The (P, P) Fisher matrix (1/N) sum_n E[g_n g_n'], the expectation over the model's targets.

    g_n is the gradient of -log p(y | x_n) with a target y that the model itself draws, taken
    exactly: for ht.cross_entropy and ht.huggingface over classes, for ht.mse over a Gaussian of
    variance 1/2. Targets in the data count only in being valid or not.

    It equals the Gauss-Newton matrix for these losses, always, as their Hessian in the outputs does
    not depend on targets (Martens 2020, section 9.2). Arguments are those of
    :class:`hessian_tools.HessianOperator`.

    Raises:
        ValueError: besides those of GaussNewtonOperator: a loss that does not say from which
            distribution targets are.
    """

    matrix = "fisher"
    title = "Fisher matrix"
    between_outputs = ExpectedFisher()

    def __init__(self, problem: Problem, **options: Any) -> None:  # of ThroughOutputsOperator
        check_problem(problem)
        _check_distribution(problem)
        super().__init__(problem, **options)


class EmpiricalFisherOperator(ThroughOutputsOperator):
    """The (P, P) empirical Fisher matrix (1/N) sum_n g_n g_n', with the targets in the data.

    g_n is the gradient of one valid example's loss: of a token for language models, of a pixel
    where every pixel has a class; of an example along the outputs' first axis for ht.mse and for a
    loss of the user's, which must then be a mean over those. For ht.mse, whose N counts entries,
    that makes it (1/N) sum over examples.

    It is neither the Fisher nor the Gauss-Newton matrix. It equals them on average where targets
    are drawn from the model, and nearly where a well-specified model is trained on much data
    (Kunstner, Hennig & Balles 2019). Where outputs of one example depend on others (batch
    statistics) g_n is how the mean loss changes by that example's outputs alone. Arguments are
    those of :class:`hessian_tools.HessianOperator`, errors those of GaussNewtonOperator.
    """

    matrix = "empirical-fisher"
    title = "empirical Fisher matrix"
    between_outputs = EmpiricalFisher()


class MonteCarloFisherOperator(ThroughOutputsOperator):
    """The (P, P) Fisher matrix with its expectation replaced by a mean over drawn targets.

    (1/(N S)) sum_n sum_s g_ns g_ns', S = ``num_samples`` targets a row, drawn once: the same
    matrix in every product, from random numbers fixed by ``seed``; the targets follow the weights.
    Its mean over seeds is :class:`FisherOperator`, which costs no more; it is here to be compared
    with methods that draw. :meth:`with_error` tells how far a product may be from the exact one.

    Args:
        num_samples: S.
        seed: of the draws.
        options: those of :class:`hessian_tools.HessianOperator`.
    Raises:
        ValueError: as FisherOperator, and for ``num_samples`` below 1.
    """

    matrix = "monte-carlo-fisher"
    title = "Monte Carlo Fisher matrix"

    def __init__(
        self,
        problem: Problem,
        *,
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,  # of ThroughOutputsOperator
    ) -> None:
        if int(num_samples) != num_samples or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}; a whole number from 1 is needed")
        check_problem(problem)
        _check_distribution(problem)
        self.num_samples = num_samples
        self.seed = seed
        self.between_outputs = SampledFisher(f"{seed} {num_samples}")
        self._drawn = _with_noise(problem, seed, num_samples)
        super().__init__(problem, computed=self._drawn, **options)

    def with_error(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The product with ``vector`` (P,), and the standard error of each of its entries, (P,).

        The error is that of a mean of S draws, from S products with one draw each; it costs S times
        a product and its recording. Raises ValueError for fewer than 2 samples.
        """
        if self.num_samples < 2:
            raise ValueError("an error needs num_samples of at least 2; it is 1")
        mean = torch.zeros_like(vector)
        squares = torch.zeros_like(vector)
        for index in range(self.num_samples):
            product = self._of_one_draw(index) @ vector
            deviation = product - mean
            mean = mean + deviation / (index + 1)
            squares = squares + deviation * (product - mean)
        variance = squares / (self.num_samples - 1)
        return mean, (variance / self.num_samples).sqrt()

    @property
    def signature(self) -> str:
        return f"{self.title}, {self.num_samples} draws, seed {self.seed}"

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        drawn = _with_noise(problem, self.seed, self.num_samples)
        return outputs_difference(drawn, direction, self.between_outputs.reference)

    def _like(self, problem: Problem, **options: Any) -> EngineOperator:
        samples = self.num_samples
        return MonteCarloFisherOperator(problem, num_samples=samples, seed=self.seed, **options)

    def _of_one_draw(self, index: int) -> ThroughOutputsOperator:
        chosen = slice(index, index + 1)
        return _OneDraw(self.problem, _noise_changed(self._drawn, lambda noise: noise[..., chosen]))


class _OneDraw(ThroughOutputsOperator):
    """One of the draws of a MonteCarloFisherOperator."""

    between_outputs = SampledFisher("one")

    def __init__(self, problem: Problem, drawn: Problem) -> None:
        super().__init__(problem, computed=drawn, record=False, route="double backward")


# ------------------------------------------------------------------------- draws kept with batches


@dataclass(frozen=True)
class _WithNoise:
    """A loss in two steps for batches (batch, noise), which reads the batch alone."""

    inner: ClassLoss  # what a Gaussian one lacks is not asked of it

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.inner(model, batch[0])

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.inner.outputs(model, batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.inner.loss(outputs, batch[0])

    def likelihood(self, batch: Batch) -> str:
        return self.inner.likelihood(batch[0])

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        return self.inner.targets(batch[0], outputs)

    @property
    def ignore_index(self) -> int:
        return self.inner.ignore_index

    def axis_of_classes(self, outputs: Tensor, batch: Batch) -> int:
        return self.inner.axis_of_classes(outputs, batch[0])


def _with_noise(problem: Problem, seed: int, num_samples: int) -> Problem:
    """The same Problem with the random numbers that targets are drawn with beside every batch."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    noisy: list[Batch] = []
    for batch in problem.batches:
        with problem.evaluating():
            outputs = problem.outputs_value(batch)
        known = distribution(problem, outputs, batch)
        shape = (*known.noise_shape(outputs), num_samples)
        noisy.append((batch, known.noise(shape, generator).to(problem.device, wide)))
    return _of_noisy_batches(problem, noisy)


def _of_noisy_batches(problem: Problem, noisy: list[Batch]) -> Problem:
    drawn = copy.copy(problem)
    drawn.loss_fn = _WithNoise(problem.loss_fn)  # type: ignore[arg-type]  # checked to be in steps
    drawn.num_examples = lambda batch: problem.count(batch[0])
    drawn.batches = noisy
    _, noise = noisy[0]
    length = batch_length(problem.batches[0])
    samples = [(n, (sample, noise[:n])) for n, sample in problem.samples]
    is_cut = samples[-1][0] != length
    # rows that are not the examples cannot be cut along with them
    drawn.samples = [(length or 1, noisy[0])] if is_cut and len(noise) != length else samples
    return drawn


def _noise_changed(drawn: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    changed = copy.copy(drawn)
    changed.batches = [(batch, change(noise)) for batch, noise in drawn.batches]
    changed.samples = [(n, (batch, change(noise))) for n, (batch, noise) in drawn.samples]
    return changed


def _check_distribution(problem: Problem) -> None:
    """What the loss does not say is said before anything is planned or traced."""
    _, batch = problem.samples[0]
    with problem.evaluating():
        distribution(problem, problem.outputs_value(batch), batch)
