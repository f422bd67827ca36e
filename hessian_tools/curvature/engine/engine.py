"""The engine: products with second derivatives of a Problem's loss, within a memory budget.

It goes through micro-batches and chunks of rows as the plan says
(:mod:`hessian_tools.curvature.engine.plan`: what is recorded, cut and recomputed); a route does the
differentiation on one micro-batch (:mod:`hessian_tools.curvature.engine.double_backward`). Once
products have cost, or are announced to cost, enough to pay for tracing, and where memory allows, a
tangent program takes over (:mod:`hessian_tools.curvature.tangent.route`), after it has given the
same product. Another route is another class with ``products``, ``holds``, ``release`` and ``name``.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from hessian_tools.curvature.engine.custom_functions import refuse_unlike_backward
from hessian_tools.curvature.engine.derivative import HESSIAN, Derivative
from hessian_tools.curvature.engine.memory import (
    budget_bytes,
    is_out_of_memory,
    keep_freed_memory,
    return_freed_memory,
)
from hessian_tools.curvature.engine.plan import (
    MAX_ROWS,
    Plan,
    PlanRequest,
    choose,
    undoubted,
)
from hessian_tools.curvature.engine.precision import Arithmetic
from hessian_tools.curvature.engine.retreat import Setback, Work, retreat
from hessian_tools.curvature.engine.takeover import Route, tangent_program
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.tangent.graph import Untraceable
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.weights import Watch

Spread = Callable[[slice], Sequence[Tensor | None]]  # rows -> v_b by parameter; None: zero
Collect = Callable[[slice, Sequence[Tensor | None], float], None]  # rows, products, weight in L
ROUTES = ("auto", "tangent program", "double backward")

# Operations of products, made or announced, after which "auto" traces: a tangent program saves by
# then the seconds that tracing takes. They are counted, not timed, so that runs agree.
_WORTH_TRACING = {"cpu": 7e11, "cuda": 1e14}

# Forward passes of products, made or announced, from which trials of 33 to 100 passes are worth
# their price: they may find room for more probes at once.
WORTH_TRIALS = 2000


class Engine:
    """Second derivatives of a Problem between chosen parameter tensors.

    Shared by the Hessian and all its blocks. It follows the plan over micro-batches and chunks of
    rows, and changes the plan where memory runs out; the route does the differentiation on one
    micro-batch.
    """

    def __init__(
        self,
        problem: Problem,
        arithmetic: Arithmetic,
        memory: str | int,
        request: PlanRequest,
        wanted: str,
        derivative: Derivative = HESSIAN,
    ) -> None:
        self.problem = problem
        self.derivative = derivative
        self.arithmetic = arithmetic
        self.wanted = wanted  # one of ROUTES
        budget = budget_bytes(memory, problem.device)
        self.trials = Trials(problem, arithmetic, budget, derivative)
        self.double_backward = derivative.recorded(problem)
        self.route: Route = self.double_backward
        self.no_tangent = ""  # why no tangent program is used
        self._watch = Watch(problem)
        self._steady = False  # whether nothing changes for the time being
        self._made = 0.0  # operations of products, by counted cost
        self._expected = 0.0  # the same of those announced
        self._passes = 0.0  # forward passes of products made
        self._request = request
        self._keep_freed_memory()
        has_custom_functions = refuse_unlike_backward(problem)
        # only trials show whether a custom Function can be differentiated twice
        plan = None if has_custom_functions else undoubted(self.trials, request)
        self._adopt(plan or choose(self.trials, request))
        # counted here, for products call the model for themselves only
        self._example_operations = self.trials.example_operations if wanted == "auto" else 0.0

    def products(self, names: Sequence[str], count: int, spread: Spread, collect: Collect) -> None:
        """sum_b H_ab v_b for all a and b among ``names``, for ``count`` rows v, a part at a time.

        ``spread(part)`` gives the tensors v_b of a part of the rows (None for zeros, which then
        cost nothing), ``collect(part, products, weight)`` takes weight times their products. What
        is collected is kept when memory runs out; the rest is done in another way.
        """
        self._keep_freed_memory()
        if not self._steady:
            self._forget_stale()
        whole = len(names) == len(self.problem.parameters)
        self._passes += count * self.passes(whole)
        self.measure_if_worth(self._passes)
        if self._tangent_is_due(count, whole):
            self._take_tangent()
        work: Sequence[Work] = [Work(weight, batch) for weight, batch in self.plan.pieces]
        while work and count:
            failure = self._advance(work[0], names, count, spread, collect)
            # By now the exception, and with it what the failed pass held, is gone.
            work = self._retreat(work, count, failure) if failure else work[1:]
        self._watch.look_away()

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within it, model and data are taken not to change: they are looked at once, on entering.

        A look costs a pass over the weights, and on a device makes the host wait.
        """
        if self._steady:
            yield
            return
        self._forget_stale()
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def _forget_stale(self) -> None:
        """Frees what was kept for other weights or data than those that are there now."""
        change = self._watch.change()
        if change:
            self.route.release()
        if change == "tensors" and self.plan.fallback is not None:
            # a tangent program holds the tensors that it was traced with
            self._adopt(self.plan.fallback)

    def _advance(
        self,
        work: Work,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> str:
        """Does the rows of one micro-batch that are left; how memory ran out, or ""."""
        together = self.plan.rows
        starts = range(work.rows_done, count, together)
        parts = [slice(start, min(start + together, count)) for start in starts]
        try:
            chunks = self.route.products(work.batch, names, map(spread, parts))
            with self.arithmetic.active(), closing(chunks) as products:
                for part in parts:
                    collect(part, next(products), work.weight)
                    work.rows_done = part.stop
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return str(error).split("\n")[0] or type(error).__name__
        return ""

    def passes(self, whole: bool) -> float:
        """The counted cost of a probe, in forward passes: of the whole matrix, or of a block."""
        of_all, of_a_block = self.derivative.passes
        return of_all if whole else of_a_block

    def measure(self) -> None:
        """Makes the trials that a bound of the bytes has saved so far, and plans by them."""
        has_run_out = bool(self.plan.notes)  # what that has taught is worth more than trials
        if self.plan.bounded and not has_run_out:
            self.route.release()
            self._adopt(choose(self.trials, self._request))

    def measure_if_worth(self, passes: float) -> None:
        """The same, if products that cost so many forward passes may gain by it."""
        if passes > WORTH_TRIALS and self.plan.rows < MAX_ROWS:
            self.measure()

    def expect(self, rows: int, whole: bool) -> None:
        """Announces ``rows`` products, of the whole Hessian or of blocks."""
        self.measure_if_worth(rows * self.passes(whole))
        if self.wanted == "auto":
            self._expected += self._cost(rows, whole)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self.route.release()
        if self.problem.device.type == "cpu":
            return_freed_memory()

    @property
    def described(self) -> str:
        """Route, plan and arithmetic in words."""
        why = f" (no tangent program: {self.no_tangent})" if self.no_tangent else ""
        return f"{self.route.name}{why}; {self.plan}; {self.arithmetic}"

    def _keep_freed_memory(self) -> None:
        if self.problem.device.type == "cpu":
            keep_freed_memory()

    def _adopt(self, plan: Plan) -> None:
        """Goes on under ``plan``, without the tangent program if it is not for one."""
        if plan.fallback is None and self.route is not self.double_backward:
            self.route.release()
            self.route = self.double_backward
        if plan.fallback is None:
            self.double_backward.configure(plan.recorded, plan.segments)
        self.plan = plan

    def _retreat(self, work: Sequence[Work], count: int, failure: str) -> Sequence[Work]:
        """Changes to a plan that needs less; what is left to do under it."""
        held = all(self.route.holds(batch) for _, batch in self.plan.pieces)
        left = count - work[0].rows_done
        before = self.plan
        step = retreat(Setback(before, work, left, held, self.trials), failure)
        if not any(note.startswith("out of memory") for note in step.plan.notes[:-1]):
            words = f"{failure}: goes on with {step.words}; `route` tells of further steps"
            warnings.warn(words, RuntimeWarning, stacklevel=6)  # at the caller of matmat
        if step.plan.pieces is not before.pieces:  # graphs are kept by micro-batch
            self.route.release()
        if step.plan.fallback is None and self.route is not self.double_backward:
            self.no_tangent = "out of memory"
        self._adopt(step.plan)
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
        return step.work

    def _tangent_is_due(self, rows: int, whole: bool) -> bool:
        """Whether to change to a tangent program now; counts the work of the coming product."""
        settled = self.wanted == "double backward" or self.no_tangent
        if settled or self.route is not self.double_backward:
            return False
        if self.wanted == "tangent program":
            return True
        if not self.plan.recorded or self.plan.segments:
            return False  # memory is short already, and a tangent program keeps its constants
        self._made += self._cost(rows, whole)
        worth = _WORTH_TRACING.get(self.problem.device.type, _WORTH_TRACING["cpu"])
        return max(self._made, self._expected) > worth

    def _cost(self, rows: int, whole: bool) -> float:
        """Floating-point operations of products, as double backward makes them."""
        examples = sum(batch_length(batch) or 1 for _, batch in self.plan.pieces)
        operations = rows * examples * self._example_operations
        return operations * self.passes(whole)

    def _take_tangent(self) -> None:
        """Changes to a tangent program if there is one that fits and gives the same product."""
        try:
            program = tangent_program(self.trials, self.double_backward, self.plan)
        except Exception as error:
            # a model may do anything when it is traced; double backward shows what is really wrong
            reason = str(error).strip().split("\n")[0][:200]
            if not isinstance(error, Untraceable):
                reason = f"{type(error).__name__}: {reason}"
            if self.wanted == "tangent program":
                raise ValueError(
                    f"route='tangent program' cannot be had: {reason}; pass route='auto'"
                ) from error
            self.double_backward.release()
            self.no_tangent = reason
            return
        self.route, self.plan = program
