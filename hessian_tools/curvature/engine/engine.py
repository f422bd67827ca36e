"""The engine: products with second derivatives of a Problem's loss, within a memory budget.

It goes through micro-batches and chunks of rows as the plan says (:mod:`hessian_tools.curvature.engine.plan`: what is recorded, cut and
recomputed); a route does the differentiation on one micro-batch (:mod:`hessian_tools.curvature.engine.double_backward`). Once products
have cost, or are announced to cost, enough to pay for tracing, and where memory allows, a tangent program takes over
(:mod:`hessian_tools.curvature.tangent.route`), after it has given the same product. Another route is another class with
``products``, ``holds``, ``release`` and ``name``.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessian_tools.curvature.engine.double_backward import DoubleBackward
from hessian_tools.curvature.engine.memory import (
    budget_bytes,
    format_bytes,
    is_out_of_memory,
    keep_freed_memory,
    return_freed_memory,
)
from hessian_tools.curvature.engine.plan import (
    MAX_ROWS,
    PRODUCT_SHARE,
    Plan,
    Wishes,
    choose,
    planned,
)
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.engine.recompute import LAYERED, NONE, STREAMED, Segments
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.tangent.graph import Untraceable
from hessian_tools.curvature.tangent.route import TangentRoute
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem

Spread = Callable[[slice], Sequence[Tensor | None]]  # None: zero
Collect = Callable[[slice, Sequence[Tensor | None], float], None]
Todo = list[tuple[float, Any, int]]  # weight in L, micro-batch, rows that are done
ROUTES = ("auto", "tangent program", "double backward")
# operations of products, made or announced, after which "auto" traces: a tangent program saves by then the seconds that
# tracing takes; counted, so that runs agree
_WORTH_TRACING = {"cpu": 7e11, "cuda": 1e14}


class Engine:
    """Second derivatives of a Problem between chosen parameter tensors; shared by the Hessian and all its blocks.

    It follows the plan over micro-batches and chunks of rows, and changes the plan where memory runs out; the route
    does the differentiation on one micro-batch.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        memory: str | int,
        wishes: Wishes,
        wanted: str,
    ) -> None:
        self.problem, self.arithmetic, self.wanted = problem, arithmetic, wanted
        self.budget = budget_bytes(memory, problem.device)
        self.trials = Trials(problem, arithmetic, self.budget)
        self.double_backward = DoubleBackward(problem)
        self.route: DoubleBackward | TangentRoute = self.double_backward
        self.without_tangent: Plan | None = None  # the plan to go back to from a tangent program
        self.no_tangent = ""  # why no tangent program is used
        self._made = self._expected = 0.0  # operations of products, by counted cost
        refused = self.trials.refused
        if (
            wishes.segments
            and self.trials.footprint(wishes.segments) is None
            and refused[wishes.segments]
        ):
            raise ValueError(
                f"segments is {wishes.segments!r}, but layers cannot be: {refused[wishes.segments]}"
            )
        if problem.device.type == "cpu":
            keep_freed_memory()
        plan = choose(problem, self.budget, self.trials.footprint, wishes)
        reasons = [
            f"layers cannot be recomputed: {why}"
            for kind, why in refused.items()
            if why and kind.layers
        ]
        self._adopt(replace(plan, notes=tuple(reasons)))

    def products(self, names: Sequence[str], count: int, spread: Spread, collect: Collect) -> None:
        """sum_b H_ab v_b for all a and b among ``names``, for ``count`` rows v, a part at a time.

        ``spread(part)`` gives the tensors v_b of a part of the rows (None for zeros, which then cost nothing),
        ``collect(part, products, weight)`` takes weight times their products. What is collected is kept when memory
        runs out; the rest is done in another way.
        """
        if self.problem.device.type == "cpu":
            keep_freed_memory()
        if self._tangent_is_due(count, len(names) == len(self.problem.parameters)):
            self._take_tangent()
        todo = [(weight, batch, 0) for weight, batch in self.plan.pieces]
        while todo and count:
            weight, batch, first = todo[0]
            parts = [
                slice(i, min(i + self.plan.rows, count))
                for i in range(first, count, self.plan.rows)
            ]
            failure = ""
            try:
                with (
                    self.arithmetic.active(),
                    closing(self.route.products(batch, names, map(spread, parts))) as found,
                ):
                    for part in parts:
                        collect(part, next(found), weight)
                        first = part.stop
                todo.pop(0)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error).split("\n")[0] or type(error).__name__
            if failure:  # here the exception, and with it what the failed pass held, is gone
                todo[0] = weight, batch, first
                todo = self._retreat(todo, count - first, failure)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self.route.release()
        if self.problem.device.type == "cpu":
            return_freed_memory()

    @property
    def described(self) -> str:
        why = f" (no tangent program: {self.no_tangent})" if self.no_tangent else ""
        return f"{self.route.name}{why}; {self.plan}; {self.arithmetic}"

    def _adopt(self, plan: Plan) -> None:
        if self.route is not self.double_backward:
            self.route.release()
        self.plan, self.without_tangent, self.route, route = (
            plan,
            None,
            self.double_backward,
            self.double_backward,
        )
        if (plan.recorded, plan.segments) != (route.recorded, route.segments):
            route.release()
            route.recorded, route.segments = plan.recorded, plan.segments

    def _tangent_is_due(self, rows: int, whole: bool) -> bool:
        """Whether to change to a tangent program now; counts the work of the product that comes."""
        if (
            self.route is not self.double_backward
            or self.wanted == "double backward"
            or self.no_tangent
        ):
            return False
        if self.wanted == "auto":
            if not self.plan.recorded or self.plan.segments:
                return False
            self._made += self._cost(rows, whole)
            worth = _WORTH_TRACING.get(self.problem.device.type, _WORTH_TRACING["cpu"])
            return max(self._made, self._expected) > worth
        return True

    def expect(self, rows: int, whole: bool) -> None:
        """So many products will be asked for, of the whole Hessian or of blocks."""
        if self.wanted == "auto":
            self._expected += self._cost(rows, whole)

    def _cost(self, rows: int, whole: bool) -> float:
        """Floating-point operations of products."""
        examples = sum(batch_length(batch) or 1 for _, batch in self.plan.pieces)
        return rows * examples * self.trials.example_operations * (6 if whole else 1.3)

    def _take_tangent(self) -> None:
        """Takes a tangent program as the route if there is one, it fits the budget and it gives the same product."""
        problem, plan, batches = self.problem, self.plan, [batch for _, batch in self.plan.pieces]
        try:
            tangent = TangentRoute(problem, batches)
            graphs = tangent.graph_bytes
            row = tangent.row_bytes + 2 * problem.num_parameters * problem.dtype.itemsize
            rows = min(MAX_ROWS, (int(PRODUCT_SHARE * self.budget) - graphs) // row)
            if rows < 1:
                needed = format_bytes((graphs + row) / PRODUCT_SHARE)
                raise Untraceable(f"its constants and a probe's pass need a budget of {needed}")
            self._compare(tangent, batches[0])
        except Untraceable as reason:
            if self.wanted == "tangent program":
                raise ValueError(
                    f"route='tangent program' cannot be had: {reason}; pass route='auto'"
                ) from reason
            self.no_tangent = str(reason)
            return
        left = max(0, self.budget - graphs - max(tangent.recording_bytes, rows * row))
        self.without_tangent, self.route = plan, tangent
        self.plan = replace(
            plan, recorded=True, segments=NONE, rows=rows, graph_bytes=graphs, recording_bytes=tangent.recording_bytes,
            pass_bytes=0, row_bytes=row, krylov_bytes=left,
        )  # fmt: skip

    def _compare(self, tangent: TangentRoute, batch: Any) -> None:
        """Untraceable where a random product by double backward is another; its graphs are freed before the second."""
        parameters, generator = self.problem.parameters, torch.Generator().manual_seed(0)
        vectors = [torch.randn(1, *p.shape, generator=generator).to(p) for p in parameters.values()]
        found: list[list[Tensor]] = []
        for route in (self.double_backward, tangent):
            with (
                self.arithmetic.active(),
                closing(route.products(batch, list(parameters), [vectors])) as products,
            ):
                pairs = zip(next(products), vectors, strict=True)
                found.append(
                    [torch.zeros_like(v) if product is None else product for product, v in pairs]
                )
            route.release()
        norms = torch.stack(
            [torch.stack([a.norm(), (a - b).norm()]) for a, b in zip(*found, strict=True)]
        ).double()
        expected, difference = norms.T
        allowed = torch.finfo(self.problem.dtype).eps ** 0.5 * (expected + 1e-3 * expected.norm())
        if bool((difference > allowed).any()):
            worst = int((difference - allowed).argmax())
            raise Untraceable(
                f"its product for {list(parameters)[worst]} is not that of double backward"
            )

    def _retreat(self, todo: Todo, rows: int, failure: str) -> Todo:
        """Another plan that needs less, and what is left to do under it."""
        plan, step = self.plan, ""
        longest = max(batch_length(batch) or 1 for _, batch in plan.pieces)
        half = min(plan.rows, rows) // 2
        if half:
            plan, step = replace(plan, rows=half), f"{half} probes at once"
        elif self.without_tangent is not None:
            self.no_tangent, plan, step = "out of memory", self.without_tangent, "double backward"
        elif plan.recorded and not all(self.route.holds(batch) for _, batch in plan.pieces):
            plan, step = self._changed(plan, recorded=False), "graphs rebuilt for every product"
        elif (cut := self._halved(plan, todo, (longest + 1) // 2)) is not None:
            plan, todo = cut
            self.route.release()
            step = f"micro-batches of {(longest + 1) // 2}"
        elif (segments := self._more_segments(plan.segments)) is not None:
            plan, step = self._changed(plan, segments=segments), f"recomputing {segments}"
        else:
            raise MemoryError(
                f"out of memory ({failure}) with the most frugal plan: {plan}; pass shorter examples"
            )
        note = f"out of memory once, from then on {step}"
        if not any(note.startswith("out of memory") for note in plan.notes):
            told = f"{failure}: goes on with {step}; `route` tells of further steps"
            warnings.warn(told, RuntimeWarning, stacklevel=5)
        if half and self.without_tangent is not None:
            self.plan = replace(plan, notes=(*plan.notes, note))
        else:
            self._adopt(replace(plan, notes=(*plan.notes, note)))
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
        return todo

    def _more_segments(self, now: Segments) -> Segments | None:
        following = () if now.layers else (LAYERED,) if now else (STREAMED, LAYERED)
        for kind in following:
            if (
                self.trials.footprint(kind) is not None or not self.trials.refused[kind]
            ):  # perhaps too large, but right
                return kind
        return None

    def _changed(self, plan: Plan, **changes: Any) -> Plan:
        """The plan with other pieces, recording or segments, its bytes counted anew where they can be."""
        changed = replace(plan, **changes)
        if (found := self.trials.footprint(changed.segments)) is None:
            return changed
        counted = planned(changed.pieces, changed.recorded, changed.segments, found, self.budget)
        return replace(counted, rows=plan.rows, notes=plan.notes)

    def _halved(self, plan: Plan, todo: Todo, size: int) -> tuple[Plan, Todo] | None:
        """Plan and work in micro-batches of at most ``size``; None where they cannot be cut (further)."""
        problem = self.problem
        try:
            pieces = {
                id(batch): problem.split(weight, batch, size) for weight, batch in plan.pieces
            }
        except ValueError:
            return None
        if all(len(cut) == 1 for cut in pieces.values()):
            return None
        left = [
            (weight, piece, done) for _, batch, done in todo for weight, piece in pieces[id(batch)]
        ]
        return self._changed(
            plan, pieces=tuple(piece for cut in pieces.values() for piece in cut)
        ), left
