"""Custom autograd Functions that second derivatives cannot see through, refused by name."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.curvature.segments import segment
from hessian_tools.errors import NotTwiceDifferentiable
from hessian_tools.problem.gradient import gradient_of_backward
from hessian_tools.problem.problem import Problem


def refuse_once_differentiable(loss: Tensor) -> None:
    """Refuses custom Functions that autograd would silently leave out of the second pass.

    Raises:
        NotTwiceDifferentiable: naming the first of them.
    """
    for function in _custom_functions([loss]):
        if _is_once_differentiable(function):
            reason = f"the backward of {function.__name__} is once_differentiable"
            raise refusal(reason, [])


def refuse_unlike_backward(problem: Problem) -> bool:
    """Refuses custom Functions that run a backward pass of their own (reentrant checkpointing).

    Their parameters get a gradient in ``.grad``, but ``autograd.grad`` does not see them, so that
    their curvature would silently be zero. Returns whether there are custom Functions at all.

    Raises:
        NotTwiceDifferentiable: naming the Functions and a parameter whose gradients differ.
    """
    _, batch = problem.samples[0]
    parameters = list(problem.parameters.values())
    with problem.evaluating(), torch.enable_grad():
        loss = problem.batch_loss(batch)
        functions = _custom_functions([loss])
        if not functions:
            return False  # torch's own operations have no such thing
        named = ", ".join(function.__name__ for function in functions)
        advice = "checkpoint with use_reentrant=False, or not at all, for the curvature"
        try:
            seen = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise NotTwiceDifferentiable(
                f"torch.autograd.grad cannot differentiate the loss: {first_line(error)}; it uses "
                f"the custom autograd Function(s) {named}: where one of them checkpoints, {advice}"
            ) from error
    left = gradient_of_backward(problem, batch)
    allowed = torch.finfo(problem.dtype).eps ** 0.5
    for (name, ordinary), gradient in zip(left.items(), seen, strict=True):
        if (ordinary - gradient).norm() > allowed * ordinary.norm():
            raise NotTwiceDifferentiable(
                f"loss.backward() and torch.autograd.grad give different gradients for {name}: the "
                f"custom autograd Function(s) {named} run a backward pass of their own, as "
                f"reentrant checkpointing does, and second derivatives cannot see it; {advice}"
            )
    return True


def _custom_functions(outputs: Sequence[Tensor]) -> list[type[torch.autograd.Function]]:
    """The Python autograd Functions in the graph behind ``outputs``, by name.

    Those of segments are left out.
    """
    nodes = nodes_behind(outputs)
    kinds = {
        type(node) for node in nodes if isinstance(node, torch.autograd.function.BackwardCFunction)
    }
    functions = {kind._forward_cls for kind in kinds}  # type: ignore[attr-defined]
    foreign = [f for f in functions if f.__module__ != segment.__name__]
    return sorted(foreign, key=lambda function: function.__name__)


def nodes_behind(outputs: Sequence[Tensor]) -> set[Node]:
    """The graph behind ``outputs``."""
    seen: set[Node] = set()
    stack = [tensor.grad_fn for tensor in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def _is_once_differentiable(function: type[torch.autograd.Function]) -> bool:
    code = getattr(function.backward, "__code__", None)
    # Torch's decorator wraps the method in a function of torch's own file.
    return code is not None and code.co_filename == torch.autograd.function.__file__


def refusal(reason: str, outputs: Sequence[Tensor]) -> NotTwiceDifferentiable:
    names = ", ".join(function.__name__ for function in _custom_functions(outputs))
    culprits = f"; it uses the custom autograd Function(s) {names}" if names else ""
    return NotTwiceDifferentiable(
        f"the model cannot be differentiated twice: {reason}{culprits}; replace that operation by "
        "one whose backward is itself made of differentiable operations"
    )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
