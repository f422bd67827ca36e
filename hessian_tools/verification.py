"""Verification of a Hessian operator against referees that share none of its second-order code.

Incumbent tools are silently wrong on ordinary models (affine LayerNorm through forward-over-reverse, unweighted
batches), so every operator here can be held, on the user's own model, against a finite difference of the gradient and
against the properties that a Hessian has.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessian_tools.partition import Block, partition
from hessian_tools.problem import Problem, batch_length, to_device

if TYPE_CHECKING:
    from hessian_tools.hessian import HessianOperator

# Wrong mathematics shows as 1e-2 and more, rounding far below these; models that cast to float32 inside limit float64.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
# Steps of the finite difference, relative to the norm of the parameters. Large ones for models that compute in float32
# inside, tiny ones for ReLU and max-pooling: with 1e6 activations a step above 1e-7 crosses kinks and measures those.
STEPS = (1e-2, 1e-3, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9)
CONCLUSIVE = 0.05  # a referee whose own uncertainty is larger decides nothing


@dataclass(frozen=True)
class Check:
    """One comparison: ``error`` is relative (norm of the difference over norm of the product)."""

    name: str
    error: float
    tolerance: float
    remark: str = ""  # how the referee was made

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verdict, remark = "ok    " if self.passed else "FAILED", f"; {self.remark}" if self.remark else ""
        return f"{verdict} {self.name}: relative error {self.error:.1e} (allowed {self.tolerance:.1e}){remark}"


@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`: ``checks`` in the order made, ``skipped`` with the reason, ``passed`` when all did."""

    checks: tuple[Check, ...]
    skipped: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), *(f"skip   {reason}" for reason in self.skipped)])


def verify(hessian: "HessianOperator", blocks: Sequence[Block] = (), *, seed: int = 0) -> Verification:
    """Holds ``hessian`` against a finite difference of the gradient, symmetry, linearity, its blocks, and cut batches.

    Args:
        hessian: a HessianOperator.
        blocks: blocks to compare with slices of the full Hessian; default the first, middle and last parameter tensor.
        seed: of the random directions.
    Returns:
        a Verification: it says which check failed and by how much. The finite difference is central, in a float64 copy
        of model and data where one can be made, at the step that agrees best with its neighbour; how well is its
        uncertainty.
    """
    problem = hessian.problem
    tolerance = TOLERANCE.get(problem.dtype, 0.1)
    generator = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, hessian.size, generator=generator, dtype=torch.float64).to(hessian.device, hessian.dtype)
    hv, hw = hessian.matmat(torch.stack([v, w]))
    # against u = Hv / |Hv| an asymmetry shows at its full relative size; against a random u it would be 1/sqrt(P) of it
    u = hv / hv.norm().clamp_min(torch.finfo(hv.dtype).tiny)
    hu, combination = hessian.matmat(torch.stack([u, 2 * v - 3 * w]))
    checks = [
        Check("symmetry", _relative((u @ hv)[None], (v @ hu)[None]), tolerance),
        Check("linearity", _relative(combination, 2 * hv - 3 * hw), tolerance),
    ]
    skipped = []
    for block in blocks or _three(list(partition(problem.model, "tensor"))):
        checks.append(_block_check(hessian, block, v, tolerance))
    length = max(batch_length(batch) or 1 for batch in problem.batches)
    if problem.batch_stats or length < 2:
        skipped.append(
            f"cut batches: {'batch statistics' if problem.batch_stats else 'batches of one example'} cannot be cut"
        )
    else:
        cut = type(hessian)(problem, microbatch=(length + 1) // 2, record=False)
        checks.append(Check("cut batches", _relative(cut @ v, hv), tolerance))
    try:
        difference, uncertainty, remark = _finite_difference(problem, v)
        if uncertainty < CONCLUSIVE:
            error = _relative(hv, difference)
            checks.append(Check("finite difference of the gradient", error, max(tolerance, 5 * uncertainty), remark))
        else:
            skipped.append(
                f"finite difference of the gradient: inconclusive, its own uncertainty is {uncertainty:.0e} (kinks?)"
            )
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ) as error:  # a referee that cannot stand up is no verdict on the operator
        skipped.append(f"finite difference: {type(error).__name__}: {str(error).splitlines()[0]}")
    return Verification(tuple(checks), tuple(skipped))


