"""The gradient of the mean loss, and that of one batch as an ordinary backward pass leaves it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hessian_tools.problem.batches import Batch
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.weights import follow


def mean_gradient(problem: Problem) -> dict[str, Tensor]:
    """The gradient of L by parameter; zeros where the loss does not depend on one.

    Batches are weighted by their valid examples, see :mod:`hessian_tools.problem.problem`. Raises
    ValueError where the model's parameters are not those of the Problem any more.
    """
    _, gradient = loss_and_gradient(problem)
    return gradient


def loss_and_gradient(problem: Problem) -> tuple[float, dict[str, Tensor]]:
    """L and its :func:`mean_gradient`, from one forward pass over each batch."""
    follow(problem)
    parameters = list(problem.parameters.values())
    value = 0.0
    total = [torch.zeros_like(p) for p in parameters]
    for weight, batch in zip(problem.weights, problem.batches, strict=True):
        with problem.evaluating(), torch.enable_grad():
            loss = problem.batch_loss(batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        value += weight * float(loss.detach())
        for summed, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                summed.add_(gradient.detach(), alpha=weight)
    return value, dict(zip(problem.parameters, total, strict=True))


def gradient_of_backward(problem: Problem, batch: Batch) -> dict[str, Tensor]:
    """What ``loss.backward()`` leaves in ``.grad`` for one batch; zeros where it leaves nothing.

    An optimizer takes this for the gradient. ``.grad`` is as before on return, and hooks that act
    on it (an optimizer's step in the backward pass, say) do not run.
    """
    with problem.evaluating(), torch.enable_grad():
        loss = problem.batch_loss(batch)
        leaves = {id(leaf): leaf for leaf in [*problem.model.parameters(), *_leaves(loss)]}
        with contextlib.ExitStack() as stack:
            for leaf in leaves.values():
                stack.enter_context(_without_gradient(leaf))
            loss.backward()
            return {
                name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
                for name, p in problem.parameters.items()
            }


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors in whose ``.grad`` the backward pass of ``loss`` accumulates."""
    seen = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            yield node.variable


@contextlib.contextmanager
def _without_gradient(leaf: Tensor) -> Iterator[None]:
    """``leaf`` without ``.grad`` and without hooks on it; both are put back."""
    gradient = leaf.grad
    hooks = leaf._post_accumulate_grad_hooks or {}  # a table that autograd holds as well
    kept = dict(hooks)
    leaf.grad = None
    hooks.clear()
    try:
        yield
    finally:
        leaf.grad = gradient
        hooks.update(kept)
