"""Referees: products computed without any of the engine's second-order code, to hold it against.

For the Hessian, a central difference of the gradient,
    H v ~ (g(w + t v) - g(w - t v)) / 2t,
and for the gradient itself, which that takes from autograd, one of the loss,
    <g, v> ~ (L(w + t v) - L(w - t v)) / 2t,
each at the step t that agrees best with its neighbour. How well they agree is its uncertainty.

Letters: P parameters.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.curvature.engine.precision import dtype_inside
from hessian_tools.problem.batches import Batch, to_device
from hessian_tools.problem.gradient import loss_and_gradient, mean_gradient
from hessian_tools.problem.problem import Problem

# Relative to the norm of the parameters, in the order tried: tiny steps first, for with 1e6
# activations a step above 1e-7 crosses kinks of ReLU and max-pooling; larger ones for models that
# compute in float32 inside.
STEPS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-4, 1e-3, 1e-2)
AGREED = 1e-6  # two steps that agree so well settle it


@dataclass(frozen=True)
class Reference:
    """What a referee says a product is."""

    product: list[Tensor]  # by parameter, of the parameters' shapes
    uncertainty: float  # relative to the product's norm
    remark: str  # how it was made


def finite_difference(problem: Problem, direction: Sequence[Tensor]) -> Reference:
    """H v for the Hessian of the mean loss, by central differences of the gradient.

    ``direction`` holds v as a tensor for each parameter. The parameters are as before on return.
    """

    def difference(step: float) -> tuple[list[Tensor], float]:
        with _moved(problem, direction, step):
            ahead = list(mean_gradient(problem).values())
        size = norm(ahead)
        with _moved(problem, direction, -step):
            behind = list(mean_gradient(problem).values())
        return [a.sub_(b).div_(2 * step) for a, b in zip(ahead, behind, strict=True)], size

    return _at_the_best_step(problem, norm(direction), difference)


# M u between the outputs of a batch: problem, outputs, batch, u
Middle = Callable[[Problem, Tensor, Batch, Tensor], Tensor]


def outputs_difference(
    problem: Problem,
    direction: Sequence[Tensor],
    middle: Middle,
) -> Reference:
    """J' M J v, J v by central differences of the outputs z and J' u by one backward pass,

        J v ~ (z(w + t v) - z(w - t v)) / 2t.

    ``middle`` gives M u. The parameters are as before on return.
    """

    def difference(step: float) -> tuple[list[Tensor], float]:
        with _moved(problem, direction, step):
            ahead = _outputs(problem)
        with _moved(problem, direction, -step):
            behind = _outputs(problem)
        moved = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        product = _pulled_back(problem, middle, moved)
        # what rounding of the outputs becomes is no larger than what becomes of them
        size = norm(_pulled_back(problem, middle, ahead))
        return product, size

    return _at_the_best_step(problem, norm(direction), difference)


def _outputs(problem: Problem) -> list[Tensor]:
    """z of every batch."""
    with problem.evaluating():
        return [problem.outputs_value(batch).clone() for batch in problem.batches]


def _pulled_back(problem: Problem, middle: Middle, vectors: Sequence[Tensor]) -> list[Tensor]:
    """The weighted sum over batches of J' M u, u the batch's of ``vectors``."""
    parameters = list(problem.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    for weight, batch, u in zip(problem.weights, problem.batches, vectors, strict=True):
        with problem.evaluating(), torch.enable_grad():
            z = problem.batch_outputs(batch)
            cotangent = middle(problem, z.detach(), batch, u)
            found = torch.autograd.grad(z, parameters, cotangent, allow_unused=True)
        for summed, gradient in zip(total, found, strict=True):
            if gradient is not None:
                summed.add_(gradient, alpha=weight)
    return total


def slopes(problem: Problem, directions: Sequence[Sequence[Tensor]]) -> Reference:
    """<g, v> for each direction v, g the gradient of the mean loss: differences of the loss alone.

    ``product`` holds them in one float64 tensor, (directions,). The parameters are as before on
    return.
    """

    size = abs(problem.loss) * len(directions) ** 0.5

    def difference(step: float) -> tuple[list[Tensor], float]:
        rises = [_rise(problem, direction, step) for direction in directions]
        return [torch.tensor(rises, dtype=torch.float64)], size

    return _at_the_best_step(problem, norm(directions[0]), difference)


def _rise(problem: Problem, direction: Sequence[Tensor], step: float) -> float:
    """(L(w + t v) - L(w - t v)) / 2t at the step t."""
    with _moved(problem, direction, step):
        ahead = mean_loss(problem)
    with _moved(problem, direction, -step):
        behind = mean_loss(problem)
    return (ahead - behind) / (2 * step)


@dataclass(frozen=True)
class Step:
    """What loss and gradient do between w - t v and w + t v."""

    product: list[Tensor]  # H v, by parameter
    slope_error: float  # of <g, v> by the gradient against that by the loss, relative
    remark: str


def at_one_step(problem: Problem, direction: Sequence[Tensor]) -> Step:
    """H v and <g, v> from the two points of the first of :data:`STEPS`, which cost 6 passes.

    Without another step to compare, it is good for agreement only. The parameters are as before on
    return.
    """
    relative_step = STEPS[0]
    step = relative_step * _scale(problem) / norm(direction)
    with _moved(problem, direction, step):
        loss_ahead, ahead = loss_and_gradient(problem)
    with _moved(problem, direction, -step):
        loss_behind, behind = loss_and_gradient(problem)
    pairs = list(zip(ahead.values(), behind.values(), direction, strict=True))
    slopes_seen = [((a + b).flatten().double() @ d.flatten().double()) / 2 for a, b, d in pairs]
    by_gradient = torch.stack(slopes_seen).sum()[None].cpu()
    by_loss = torch.tensor([(loss_ahead - loss_behind) / (2 * step)], dtype=torch.float64)
    return Step(
        product=[(a - b) / (2 * step) for a, b, _ in pairs],
        slope_error=relative_difference([by_gradient], [by_loss]),
        remark=f"step {relative_step:.0e}",
    )


def mean_loss(problem: Problem) -> float:
    """L at the present weights."""
    total = 0.0
    for weight, batch in zip(problem.weights, problem.batches, strict=True):
        with problem.evaluating():
            total += weight * problem.batch_value(batch)
    return total


def _at_the_best_step(
    problem: Problem,
    length: float,
    difference: Callable[[float], tuple[list[Tensor], float]],
) -> Reference:
    """``difference(t)`` along a vector of this ``length``, at the step that agrees best.

    With each difference comes the norm of what is subtracted. Its rounding, in the dtype in which
    the loss computes, is the least error: values that are equal by rounding agree perfectly.
    """
    eps = torch.finfo(dtype_inside(problem) or problem.dtype).eps
    scale = _scale(problem)
    best = Reference([], float("inf"), "")
    previous: list[Tensor] = []
    for relative_step in STEPS:
        step = relative_step * scale / length
        product, size = difference(step)
        if previous:
            rounding = eps * size / step / (norm(product) or math.ulp(0.0))
            agreement = max(relative_difference(previous, product), rounding)
            if agreement < best.uncertainty:
                remark = f"step {relative_step:.0e}, its own uncertainty {agreement:.0e}"
                best = Reference(product, agreement, remark)
        if best.uncertainty < AGREED:
            break
        previous = product
    return best


def _scale(problem: Problem) -> float:
    """The norm of the parameters, which steps are relative to."""
    return norm([p.detach() for p in problem.parameters.values()]) or 1.0


def float64_twin(problem: Problem) -> Problem | None:
    """A float64 copy that has not been checked as a new Problem is, which costs 5 passes or more.

    So it may fail where it is evaluated. None where none can be made.
    """
    # what float64_copy shares is shared here as well; batches are cast below
    kept: dict[int, object] = {id(problem.batches): [], id(problem.samples): []}
    kept |= {id(function): function for function in (problem.loss_fn, problem.num_examples)}
    double = torch.float64
    try:
        twin = copy.deepcopy(problem, kept)
        twin.model.to(double)
        twin.batches = [to_device(batch, problem.device, double) for batch in problem.batches]
        twin.samples = [(n, to_device(b, problem.device, double)) for n, b in problem.samples]
    except (RuntimeError, ValueError, TypeError):
        return None
    named = twin.model.named_parameters()
    twin.parameters = {name: p for name, p in named if p.requires_grad}
    twin.dtype = double
    return twin


def float64_copy(problem: Problem) -> Problem | None:
    """A copy of the problem, model and data, in float64; None where none can be made."""
    try:
        return Problem(
            copy.deepcopy(problem.model).to(torch.float64),
            problem.loss_fn,
            [to_device(batch, problem.device, torch.float64) for batch in problem.batches],
            batch_stats=problem.batch_stats,
            num_examples=problem.num_examples,
        )
    except (RuntimeError, ValueError, TypeError):  # not every model can be copied or take float64
        return None


def per_parameter(problem: Problem, flat: Tensor) -> list[Tensor]:
    """The pieces of ``flat`` (P,), in the parameters' shapes; views."""
    parameters = list(problem.parameters.values())
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def norm(pieces: Sequence[Tensor]) -> float:
    """Euclidean norm of all pieces together."""
    # summed in float64: over 1e8 entries float32 loses two digits
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    return math.hypot(*map(float, norms))


def relative_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| over the larger of |a| and |b|; 0 where both vanish."""
    larger = max(norm(a), norm(b))
    if not larger:
        return 0.0
    return norm([x.to(y.dtype) - y for x, y in zip(a, b, strict=True)]) / larger


@contextlib.contextmanager
def _moved(problem: Problem, direction: Sequence[Tensor], step: float) -> Iterator[None]:
    """Within it the weights are w + ``step`` v."""
    parameters = list(problem.parameters.values())
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d.to(p.dtype), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