def _block_check(hessian: "HessianOperator", block: Block, v: Tensor, tolerance: float) -> Check:
    vector = v[: block.numel]
    full = {name: p.new_zeros((1, *p.shape), dtype=v.dtype) for name, p in hessian.problem.parameters.items()}
    cut = block.as_cut()
    for part, piece in zip(cut.parts, vector.split([p.block_size for p in cut.parts]), strict=True):
        part.place(piece[None, None], full[part.parameter])
    product = hessian @ torch.cat([t.flatten() for t in full.values()])
    sizes = [p.numel() for p in hessian.problem.parameters.values()]
    shaped = {
        n: t.view(p.shape) for (n, p), t in zip(hessian.problem.parameters.items(), product.split(sizes), strict=True)
    }
    return Check(f"block {block.name}", _relative(hessian.block(block) @ vector, cut.rows(shaped).flatten()), tolerance)


def _finite_difference(problem: Problem, v: Tensor) -> tuple[Tensor, float, str]:
    """(H v, relative uncertainty, remark) by central differences of the gradient."""
    try:
        doubled = copy.deepcopy(problem.model).to(torch.float64)
        batches = [to_device(batch, problem.device, torch.float64) for batch in problem.batches]
        referee = Problem(
            doubled, problem.loss_fn, batches, batch_stats=problem.batch_stats, num_examples=problem.num_examples
        )
        remark = "float64 copy"
    except (RuntimeError, ValueError, TypeError):  # not every model can be copied or take float64
        referee, remark = problem, f"in {str(problem.dtype).removeprefix('torch.')}: no float64 copy could be made"
    parameters = list(referee.parameters.values())
    direction = [
        piece.view(p.shape).to(p.dtype)
        for p, piece in zip(parameters, v.split([p.numel() for p in parameters]), strict=True)
    ]
    scale = float(torch.sqrt(sum((p.detach().double() ** 2).sum() for p in parameters))) or 1.0  # type: ignore[arg-type]
    products = []
    for relative_step in STEPS:
        step = relative_step * scale / float(v.norm())
        difference = _shifted_gradient(referee, direction, step) - _shifted_gradient(referee, direction, -step)
        products.append(difference / (2 * step))
    agreement = [_relative(a, b) for a, b in itertools.pairwise(products)]
    best = min(range(len(agreement)), key=agreement.__getitem__)
    return (
        products[best + 1].to(v.dtype),
        agreement[best],
        f"{remark}, step {STEPS[best + 1]:.0e}, its own uncertainty {agreement[best]:.0e}",
    )


def _shifted_gradient(problem: Problem, direction: list[Tensor], step: float) -> Tensor:
    parameters = list(problem.parameters.values())
    kept = [p.detach().clone() for p in parameters]
    total = torch.zeros(problem.num_parameters, dtype=torch.float64, device=problem.device)
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
        for weight, batch in zip(problem.weights, problem.batches, strict=True):
            with problem.evaluating(), torch.enable_grad():
                gradients = torch.autograd.grad(problem.batch_loss(batch), parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            total += weight * torch.cat([g.flatten().double() for g in flat])
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    return total


def _three(blocks: list[Block]) -> list[Block]:
    return list({b.name: b for b in (blocks[0], blocks[len(blocks) // 2], blocks[-1])}.values())


def _relative(a: Tensor, b: Tensor) -> float:
    norm = float(torch.maximum(a.norm().double(), b.norm().double()))
    return float((a.double() - b.double()).norm()) / norm if norm else 0.0
