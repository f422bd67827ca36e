"""The methods whose progress is predicted: their directions, best rates, steps and simulations.

Letters: P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.preconditioners import DiagonalPreconditioner, Preconditioner
from hessian_tools.curvature.referees import per_parameter
from hessian_tools.descent.batch_errors import Moved
from hessian_tools.descent.reduced import (
    Best,
    Floats,
    Owners,
    Tensors,
    best_rates,
    default_floor,
    inner_products,
    nonnegative_rates,
    reduced_matrix,
)
from hessian_tools.descent.trajectories import Rates, Run, best_run
from hessian_tools.problem.problem import Problem

DIAGONAL_ONLY = "rates a block on a preconditioner that is not diagonal are not simulated"


@dataclass(eq=False)
class Method:
    """One method: its directions, its reduced problem, and what follows from these."""

    direction: Tensors
    owners: Owners
    matrix: Floats
    slopes: Floats
    best: Best
    precondition: Preconditioner | None  # P of the direction P^-1 g; None: g itself
    follows: bool = True  # whether the direction changes with g
    run: Run = field(default=Run(math.nan, math.nan, 0))

    def step(self) -> Tensor:
        """(P,) the best step p."""
        rates = self.owners.spread(self.best.rates)
        pieces = [rates[name] * d for name, d in self.direction.items()]
        return torch.cat([piece.flatten() for piece in pieces])

    def moved(self, problem: Problem) -> Moved:
        """The best step, and how it follows the gradient at fixed rates."""
        rates = self.owners.spread(self.best.rates)

        def pullback(vector: Tensor) -> Tensor:
            if not self.follows:
                return torch.zeros_like(vector)
            pieces = []
            for name, v in zip(problem.parameters, per_parameter(problem, vector), strict=True):
                piece = rates[name] * v
                if self.precondition is not None:
                    piece = self.precondition.inverse(name, piece[None])[0]
                pieces.append(piece.flatten())
            return torch.cat(pieces)

        return Moved(self.step(), pullback)


def solved_methods(
    operator: CurvatureOperator,
    gradient: Tensors,
    owners: Owners,
    row_owners: Owners | None,
    preconditioner: Preconditioner | None,
    eps: float,
    relative_floor: float | None,
    bar: tqdm,
) -> dict[str, Method]:
    """Every method, solved for one step."""
    p, direction = _preconditioned(operator, gradient, preconditioner, eps)
    follows = preconditioner is not None
    plain = _solved(operator, gradient, gradient, owners, None, True, relative_floor, bar)
    adam = _solved(operator, gradient, direction, owners, p, follows, relative_floor, bar)
    methods = {"one rate": _together(plain), "blocks": plain}
    if row_owners is not None:
        methods["rows"] = _solved(
            operator, gradient, gradient, row_owners, None, True, relative_floor, bar
        )
    methods["adam"] = _together(adam)
    methods["adam blocks"] = adam
    return methods


def _preconditioned(
    operator: CurvatureOperator,
    gradient: Tensors,
    preconditioner: Preconditioner | None,
    eps: float,
) -> tuple[Preconditioner, dict[str, Tensor]]:
    """P, and P^-1 g."""
    if preconditioner is None:
        preconditioner = DiagonalPreconditioner({n: g.abs() + eps for n, g in gradient.items()})
    preconditioner.check(operator.problem.parameters)
    p = preconditioner.to(operator.dtype, operator.device)
    return p, {name: p.inverse(name, g[None])[0] for name, g in gradient.items()}


def _solved(
    operator: CurvatureOperator,
    gradient: Tensors,
    direction: Tensors,
    owners: Owners,
    precondition: Preconditioner | None,
    follows: bool,
    relative_floor: float | None,
    bar: tqdm,
) -> Method:
    matrix = reduced_matrix(operator, direction, owners, bar)
    slopes = inner_products(gradient, direction, owners)
    floor = relative_floor
    if floor is None:
        floor = default_floor(len(slopes), operator.dtype)
    best = best_rates(matrix, slopes, owners.names, floor)
    return Method(direction, owners, matrix, slopes, best, precondition, follows)


def _together(method: Method) -> Method:
    """The same direction with one rate for all blocks."""
    whole = "the whole direction"
    numbers = {name: torch.zeros_like(n) for name, n in method.owners.numbers.items()}
    matrix = np.array([[method.matrix.sum()]])
    slopes = np.array([method.slopes.sum()])
    best = best_rates(matrix, slopes, [whole], 0.0)
    owners = Owners((whole,), numbers)
    return Method(
        method.direction, owners, matrix, slopes, best, method.precondition, method.follows
    )


def simulate(
    operator: CurvatureOperator,
    gradient: Tensors,
    methods: Mapping[str, Method],
    steps: int,
    krylov: int,
    bar: tqdm,
) -> None:
    """Gives every method its run of ``steps`` steps."""
    for method in methods.values():
        if method.best.why:
            method.run = Run(math.nan, math.nan, 0, method.best.why)
            continue
        p = method.precondition
        if len(method.owners.names) > 1:
            if not isinstance(p, DiagonalPreconditioner | None):
                method.run = Run(math.nan, math.nan, 0, DIAGONAL_ONLY)
                continue
            p = _with_rates(method, p)
        method.run = best_run(operator, gradient, p, steps, krylov)
        bar.update(method.run.num_matvecs)


def _with_rates(method: Method, p: DiagonalPreconditioner | None) -> Rates:
    """The rates a block that are not negative, over P's diagonal."""
    found = nonnegative_rates(method.matrix, method.slopes, method.best)
    rates = method.owners.spread(found)
    if p is not None:
        rates = {name: rate / p.diagonal[name].double() for name, rate in rates.items()}
    return Rates(rates)
