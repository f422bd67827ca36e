"""Predicted progress: what one rate, rates a block, and Adam's diagonal gain on the quadratic.

q(w) = g'w + w'A w / 2, g the gradient of the mean loss and A the operator, is what the loss does
near the present weights. Its best decrease along a method's directions says what that method can
gain before the curvature changes:

- one rate: w = -eta g, (g'g)^2 / (2 g'A g);
- a rate a block: w = -sum_b eta_b g_b with all cross terms, r'M^-1 r / 2
  (:mod:`hessian_tools.descent.reduced`); also with a row of each weight matrix as a block;
- Adam's diagonal: w = -eta P^-1 g, and a rate a block of that direction.

T steps are simulated on the same quadratic, at the best fixed rate
(:mod:`hessian_tools.descent.trajectories`). Rates a block are then the best ones of one step that
are not negative, times one common rate, for gradient descent diverges along a negative one. One
step is free to take negative rates.

Nothing keeps q within the range of the loss: a predicted decrease may exceed the loss itself, and
then says that the quadratic does not hold over so long a step.

A should be positive semidefinite, such as the Gauss-Newton matrix. A Hessian is indefinite along
g on many networks, and then there is no best rate.

Letters: P parameters, B blocks, R rows, T steps.
"""

import math
from collections.abc import Mapping

import torch

from hessian_tools.blocks.presets import partition as partition_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.curvature.preconditioners import Preconditioner
from hessian_tools.curvature.progress import product_bar
from hessian_tools.descent.batch_errors import FEWEST, influences, standard_error
from hessian_tools.descent.methods import Method, simulate, solved_methods
from hessian_tools.descent.predicted_result import Decrease, PredictedProgress
from hessian_tools.descent.reduced import Owners, Tensors, owners_of
from hessian_tools.errors import NumericalError
from hessian_tools.problem.gradient import loss_and_gradient
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.dense import Blocks, cuts_of

ADAM_EPS = 1e-8
KRYLOV = 64  # Lanczos steps, the most
MOST_ROWS = 4096


def predicted_progress(
    operator: CurvatureOperator,
    partition: Blocks | None = None,
    *,
    preconditioner: Preconditioner | None = None,
    eps: float = ADAM_EPS,
    rows: bool = False,
    max_rows: int = MOST_ROWS,
    steps: int = 1,
    krylov: int = KRYLOV,
    batches_standard_error: bool = True,
    relative_floor: float | None = None,
    progress: bool = True,
) -> PredictedProgress:
    """The best decrease of the local quadratic by one rate, by a rate a block, by Adam's diagonal.

    Takes 2 B products with A, R more for ``rows``, min(T, ``krylov``) for each method where
    ``steps`` T is above 1, and one for each method's standard error.

    Args:
        operator: A, best a positive semidefinite one. With an indefinite one, such as the Hessian
            of most networks, values that do not exist are nan, with the reason.
        partition: a Partition, or anything that :func:`hessian_tools.dense_block` takes as blocks.
            Entries in no block share a further rate. Default: a block a tensor.
        preconditioner: P, such as that of a live optimizer
            (:func:`hessian_tools.preconditioner_of`). Default: Adam's at its first step,
            diag(|g| + ``eps``), whose direction is almost the sign of g.
        eps: of that default.
        rows: also a rate for each row of every weight matrix (the partition "neuron").
        max_rows: the most rows that are allowed; each takes a product.
        steps: T, of the simulation; 1 makes none.
        krylov: the most Lanczos steps of the simulation, which is exact up to T = ``krylov``.
        batches_standard_error: estimate standard errors of the one-step values, where there are at
            least 4 batches (:mod:`hessian_tools.descent.batch_errors`). The preconditioner is held
            fixed, and with it the default one's direction.
        relative_floor: see :mod:`hessian_tools.descent.reduced`.
        progress: a bar on stderr, products done and left, when that is a terminal.

    Raises:
        TypeError: for an ``operator`` that is no curvature operator, or one preconditioned already.
        ValueError: for an argument out of range, more rows than ``max_rows``, a partition or
            preconditioner that does not fit.
        NumericalError: for a gradient or product with NaN or inf.
    """
    _check(operator, eps, steps, krylov, relative_floor)
    problem = operator.problem
    owners = owners_of(problem, cuts_of("tensor" if partition is None else partition, problem))
    row_owners = _row_owners(problem, max_rows) if rows else None
    one_step = 2 * len(owners.names) + (len(row_owners.names) if row_owners else 0)
    runs = (5 if rows else 4) if steps > 1 else 0
    total = one_step + runs * min(steps, krylov)
    operator.expect(total)
    with operator.steady(), product_bar(total, shown=progress) as bar:
        loss, gradient = loss_and_gradient(problem)
        _check_finite(gradient)
        methods = solved_methods(
            operator, gradient, owners, row_owners, preconditioner, eps, relative_floor, bar
        )
        if steps > 1:
            simulate(operator, gradient, methods, steps, krylov, bar)
    spent = one_step + sum(method.run.num_matvecs for method in methods.values())
    errors, notes = _errors(operator, gradient, methods, batches_standard_error)
    spent += len(errors)
    found = _decreases(methods, errors)
    return PredictedProgress(
        one_rate=found["one rate"],
        block_rates=found["blocks"],
        row_rates=found.get("rows"),
        adam=found["adam"],
        adam_block_rates=found["adam blocks"],
        loss=loss,
        steps=steps,
        blocks=owners.names,
        rows=row_owners.names if row_owners else (),
        num_matvecs=spent,
        route=operator.route,
        notes=notes,
    )


