"""Verification of a curvature operator against referees that share none of its second-order code.

Other tools are silently wrong on ordinary models (affine LayerNorm through forward-over-reverse,
batches that are not weighted), so every operator here can be held, on the user's own model, against
a referee of its own (:mod:`hessian_tools.curvature.referees`) and against the properties that a
symmetric matrix of a mean loss has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.blocks.presets import partition
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.referees import (
    Reference,
    float64_copy,
    norm,
    per_parameter,
    relative_difference,
    slopes,
)
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered

# By arithmetic. Wrong mathematics shows as 1e-2 and more, and rounding of the first two lies far
# below these; models that cast to float32 inside limit float64. The others are coarse: about 20
# roundings, and 12 of bfloat16.
TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 0.1}
COARSE = ("tf32", "float16", "bfloat16")
# What rounding may do where its size does not tell it from mathematics: a rounded forward pass
# takes the other side of some kinks of ReLU and max-pooling, which changes a product by a quarter
# and its spectrum by a few percent (experiments/precision.py). The mathematics is then held against
# the referee in float64.
ROUNDED = 0.5
FULL_PASSES = 100  # forward passes that the full set takes, about
CONCLUSIVE = 0.05  # a referee whose own uncertainty is larger decides nothing
GRADIENT = "gradient against differences of the loss"
SLOPES = 3  # directions in which the gradient is held against differences of the loss


@registered
@dataclass(frozen=True)
class Check:
    """One comparison; ``error`` is relative: norm of the difference over norm of the product."""

    name: str
    error: float
    tolerance: float
    remark: str = ""  # how the referee's product was made

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verdict = "ok    " if self.passed else "FAILED"
        remark = f"; {self.remark}" if self.remark else ""
        errors = f"relative error {self.error:.1e} (allowed {self.tolerance:.1e})"
        return f"{verdict} {self.name}: {errors}{remark}"


@registered
@dataclass(frozen=True)
class Verification:
    """Outcome of :func:`verify`: ``checks`` in the order made; ``skipped``, each with the
    reason."""

    checks: tuple[Check, ...]
    skipped: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        skipped = [f"skip   {reason}" for reason in self.skipped]
        return "\n".join([*map(str, self.checks), *skipped])


def verify(
    operator: CurvatureOperator,
    blocks: Sequence[Block] = (),
    *,
    seed: int = 0,
) -> Verification:
    """Holds ``operator`` against its referee, symmetry, linearity, its blocks, and cut batches.

    The gradient, which referee and operator both take from autograd, is itself held against
    differences of the loss.

    The referee works in a float64 copy of model and data where one can be made. In TF32 and
    bfloat16 all other checks are coarse, so there the referee is held against this operator's own
    product in that copy, to float64's tolerance; a further check, "rounding", says how far the
    product in low precision lies from it.

    Args:
        operator: a curvature operator, such as a HessianOperator.
        blocks: blocks to compare with slices of the full product; default the first, middle and
            last parameter tensor.
        seed: of the random directions.
    Returns:
        which checks failed and by how much, and which could not be made.
    """
    tolerance = TOLERANCE[operator.arithmetic.name]
    generator = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, operator.size, generator=generator).to(operator.device, operator.dtype)
    hv, hw = operator.matmat(torch.stack([v, w]))
    checks = [*_symmetry_and_linearity(operator, v, w, hv, hw, tolerance)]
    del w, hw  # each is as large as the model
    for block in blocks or _three(list(partition(operator.problem.model, "tensor"))):
        checks.append(_block_check(operator, block, v, tolerance))
    outcomes = [_cut_batches(operator, v, hv, tolerance)]
    operator.release()
    outcomes += against_referee(operator, v, hv, seed)
    checks += [outcome for outcome in outcomes if isinstance(outcome, Check)]
    skipped = [outcome for outcome in outcomes if isinstance(outcome, str)]
    return Verification(tuple(checks), tuple(skipped))


def _symmetry_and_linearity(
    operator: CurvatureOperator,
    v: Tensor,
    w: Tensor,
    hv: Tensor,
    hw: Tensor,
    tolerance: float,
) -> Iterator[Check]:
    # Two applications turn a random vector towards the top eigenvectors. There an asymmetry shows
    # at its full relative size and rounding does not; between random vectors it would be
    # 1 / sqrt(P) of that.
    x = hv / (norm([hv]) or 1.0)
    hx, combination = operator.matmat(torch.stack([x, 2 * v - 3 * w]))
    y = hx / (norm([hx]) or 1.0)
    asymmetry = relative_difference([dot(y, hx)], [dot(x, operator @ y)])
    yield Check("symmetry", asymmetry, tolerance)
    yield Check("linearity", relative_difference([combination], [2 * hv - 3 * hw]), tolerance)


def _block_check(
    operator: CurvatureOperator,
    block: Block,
    v: Tensor,
    tolerance: float,
) -> Check:
    """The block's product against the slice of the full one for the vector padded with zeros."""
    vector = v[: block.numel]
    cut = block.as_cut()
    embedded = torch.zeros_like(v)
    by_name = _by_name(operator.problem, embedded)
    pieces = vector.split([part.block_size for part in cut.parts])
    for part, piece in zip(cut.parts, pieces, strict=True):
        part.place(piece[None], by_name[part.parameter])
    sliced = cut.rows(_by_name(operator.problem, operator @ embedded)).flatten()
    error = relative_difference([operator.block(block) @ vector], [sliced])
    return Check(f"block {block.name}", error, tolerance)


