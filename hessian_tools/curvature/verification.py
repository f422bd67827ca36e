"""Verification of a Hessian operator against referees that share none of its second-order code.

Incumbent tools are silently wrong on ordinary models (affine LayerNorm through forward-over-reverse, unweighted
batches), so every operator here can be held, on the user's own model, against a finite difference of the gradient and
against the properties that a Hessian has.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessian_tools.blocks.block import Block
from hessian_tools.blocks.presets import partition
from hessian_tools.problem.batches import batch_length, to_device
from hessian_tools.problem.problem import Problem

if TYPE_CHECKING:
    from hessian_tools.curvature.hessian import HessianOperator

# By arithmetic. Wrong mathematics shows as 1e-2 and more, rounding of the first two far below these; models that cast
# to float32 inside limit float64. The last two are coarse: about 20 and 12 roundings.
TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "tf32": 2e-2, "bfloat16": 0.1}
# What rounding may do where it cannot be told from mathematics by its size: a rounded forward pass takes the other side
# of some kinks of ReLU and max-pooling, which changes a product by a quarter and its spectrum by a few percent
# (experiments/precision.py). The mathematics is then held against the referee in float64.
ROUNDED = 0.5
# Steps of the finite difference, relative to the norm of the parameters, in the order tried: tiny ones first, for with
# 1e6 activations a step above 1e-7 crosses kinks of ReLU and max-pooling; larger ones for models with float32 inside.
STEPS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-4, 1e-3, 1e-2)
AGREED = 1e-6  # two steps that agree so well settle it
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
        verdict, remark = (
            "ok    " if self.passed else "FAILED",
            f"; {self.remark}" if self.remark else "",
        )
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


def verify(
    hessian: "HessianOperator", blocks: Sequence[Block] = (), *, seed: int = 0
) -> Verification:
    """Holds ``hessian`` against a finite difference of the gradient, symmetry, linearity, its blocks, and cut batches.

    Args:
        hessian: a HessianOperator.
        blocks: blocks to compare with slices of the full Hessian; default the first, middle and last parameter tensor.
        seed: of the random directions.
    Returns:
        a Verification: it says which check failed and by how much. The finite difference is central, in a float64 copy
        of model and data where one can be made, at the step that agrees best with its neighbour; how well is its
        uncertainty. In TF32 and bfloat16 all other checks are coarse, and the finite difference is held against this
        engine's product in that copy, to float64's tolerance; a further check, "rounding", says how far the product
        in low precision lies from it.
    """
    problem = hessian.problem
    tolerance = TOLERANCE[hessian.arithmetic.name]
    generator = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, hessian.size, generator=generator).to(hessian.device, hessian.dtype)
    hv, hw = hessian.matmat(torch.stack([v, w]))
    # Two applications turn a random vector to the top eigenvectors. There an asymmetry shows at its full relative size
    # and rounding does not; between random vectors it would be 1 / sqrt(P) of that.
    x = hv / (_size([hv]) or 1.0)
    hx, combination = hessian.matmat(torch.stack([x, 2 * v - 3 * w]))
    y = hx / (_size([hx]) or 1.0)
    checks = [
        Check("symmetry", _relative([_dot(y, hx)], [_dot(x, hessian @ y)]), tolerance),
        Check("linearity", _relative([combination], [2 * hv - 3 * hw]), tolerance),
    ]
    del w, hw, x, hx, y, combination  # each is as large as the model
    skipped = []
    for block in blocks or _three(list(partition(problem.model, "tensor"))):
        checks.append(_block_check(hessian, block, v, tolerance))
    length = max(batch_length(batch) or 1 for batch in problem.batches)
    if problem.batch_stats or length < 2:
        reason = "batch statistics" if problem.batch_stats else "batches of one example"
        skipped.append(f"cut batches: {reason} cannot be cut")
    else:
        try:
            cut = type(hessian)(
                problem,
                microbatch=(length + 1) // 2,
                record=False,
                precision=hessian.arithmetic.precision,
            )
            checks.append(Check("cut batches", _relative([cut @ v], [hv]), tolerance))
        except (
            ValueError
        ) as error:  # a loss that is no mean over its examples, say: fine as long as nothing is cut
            skipped.append(f"cut batches: {_first_line(error)}")
    hessian.release()
    try:
        referee, copied = float64_copy(problem)
        difference, uncertainty, remark = _finite_difference(referee, _per_parameter(problem, v))
        coarse = copied and hessian.arithmetic.name in ("tf32", "bfloat16")
        doubled = type(hessian)(referee) @ v.double() if coarse else hv
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ) as error:  # a referee that cannot stand up is no verdict
        return Verification(
            tuple(checks),
            (*skipped, f"finite difference: {type(error).__name__}: {_first_line(error)}"),
        )
    where = "float64 copy" if copied else f"in {problem.dtype}: no float64 copy could be made"
    if uncertainty < CONCLUSIVE:
        allowed = max(TOLERANCE["float64"] if coarse else tolerance, 5 * uncertainty)
        distance = _relative(_per_parameter(problem, doubled), difference)
        checks.append(
            Check("finite difference of the gradient", distance, allowed, f"{where}, {remark}")
        )
    else:
        skipped.append(
            f"finite difference: inconclusive, its own uncertainty is {uncertainty:.0e} (kinks?)"
        )
    if coarse:
        checks.append(
            Check(
                f"rounding of {hessian.arithmetic.name}", _relative([hv], [doubled]), ROUNDED, where
            )
        )
    return Verification(tuple(checks), tuple(skipped))


def _block_check(hessian: "HessianOperator", block: Block, v: Tensor, tolerance: float) -> Check:
    vector, cut = v[: block.numel], block.as_cut()
    embedded = torch.zeros_like(v)
    full = _by_name(hessian.problem, embedded)
    for part, piece in zip(cut.parts, vector.split([p.block_size for p in cut.parts]), strict=True):
        part.place(piece[None], full[part.parameter])
    sliced = cut.rows(_by_name(hessian.problem, hessian @ embedded)).flatten()
    return Check(
        f"block {block.name}", _relative([hessian.block(block) @ vector], [sliced]), tolerance
    )


def float64_copy(problem: Problem) -> tuple[Problem, bool]:
    """A float64 copy of the problem and True; where none can be made, the problem itself and False."""
    try:
        doubled = copy.deepcopy(problem.model).to(torch.float64)
        batches = [to_device(batch, problem.device, torch.float64) for batch in problem.batches]
        referee = Problem(
            doubled,
            problem.loss_fn,
            batches,
            batch_stats=problem.batch_stats,
            num_examples=problem.num_examples,
        )
    except (RuntimeError, ValueError, TypeError):  # not every model can be copied or take float64
        return problem, False
    return referee, True


def _finite_difference(
    referee: Problem, direction: list[Tensor]
) -> tuple[list[Tensor], float, str]:
    """H v by parameter, its relative uncertainty, and a remark: central differences of the gradient."""
    norm = _size([p.detach() for p in referee.parameters.values()]) or 1.0
    best: tuple[float, float, list[Tensor]] = (float("inf"), 0.0, [])
    previous: list[Tensor] = []
    for relative_step in STEPS:
        step = relative_step * norm / _size(direction)
        ahead, behind = (_shifted_gradient(referee, direction, sign * step) for sign in (1, -1))
        product = [a.sub_(b).div_(2 * step) for a, b in zip(ahead, behind, strict=True)]
        if previous and (agreement := _relative(previous, product)) < best[0]:
            best = (agreement, relative_step, product)
        if best[0] < AGREED:
            break
        previous = product
    return best[2], best[0], f"step {best[1]:.0e}, its own uncertainty {best[0]:.0e}"


def _shifted_gradient(problem: Problem, direction: list[Tensor], step: float) -> list[Tensor]:
    parameters = list(problem.parameters.values())
    kept = [p.detach().clone() for p in parameters]
    total = [torch.zeros_like(p) for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d.to(p.dtype), alpha=step)
        for weight, batch in zip(problem.weights, problem.batches, strict=True):
            with problem.evaluating(), torch.enable_grad():
                gradients = torch.autograd.grad(
                    problem.batch_loss(batch), parameters, allow_unused=True
                )
            for sum_, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sum_.add_(gradient, alpha=weight)
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
    return [sum_.detach() for sum_ in total]


def _per_parameter(problem: Problem, flat: Tensor) -> list[Tensor]:
    sizes = [p.numel() for p in problem.parameters.values()]
    return [
        t.view(p.shape) for t, p in zip(flat.split(sizes), problem.parameters.values(), strict=True)
    ]


def _by_name(problem: Problem, flat: Tensor) -> dict[str, Tensor]:
    return dict(zip(problem.parameters, _per_parameter(problem, flat), strict=True))


def _three(blocks: list[Block]) -> list[Block]:
    return list({b.name: b for b in (blocks[0], blocks[len(blocks) // 2], blocks[-1])}.values())


def _size(pieces: Sequence[Tensor]) -> float:
    """Euclidean norm of all pieces together, summed in float64: over 1e8 entries float32 loses two digits."""
    return math.hypot(
        *(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces)
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(a.split(1 << 20), b.split(1 << 20), strict=True)
    return torch.stack([x.double() @ y.double() for x, y in pairs]).sum()[None]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    norm = max(_size(a), _size(b))
    return _size([x.to(y.dtype) - y for x, y in zip(a, b, strict=True)]) / norm if norm else 0.0
