"""The referee: central finite differences of the float64 gradient, and errors against them.

It knows no second derivative, so it shares no fault with any contender. A difference quotient
across a kink of ReLU or max-pooling is wrong, so small steps come first; two neighbouring steps
that agree decide, and how well they agree is the referee's own uncertainty.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from contest.cases import Case, criterion

BOUNDS = {
    torch.float32: 1e-4,
    torch.float64: 1e-6,
}  # rounding is 1e-6 in float32; wrong mathematics 1e-3 and more
WHOLE, SMALL, BLOCK = "whole Hessian", "whole Hessian on norms and biases", "block "
OUTPUTS, OUTPUTS_SMALL, OUTPUTS_BLOCK = (
    f"Gauss-Newton: {key}" for key in ("whole", "whole on norms and biases", "block ")
)
_OF_OUTPUTS = {WHOLE: OUTPUTS, SMALL: OUTPUTS_SMALL}
STEPS = (
    1e-6,
    1e-7,
    1e-8,
    1e-9,
    1e-4,
    1e-3,
)  # relative to the norm of the parameters, in the order tried
AGREED = 1e-6
NUM_BLOCKS = 3  # blocks checked: the first, the middle and the last of those that are multiplied


def directions(case: Case, count: int) -> Tensor:
    """(count, P) standard normal, the same in every process and on every device."""
    generator = torch.Generator().manual_seed(1)
    size = sum(parameter.numel() for parameter in case.model.parameters())
    rows = [
        torch.randn(size, generator=generator) for _ in range(count)
    ]  # a row does not depend on their number
    return torch.stack(rows).to(case.device, case.dtype)


def whole_directions(case: Case) -> Tensor:
    """(2, P): the vectors of WHOLE and SMALL."""
    parameters = case.model.parameters()
    small = torch.cat(
        [
            torch.full((p.numel(),), p.ndim < 2, dtype=case.dtype, device=p.device)
            for p in parameters
        ]
    )
    (vector,) = directions(case, 1)
    return torch.stack([vector, vector * small])


def block_directions(case: Case) -> dict[str, Tensor]:
    """A vector of the parameter's shape for every weight matrix of jobs b and d."""
    generator = torch.Generator().manual_seed(2)
    parameters = case.parameters
    return {
        n: torch.randn(parameters[n].shape, generator=generator).to(case.device, case.dtype)
        for n in case.weights
    }


def checked_blocks(case: Case) -> list[str]:
    """The blocks that the referee looks at."""
    names = list(case.weights)
    return list(
        dict.fromkeys(
            names[round(i * (len(names) - 1) / (NUM_BLOCKS - 1))] for i in range(NUM_BLOCKS)
        )
    )


def reference(case: Case) -> tuple[dict[str, Tensor], float]:
    """Flat float32 products, and the worst uncertainty: WHOLE and SMALL, (P,), and BLOCK + name,
    (n,).

    WHOLE multiplies a random vector, SMALL one that is zero but for norms and biases, whose faults
    the many entries of the matrices would drown. The loss is the mean over all targets that count,
    whatever the batches.
    """
    model = copy.deepcopy(case.model).double()
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in case.batches]
    parameters = dict(model.named_parameters())
    products, worst = {}, 0.0
    for key, direction in _checks(case, parameters):
        product, uncertainty = _difference(model, batches, parameters, direction)
        worst = max(worst, uncertainty)
        products[key] = torch.cat([product[name].flatten() for name in direction]).float()
        key = _OF_OUTPUTS.get(key) or key.replace(BLOCK, OUTPUTS_BLOCK, 1)
        product, uncertainty = _through_outputs(model, batches, parameters, direction)
        worst = max(worst, uncertainty)
        products[key] = torch.cat([product[name].flatten() for name in direction]).float()
    return products, worst


