"""A quick verification: what finds a wrong gradient or product, for some 15 forward passes.

The full set (:func:`hessian_tools.curvature.verification.verify`) takes about 100, more than many a
run. Here the weights are moved once along a random vector v, forwards and back. What the loss does
there is held against the gradient, and what the gradient does against the product H v; a block's
products are held against symmetry. Only where that does not agree at once do the full set's
referees decide, which look for a step that tells kinks and rounding from mistakes.
"""

import torch
from torch import Tensor

from hessian_tools.blocks.presets import partition
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.referees import (
    at_one_step,
    float64_twin,
    norm,
    per_parameter,
    relative_difference,
)
from hessian_tools.curvature.verification import (
    COARSE,
    GRADIENT,
    ROUNDED,
    TOLERANCE,
    Check,
    Verification,
    against_referee,
    dot,
)


def verify_quickly(operator: CurvatureOperator, seed: int = 0) -> Verification:
    """Holds ``operator`` against one step of the weights, and a block to symmetry.

    Only of the Hessian one step says enough; others are held against their referees at once.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(operator.size, generator=generator).to(operator.device, operator.dtype)
    # before the first product, whose graphs need not be there meanwhile
    checks = _against_one_step(operator, v) if operator.matrix == "hessian" else []
    skipped: list[str] = []
    if not checks or not all(check.passed for check in checks):
        outcomes = against_referee(operator, v, operator @ v, seed)
        checks = [outcome for outcome in outcomes if isinstance(outcome, Check)]
        skipped = [outcome for outcome in outcomes if isinstance(outcome, str)]
    symmetry = _symmetry_of_a_block(operator, generator)
    return Verification((symmetry, *checks), tuple(skipped))


def _against_one_step(operator: CurvatureOperator, v: Tensor) -> list[Check]:
    """The gradient and the product along ``v``; nothing where that needs a search for a step."""
    problem = operator.problem
    twin = float64_twin(problem)
    if twin is None:
        return []
    try:
        seen = at_one_step(twin, per_parameter(problem, v))
        is_coarse = operator.arithmetic.name in COARSE
        judged = operator.rebuilt(twin) if is_coarse else operator
        product = judged @ v.to(judged.dtype)
    except (RuntimeError, ValueError, TypeError):  # the referees say what is wrong
        return []
    tolerance = TOLERANCE[judged.arithmetic.name]
    error = relative_difference(per_parameter(problem, product), seen.product)
    checks = [
        Check(GRADIENT, seen.slope_error, tolerance, seen.remark),
        Check(operator.referee, error, tolerance, f"float64 copy, {seen.remark}"),
    ]
    if is_coarse:
        rounding = relative_difference([operator @ v], [product])
        checks.append(Check(f"rounding of {operator.arithmetic.name}", rounding, ROUNDED))
    return checks


def _symmetry_of_a_block(operator: CurvatureOperator, generator: torch.Generator) -> Check:
    """<a, H b> against <b, H a> for two random vectors of the middle parameter tensor.

    Relative to the norm of H a: entries of a random b have variance 1, so that is the size of
    <b, H a>, and an asymmetry shows at its full relative size.
    """
    tensors = list(partition(operator.problem.model, "tensor"))
    block = tensors[len(tensors) // 2]
    drawn = torch.randn(2, block.numel, generator=generator)
    a, b = drawn.to(operator.device, operator.dtype)
    ha, hb = operator.block(block).matmat(torch.stack([a, b]))
    size = max(norm([ha]), norm([hb])) or 1.0
    error = float((dot(a, hb) - dot(b, ha)).abs()) / size
    tolerance = TOLERANCE[operator.arithmetic.name]
    return Check(f"symmetry of block {block.name}", error, tolerance)
