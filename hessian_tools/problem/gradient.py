"""The gradient of the mean loss."""

import torch
from torch import Tensor

from hessian_tools.problem.problem import Problem


def mean_gradient(problem: Problem) -> dict[str, Tensor]:
    """The gradient of L by parameter; zeros where the loss does not depend on one.

    Batches are weighted by their valid examples, see :mod:`hessian_tools.problem.problem`.
    """
    parameters = list(problem.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    for weight, batch in zip(problem.weights, problem.batches, strict=True):
        with problem.evaluating(), torch.enable_grad():
            loss = problem.batch_loss(batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for summed, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                summed.add_(gradient.detach(), alpha=weight)
    return dict(zip(problem.parameters, total, strict=True))