def _check(
    operator: object,
    eps: float,
    steps: int,
    krylov: int,
    relative_floor: float | None,
) -> None:
    if isinstance(operator, PreconditionedOperator):
        raise TypeError(
            "operator is preconditioned already; pass A itself, and P as preconditioner="
        )
    if not isinstance(operator, CurvatureOperator):
        raise TypeError(
            f"operator is a {type(operator).__name__}; pass a curvature operator, best a positive "
            "semidefinite one such as the Gauss-Newton matrix"
        )
    if steps < 1 or krylov < 1 or not eps >= 0:
        raise ValueError(
            f"steps is {steps}, krylov {krylov} and eps {eps}; at least 1, 1 and 0 are needed"
        )
    if relative_floor is not None and not 0 <= relative_floor < 1:
        raise ValueError(f"relative_floor is {relative_floor}; at least 0 and below 1 is needed")


def _check_finite(gradient: Tensors) -> None:
    for name, g in gradient.items():
        if not bool(torch.isfinite(g).all()):
            raise NumericalError(
                f"the gradient of {name} holds NaN or inf; check the loss and the dtype's range"
            )


def _row_owners(problem: Problem, max_rows: int) -> Owners:
    cuts = partition_of(problem.model, "neuron").cuts
    count = sum(cut.num_blocks for cut in cuts)
    if count > max_rows:
        raise ValueError(
            f"rows=True needs {count:,} products, one for each row, and max_rows is "
            f"{max_rows:,}; raise max_rows, or pass a coarser partition instead"
        )
    return owners_of(problem, cuts)


def _errors(
    operator: CurvatureOperator,
    gradient: Tensors,
    methods: Mapping[str, Method],
    wanted: bool,
) -> tuple[dict[str, tuple[float, float]], tuple[str, ...]]:
    """(standard error of the decrease, of its ratio) by method, and notes."""
    problem = operator.problem
    if not wanted:
        return {}, ()
    if len(problem.batches) < FEWEST:
        count = len(problem.batches)
        return {}, (f"no standard errors: they need {FEWEST} batches, and there are {count}",)
    known = {name: method for name, method in methods.items() if not method.best.why}
    if not known:
        return {}, ()
    flat = torch.cat([g.flatten() for g in gradient.values()])
    moves = [method.moved(problem) for method in known.values()]
    found, weights = influences(operator, flat, moves)
    by_name = dict(zip(known, found.T, strict=True))
    errors = {}
    for name, influence in by_name.items():
        ratio_error = math.nan
        if "one rate" in known and known["one rate"].best.decrease > 0:
            base = known["one rate"].best.decrease
            ratio = known[name].best.decrease / base
            ratio_influence = (influence - ratio * by_name["one rate"]) / base
            ratio_error = standard_error(ratio_influence, weights)
        errors[name] = (standard_error(influence, weights), ratio_error)
    return errors, ()


def _decreases(
    methods: Mapping[str, Method],
    errors: Mapping[str, tuple[float, float]],
) -> dict[str, Decrease]:
    base = methods["one rate"]
    found = {}
    for name, method in methods.items():
        error, ratio_error = errors.get(name, (math.nan, math.nan))
        found[name] = Decrease(
            one_step=method.best.decrease,
            one_step_error=error,
            ratio=_quotient(method.best.decrease, base.best.decrease),
            ratio_error=ratio_error,
            many_steps=method.run.decrease,
            many_steps_ratio=_quotient(method.run.decrease, base.run.decrease),
            many_steps_rate=method.run.rate,
            rates=method.best.rates,
            why=method.best.why,
            many_steps_why=method.run.why,
        )
    return found


def _quotient(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
