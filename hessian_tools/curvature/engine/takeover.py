"""Taking over from the recorded route: a tangent program, if it fits and gives the same product."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessian_tools.curvature.engine.footprint import Needs
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.engine.plan import MAX_ROWS, PRODUCT_SHARE, Plan
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.engine.recorded import RecordedRoute
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.segments.recompute import NONE
from hessian_tools.curvature.tangent.graph import Untraceable
from hessian_tools.curvature.tangent.route import TangentRoute
from hessian_tools.problem.batches import Batch

Recorded = RecordedRoute[Any]  # whatever it records
Route = Recorded | TangentRoute


def tangent_program(
    trials: Trials,
    trusted: Recorded,
    plan: Plan,
) -> tuple[TangentRoute, Plan]:
    """A tangent program for the micro-batches of ``plan``, and a plan for it that can go back.

    Raises:
        Untraceable: there is none, it does not fit into the budget, or its product is not that of
            the route that is ``trusted``.
    """
    problem, budget = trials.problem, trials.budget
    batches = [batch for _, batch in plan.pieces]
    tangent = TangentRoute(problem, batches, trials.derivative.traced)
    vectors = 2 * problem.num_parameters * problem.dtype.itemsize
    needs = Needs(
        graphs=tangent.graph_bytes,
        recording=tangent.recording_bytes,
        fixed=0,
        row=tangent.row_bytes + vectors,
    )
    rows = min(MAX_ROWS, (int(PRODUCT_SHARE * budget) - needs.graphs) // needs.row)
    if rows < 1:
        least = format_bytes((needs.graphs + needs.row) / PRODUCT_SHARE)
        raise Untraceable(f"its constants and a probe's pass need a budget of {least}")
    for batch in batches:
        _compare(trusted, tangent, batch, trials.arithmetic)
    following = replace(
        plan,
        recorded=True,
        segments=NONE,
        rows=rows,
        needs=needs,
        krylov_bytes=max(0, budget - needs.peak(rows)),
        bounded=False,
        fallback=plan,
    )
    return tangent, following


def _compare(
    trusted: Recorded,
    tangent: TangentRoute,
    batch: Batch,
    arithmetic: Arithmetic,
) -> None:
    """Holds the product with a random vector against that of the route that is trusted.

    Each route's graphs are freed before the next one runs.

    Raises:
        Untraceable: they differ by more than rounding.
    """
    parameters = tangent.problem.parameters
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(1, *p.shape, generator=generator).to(p) for p in parameters.values()]
    with arithmetic.active():
        expected = _product(trusted, batch, vectors)
        product = _product(tangent, batch, vectors)
    if all(torch.equal(a, b) for a, b in zip(expected, product, strict=True)):
        return
    norms = torch.stack(
        [torch.stack([a.norm(), (a - b).norm()]) for a, b in zip(expected, product, strict=True)]
    ).double()
    size, difference = norms.T
    # A parameter with a small part in the product is held to 1e-3 of the whole product's norm.
    allowed = _tolerance(arithmetic) * (size + 1e-3 * size.norm())
    if bool((difference > allowed).any()):
        worst = int((difference - allowed).argmax())
        raise Untraceable(
            f"its product for {list(parameters)[worst]} is not that of double backward"
        )


def _tolerance(arithmetic: Arithmetic) -> float:
    """What rounding may do, relative to a product."""
    allowed = torch.finfo(arithmetic.model).eps ** 0.5
    if arithmetic.inside is not None:
        # float64 models that compute in float32 inside; of a coarser dtype rounding could be wrong
        # mathematics
        allowed = max(allowed, min(64 * torch.finfo(arithmetic.inside).eps, 1e-4))
    return allowed


def _product(route: Route, batch: Batch, vectors: Sequence[Tensor]) -> list[Tensor]:
    """The product of all parameters with one vector; what the route keeps is freed."""
    names = list(route.problem.parameters)
    with closing(route.products(batch, names, [vectors])) as products:
        pairs = zip(next(products), vectors, strict=True)
        product = [torch.zeros_like(v) if p is None else p for p, v in pairs]
    route.release()
    return product