def _checks(
    case: Case, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names and float64 directions, one at a time: each may be as large as the model."""
    for key, vector in zip((WHOLE, SMALL), whole_directions(case), strict=True):
        pieces = vector.double().split([p.numel() for p in parameters.values()])
        yield (
            key,
            {
                name: piece.view_as(p)
                for (name, p), piece in zip(parameters.items(), pieces, strict=True)
            },
        )
    blocks = block_directions(case)
    for name in checked_blocks(case):
        yield BLOCK + name, {name: blocks[name].double()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN where anything is."""
    expected = expected.double().flatten()
    return float((found.detach().double().flatten() - expected).norm() / expected.norm())


Quotient = Callable[[float], dict[str, Tensor]]  # of a step


def _difference(
    model: nn.Module,
    batches: Sequence,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """H v by differences of the gradient."""

    def quotient(step: float) -> dict[str, Tensor]:
        ahead, behind = (
            _gradient(model, batches, parameters, direction, sign * step) for sign in (1, -1)
        )
        return {name: ahead[name].sub_(behind[name]).div_(2 * step) for name in direction}

    return _at_the_best_step(parameters, direction, quotient)


def _through_outputs(
    model: nn.Module,
    batches: Sequence,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """J' M J v: differences of the logits, the closed form of M, and a backward pass."""
    total = sum(int((y != -100).sum()) for _, y in batches)

    def quotient(step: float) -> dict[str, Tensor]:
        product = {name: torch.zeros_like(parameters[name]) for name in direction}
        for x, y in batches:
            with _moved(parameters, direction, step), torch.no_grad():
                ahead = _logits(model, x)
            with _moved(parameters, direction, -step), torch.no_grad():
                behind = _logits(model, x)
            logits = _logits(model, x)
            p = logits.detach().softmax(-1)
            scaled = p * (ahead - behind) / (2 * step)
            cotangent = (scaled - p * scaled.sum(-1, keepdim=True)) / total
            cotangent = cotangent * (y.flatten() != -100)[:, None]
            chosen = [parameters[name] for name in direction]
            gradients = torch.autograd.grad(logits, chosen, cotangent)
            for name, gradient in zip(direction, gradients, strict=True):
                product[name].add_(gradient)
        return product

    return _at_the_best_step(parameters, direction, quotient)


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """(targets, C)."""
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs).flatten(0, -2)


@contextlib.contextmanager
def _moved(
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    step: float,
) -> Iterator[None]:
    """Within it the parameters are moved by ``step`` times the direction."""
    kept = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, vector in direction.items():
            parameters[name].add_(vector, alpha=step)
    yield
    with torch.no_grad():
        for name, value in kept.items():
            parameters[name].copy_(value)


def _at_the_best_step(
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    quotient: Quotient,
) -> tuple[dict[str, Tensor], float]:
    scale = math.hypot(*(float(p.detach().norm()) for p in parameters.values()))
    length = math.hypot(*(float(d.norm()) for d in direction.values()))
    best: tuple[dict[str, Tensor], float] = ({}, math.inf)
    previous: dict[str, Tensor] = {}
    for relative_step in STEPS:
        step = relative_step * scale / length
        product = quotient(step)
        if previous:
            gap = math.hypot(*(float((product[n] - previous[n]).norm()) for n in product))
            uncertainty = gap / max(
                math.hypot(*(float(t.norm()) for t in product.values())), 1e-300
            )
            if uncertainty < best[1]:
                best = product, uncertainty
        if best[1] < AGREED:
            break
        previous = product
    return best


def _gradient(
    model: nn.Module,
    batches: Sequence,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    step: float,
) -> dict[str, Tensor]:
    """Of the pooled mean loss, at parameters + step * direction."""
    counts = [int((y != -100).sum()) for _, y in batches]
    total = {name: torch.zeros_like(parameters[name]) for name in direction}
    for (x, y), count in zip(batches, counts, strict=True):
        with _moved(parameters, direction, step), sdpa_kernel(SDPBackend.MATH):
            loss = criterion(model(x), y)
            gradients = torch.autograd.grad(loss, [parameters[name] for name in direction])
        for name, gradient in zip(direction, gradients, strict=True):
            total[name].add_(gradient, alpha=count / sum(counts))
    return total