def _cut_batches(
    operator: CurvatureOperator,
    v: Tensor,
    hv: Tensor,
    tolerance: float,
) -> Check | str:
    """The product from halved batches; the reason why not, where they cannot be cut."""
    problem = operator.problem
    length = max(batch_length(batch) or 1 for batch in problem.batches)
    if problem.batch_stats:
        return "cut batches: batch statistics cannot be cut"
    if length < 2:
        return "cut batches: batches of one example cannot be cut"
    try:
        cut = operator.rebuilt(problem, microbatch=(length + 1) // 2, record=False)
        return Check("cut batches", relative_difference([cut @ v], [hv]), tolerance)
    except ValueError as error:  # e.g. a loss that is no mean over its examples: fine while uncut
        return f"cut batches: {_first_line(error)}"


def against_referee(
    operator: CurvatureOperator,
    v: Tensor,
    hv: Tensor,
    seed: int,
) -> list[Check | str]:
    """The gradient against the loss, the product ``hv`` against its referee; or why not."""
    problem = operator.problem
    copied = float64_copy(problem)
    is_coarse = copied is not None and operator.arithmetic.name in COARSE
    try:
        referee = copied or problem
        judged = operator.rebuilt(referee) if is_coarse else operator
        tolerance = TOLERANCE[judged.arithmetic.name]
        slope = _gradient_check(referee, tolerance, seed)
        reference = operator.reference(referee, per_parameter(problem, v))
        product = judged @ v.double() if is_coarse else hv
    except (RuntimeError, ValueError, TypeError) as error:  # no referee is no verdict
        return [f"{operator.referee}: {type(error).__name__}: {_first_line(error)}"]
    where = "float64 copy" if copied else f"in {problem.dtype}: no float64 copy could be made"
    products = per_parameter(problem, product)
    compared = _compared(operator.referee, products, reference, tolerance, where)
    outcomes = [slope, compared]
    if is_coarse:
        name = f"rounding of {operator.arithmetic.name}"
        outcomes.append(Check(name, relative_difference([hv], [product]), ROUNDED, where))
    return outcomes


def _gradient_check(problem: Problem, tolerance: float, seed: int) -> Check | str:
    """Slopes by autograd's gradient against those of the loss."""
    gradient = list(mean_gradient(problem).values())
    generator = torch.Generator().manual_seed(seed)
    directions = [
        [torch.randn(g.shape, generator=generator).to(g) for g in gradient] for _ in range(SLOPES)
    ]
    reference = slopes(problem, directions)
    if not reference.uncertainty < CONCLUSIVE:
        own = f"its own uncertainty is {reference.uncertainty:.0e}"
        return f"gradient: inconclusive against differences of the loss, {own}"
    by_gradient = torch.stack([_inner(gradient, direction) for direction in directions])
    distance = relative_difference([by_gradient.cpu()], reference.product)
    allowed = max(tolerance, 5 * reference.uncertainty)
    return Check(GRADIENT, distance, allowed, reference.remark)


def _inner(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    pairs = zip(one, two, strict=True)
    return torch.stack([dot(a.flatten(), b.flatten()).squeeze() for a, b in pairs]).sum()


def _compared(
    referee: str,
    product: Sequence[Tensor],
    reference: Reference,
    tolerance: float,
    where: str,
) -> Check | str:
    if not reference.uncertainty < CONCLUSIVE:
        own = f"its own uncertainty is {reference.uncertainty:.0e}"
        return f"{referee}: inconclusive, {own} (kinks?)"
    distance = relative_difference(product, reference.product)
    allowed = max(tolerance, 5 * reference.uncertainty)
    remark = f"{where}, {reference.remark}"
    return Check(referee, distance, allowed, remark)


def _by_name(problem: Problem, flat: Tensor) -> dict[str, Tensor]:
    return dict(zip(problem.parameters, per_parameter(problem, flat), strict=True))


def _three(blocks: list[Block]) -> list[Block]:
    chosen = (blocks[0], blocks[len(blocks) // 2], blocks[-1])
    return list({block.name: block for block in chosen}.values())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product in float64, piecewise to spare memory."""
    pairs = zip(a.split(1 << 20), b.split(1 << 20), strict=True)
    return torch.stack([x.double() @ y.double() for x, y in pairs]).sum()[None]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
