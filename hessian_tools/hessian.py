"""HessianOperator: products with the Hessian of a Problem's loss and with its diagonal blocks.

The engine goes through micro-batches and chunks of rows as the plan says (:mod:`hessian_tools.plan`: what is recorded,
cut and recomputed within the memory budget); a route does the differentiation on one micro-batch
(:mod:`hessian_tools.double_backward`). Once products have cost enough to pay for tracing, and where memory allows, a
linear program takes over (:mod:`hessian_tools.linear_route`), after it has given the same product. Another route is
another class with ``products``, ``holds``, ``release`` and ``name``.

Letters: P parameters, k probes, n size of a block, B blocks of a cut, r = B k rows.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessian_tools.double_backward import DoubleBackward
from hessian_tools.gradient_graph import Untraceable
from hessian_tools.linear_route import Linearised
from hessian_tools.memory import budget_bytes, format_bytes, is_out_of_memory, keep_freed_memory, return_freed_memory
from hessian_tools.operators import SymmetricOperator
from hessian_tools.partition import Block, Cut
from hessian_tools.plan import MAX_ROWS, PRODUCT_SHARE, Plan, Wishes, choose, planned
from hessian_tools.precision import PRECISIONS, Arithmetic, arithmetic
from hessian_tools.problem import Problem, batch_length
from hessian_tools.recompute import LAYERED, NONE, STREAMED, Segments
from hessian_tools.trials import Trials
from hessian_tools.verification import Verification, verify

Spread = Callable[[slice], Sequence[Tensor | None]]  # None: zero
Collect = Callable[[slice, Sequence[Tensor | None], float], None]
Todo = list[tuple[float, Any, int]]  # weight in L, micro-batch, rows that are done
ROUTES = ("auto", "linear program", "double backward")
# operations of products, made or announced, after which "auto" traces: a linear program saves by then the seconds that
# tracing takes; counted, so that runs agree
_WORTH_TRACING = {"cpu": 7e11, "cuda": 1e14}


class _Engine:
    """Second derivatives of a Problem between chosen parameter tensors; shared by the Hessian and all its blocks.

    It follows the plan over micro-batches and chunks of rows, and changes the plan where memory runs out; the route
    does the differentiation on one micro-batch.
    """

    def __init__(
        self, problem: Problem, arithmetic: Arithmetic, memory: str | int, wishes: Wishes, wanted: str
    ) -> None:
        self.problem, self.arithmetic, self.wanted = problem, arithmetic, wanted
        self.budget = budget_bytes(memory, problem.device)
        self.trials = Trials(problem, arithmetic, self.budget)
        self.double_backward = DoubleBackward(problem)
        self.route: DoubleBackward | Linearised = self.double_backward
        self.without_linear: Plan | None = None  # the plan to go back to from a linear program
        self.not_linear = ""  # why no linear program is used
        self._made = self._expected = 0.0  # operations of products, by counted cost
        refused = self.trials.refused
        if wishes.segments and self.trials.footprint(wishes.segments) is None and refused[wishes.segments]:
            raise ValueError(f"segments is {wishes.segments!r}, but layers cannot be: {refused[wishes.segments]}")
        if problem.device.type == "cpu":
            keep_freed_memory()
        plan = choose(problem, self.budget, self.trials.footprint, wishes)
        reasons = [f"layers cannot be recomputed: {why}" for kind, why in refused.items() if why and kind.layers]
        self._adopt(replace(plan, notes=tuple(reasons)))

    def products(self, names: Sequence[str], count: int, spread: Spread, collect: Collect) -> None:
        """sum_b H_ab v_b for all a and b among ``names``, for ``count`` rows v, a part at a time.

        ``spread(part)`` gives the tensors v_b of a part of the rows (None for zeros, which then cost nothing),
        ``collect(part, products, weight)`` takes weight times their products. What is collected is kept when memory
        runs out; the rest is done in another way.
        """
        if self.problem.device.type == "cpu":
            keep_freed_memory()
        if self._linear_is_due(count, len(names) == len(self.problem.parameters)):
            self._linearise()
        todo = [(weight, batch, 0) for weight, batch in self.plan.pieces]
        while todo and count:
            weight, batch, first = todo[0]
            parts = [slice(i, min(i + self.plan.rows, count)) for i in range(first, count, self.plan.rows)]
            failure = ""
            try:
                with self.arithmetic.active(), closing(self.route.products(batch, names, map(spread, parts))) as found:
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
        why = f" (no linear program: {self.not_linear})" if self.not_linear else ""
        return f"{self.route.name}{why}; {self.plan}; {self.arithmetic}"

    def _adopt(self, plan: Plan) -> None:
        if self.route is not self.double_backward:
            self.route.release()
        self.plan, self.without_linear, self.route, route = plan, None, self.double_backward, self.double_backward
        if (plan.recorded, plan.segments) != (route.recorded, route.segments):
            route.release()
            route.recorded, route.segments = plan.recorded, plan.segments

    def _linear_is_due(self, rows: int, whole: bool) -> bool:
        """Whether to change to a linear program now; counts the work of the product that comes."""
        if self.route is not self.double_backward or self.wanted == "double backward" or self.not_linear:
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

    def _linearise(self) -> None:
        """Takes a linear program as the route if there is one, it fits the budget and it gives the same product."""
        problem, plan, batches = self.problem, self.plan, [batch for _, batch in self.plan.pieces]
        try:
            linear = Linearised(problem, batches)
            graphs = linear.graph_bytes
            row = linear.row_bytes + 2 * problem.num_parameters * problem.dtype.itemsize
            rows = min(MAX_ROWS, (int(PRODUCT_SHARE * self.budget) - graphs) // row)
            if rows < 1:
                needed = format_bytes((graphs + row) / PRODUCT_SHARE)
                raise Untraceable(f"its constants and a probe's pass need a budget of {needed}")
            self._compare(linear, batches[0])
        except Untraceable as reason:
            if self.wanted == "linear program":
                raise ValueError(f"route='linear program' cannot be had: {reason}; pass route='auto'") from reason
            self.not_linear = str(reason)
            return
        left = max(0, self.budget - graphs - max(linear.recording_bytes, rows * row))
        self.without_linear, self.route = plan, linear
        self.plan = replace(
            plan, recorded=True, segments=NONE, rows=rows, graph_bytes=graphs, recording_bytes=linear.recording_bytes,
            pass_bytes=0, row_bytes=row, krylov_bytes=left,
        )  # fmt: skip

    def _compare(self, linear: Linearised, batch: Any) -> None:
        """Untraceable where a random product by double backward is another; its graphs are freed before the second."""
        parameters, generator = self.problem.parameters, torch.Generator().manual_seed(0)
        vectors = [torch.randn(1, *p.shape, generator=generator).to(p) for p in parameters.values()]
        found: list[list[Tensor]] = []
        for route in (self.double_backward, linear):
            with self.arithmetic.active(), closing(route.products(batch, list(parameters), [vectors])) as products:
                pairs = zip(next(products), vectors, strict=True)
                found.append([torch.zeros_like(v) if product is None else product for product, v in pairs])
            route.release()
        norms = torch.stack([torch.stack([a.norm(), (a - b).norm()]) for a, b in zip(*found, strict=True)]).double()
        expected, difference = norms.T
        allowed = torch.finfo(self.problem.dtype).eps ** 0.5 * (expected + 1e-3 * expected.norm())
        if bool((difference > allowed).any()):
            worst = int((difference - allowed).argmax())
            raise Untraceable(f"its product for {list(parameters)[worst]} is not that of double backward")

    def _retreat(self, todo: Todo, rows: int, failure: str) -> Todo:
        """Another plan that needs less, and what is left to do under it."""
        plan, step = self.plan, ""
        longest = max(batch_length(batch) or 1 for _, batch in plan.pieces)
        half = min(plan.rows, rows) // 2
        if half:
            plan, step = replace(plan, rows=half), f"{half} probes at once"
        elif self.without_linear is not None:
            self.not_linear, plan, step = "out of memory", self.without_linear, "double backward"
        elif plan.recorded and not all(self.route.holds(batch) for _, batch in plan.pieces):
            plan, step = self._changed(plan, recorded=False), "graphs rebuilt for every product"
        elif (cut := self._halved(plan, todo, (longest + 1) // 2)) is not None:
            plan, todo = cut
            self.route.release()
            step = f"micro-batches of {(longest + 1) // 2}"
        elif (segments := self._more_segments(plan.segments)) is not None:
            plan, step = self._changed(plan, segments=segments), f"recomputing {segments}"
        else:
            raise MemoryError(f"out of memory ({failure}) with the most frugal plan: {plan}; pass shorter examples")
        note = f"out of memory once, from then on {step}"
        if not any(note.startswith("out of memory") for note in plan.notes):
            told = f"{failure}: goes on with {step}; `route` tells of further steps"
            warnings.warn(told, RuntimeWarning, stacklevel=5)
        if half and self.without_linear is not None:
            self.plan = replace(plan, notes=(*plan.notes, note))
        else:
            self._adopt(replace(plan, notes=(*plan.notes, note)))
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()
        return todo

    def _more_segments(self, now: Segments) -> Segments | None:
        following = () if now.layers else (LAYERED,) if now else (STREAMED, LAYERED)
        for kind in following:
            if self.trials.footprint(kind) is not None or not self.trials.refused[kind]:  # perhaps too large, but right
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
            pieces = {id(batch): problem.split(weight, batch, size) for weight, batch in plan.pieces}
        except ValueError:
            return None
        if all(len(cut) == 1 for cut in pieces.values()):
            return None
        left = [(weight, piece, done) for _, batch, done in todo for weight, piece in pieces[id(batch)]]
        return self._changed(plan, pieces=tuple(piece for cut in pieces.values() for piece in cut)), left


class _Sum:
    """The products of micro-batches, added up in the dtype of the vectors: ``rows`` (k, n), pieces of given sizes."""

    def __init__(self, vectors: Tensor, sizes: Sequence[int]) -> None:
        self.rows, self._sizes = torch.empty_like(vectors), sizes
        self._begun = 0  # rows below this hold a sum; the others' first product is written, which saves two passes

    def add(self, part: slice, products: Sequence[Tensor | None], weight: float) -> None:
        first = part.start >= self._begun
        for place, product in zip(self.rows[part].split(self._sizes, dim=1), products, strict=True):
            if product is None:
                if first:
                    place.zero_()
            elif first:
                place.copy_(product.reshape(place.shape))
                if weight != 1:
                    place.mul_(weight)
            else:
                place.add_(product.reshape(place.shape), alpha=weight)
        self._begun = max(self._begun, part.stop)


class HessianOperator(SymmetricOperator):
    """The (P, P) Hessian of L, the pooled mean loss of a Problem; vectors follow ``problem.parameters``' order.

    Args:
        problem: the Problem.
        memory: budget beyond model and data: "auto" (70 % of what is free), bytes, or "8GiB". It decides whether
            gradient graphs are recorded, how batches are cut, how many probes go together, and how Lanczos must save.
        record: force recording (True) or rebuilding (False) of the graphs; None lets the budget decide.
        microbatch: cut batches to at most so many examples; None lets the budget decide.
        segments: what is computed again instead of kept, a :class:`hessian_tools.recompute.Segments`; None lets the
            budget decide.
        precision: of float32 matrix products and convolutions on CUDA: "ieee" (true float32), "tf32" (faster), or "as
            given", as the process is set (PyTorch's own: TF32 for convolutions). See :mod:`hessian_tools.precision`.
        route: "double backward"; "linear program", which is faster, but must be traced (seconds) and checked against
            the former; "auto" changes from the first to the second once products have cost enough, if it can.

    Products are computed in the dtype of the parameters; ``dtype``, that of vectors, products and sums over batches, is
    float32 where that is bfloat16. ``arithmetic`` says what came of it.
    ``plan`` says what is recorded, cut and recomputed and the peak it expects, ``route`` in words how products are
    computed, ``krylov_bytes`` what the budget leaves for Lanczos vectors. When memory runs out all the same, fewer
    probes go together, then graphs are rebuilt, batches cut, segments recomputed, with one warning.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut; a model in float16; a
            ``precision`` that is unknown, or TF32 for a model that is not in float32.
        NotTwiceDifferentiable: naming the operation or custom Function.
        NumericalError: for a gradient that is not finite.
    """

    def __init__(
        self, problem: Problem, *, memory: str | int = "auto", record: bool | None = None,
        microbatch: int | None = None, segments: Segments | None = None, precision: str = PRECISIONS[0],
        route: str = "auto",
    ) -> None:  # fmt: skip
        if not isinstance(problem, Problem):
            raise TypeError(f"problem is a {type(problem).__name__}; pass ht.Problem(model, loss_fn, batches)")
        self.arithmetic = arithmetic(problem.model, precision)
        super().__init__(problem.num_parameters, self.arithmetic.vectors, problem.device)
        self.problem = problem
        if route not in ROUTES:
            raise ValueError(f"route is {route!r}; allowed are {', '.join(map(repr, ROUTES))}")
        self._engine = _Engine(problem, self.arithmetic, memory, Wishes(record, microbatch, segments), route)

    def _matmat(self, vectors: Tensor) -> Tensor:
        shapes = [p.shape for p in self.problem.parameters.values()]
        sizes = [shape.numel() for shape in shapes]
        total = _Sum(vectors, sizes)

        def spread(part: slice) -> list[Tensor]:
            pieces = zip(vectors[part].split(sizes, dim=1), shapes, strict=True)
            return [piece.reshape(-1, *shape) for piece, shape in pieces]

        self._engine.products(list(self.problem.parameters), len(vectors), spread, total.add)
        return total.rows

    def block(self, block: Block) -> "StackedBlocks":
        """The diagonal block H_bb of one Block, an (n, n) operator."""
        return StackedBlocks(self, block.as_cut())

    def stacked(self, cut: Cut) -> "StackedBlocks":
        """All diagonal blocks of a Cut, whose products go through the engine together."""
        return StackedBlocks(self, cut)

    def expect(self, num_matvecs: int, blocks: int = 1) -> None:
        """So many products will be asked for, of one block (the whole Hessian) or of several: "auto" then does at once
        what a long run is worth. Those who run Lanczos on this operator (:func:`hessian_tools.slq`) say it themselves.
        """
        self._engine.expect(num_matvecs, blocks == 1)

    def verify(self, blocks: Sequence[Block] = (), *, seed: int = 0) -> Verification:
        """Holds this operator against finite differences of the gradient and against what a Hessian must fulfil.

        Costs about 100 forward passes and a float64 copy of the model. See :func:`hessian_tools.verification.verify`.
        """
        return verify(self, blocks, seed=seed)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._engine.release()

    @property
    def route(self) -> str:
        return self._engine.described

    @property
    def plan(self) -> Plan:
        """How products are computed within the memory budget; another one after memory has run out."""
        return self._engine.plan

    def announcement(self, products: int, blocks: int) -> str:
        """The plan in lines to print before ``products`` products of ``blocks`` blocks; times a forward pass."""
        problem, (_, batch) = self.problem, self.plan.pieces[0]
        with problem.evaluating(), torch.no_grad():
            float(problem.batch_loss(batch))  # the first pass pays for warming up
            started = time.perf_counter()
            float(problem.batch_loss(batch))
            seconds = time.perf_counter() - started
        share = (batch_length(batch) or 1) / sum(batch_length(piece) or 1 for _, piece in self.plan.pieces)
        return self.plan.announcement(products, blocks, seconds / share)

    @property
    def krylov_bytes(self) -> int:
        return self.plan.krylov_bytes


class StackedBlocks(SymmetricOperator):
    """The B diagonal blocks of a Cut side by side: row i of a batch of r = B k belongs to block i // k.

    One block (B = 1) is an (n, n) operator H_bb like any other; to Lanczos, which works row by row, several are one as
    well. ``names`` are the blocks'. ``matmat`` raises ValueError for a number of rows that is no multiple of B.
    """

    def __init__(self, hessian: HessianOperator, cut: Cut) -> None:
        super().__init__(cut.block_size, hessian.dtype, hessian.device)
        self._engine = hessian._engine
        self.cut, self.num_blocks, self.names = cut, cut.num_blocks, cut.names

    def _matmat(self, vectors: Tensor) -> Tensor:
        if vectors.shape[0] % self.num_blocks:
            raise ValueError(f"vectors has {vectors.shape[0]} rows; {self.num_blocks} blocks need a multiple of that")
        names = list(self.cut.parameters)
        sizes = [part.block_size for part in self.cut.parts]
        total = _Sum(vectors, sizes)
        # a row is its block's vector in that block's place of the tensor, and zero elsewhere
        owner = torch.arange(len(vectors), device=self.device) // max(1, len(vectors) // self.num_blocks)

        def spread(rows: slice) -> list[Tensor]:
            wide: dict[str, Tensor] = {}
            for part, piece in zip(self.cut.parts, vectors[rows].split(sizes, dim=1), strict=True):
                if self.num_blocks == 1 and not part.axes and piece.shape[1] == math.prod(part.shape):
                    wide[part.parameter] = piece.reshape(-1, *part.shape)
                    continue
                placed = piece.new_zeros(len(piece), self.num_blocks, piece.shape[1])
                placed[torch.arange(len(piece), device=self.device), owner[rows]] = piece
                if part.parameter not in wide:
                    wide[part.parameter] = piece.new_zeros(len(piece), *part.shape)
                part.place(placed, wide[part.parameter])
            return [wide[name] for name in names]

        def collect(rows: slice, products: Sequence[Tensor | None], weight: float) -> None:
            local = torch.arange(rows.stop - rows.start, device=self.device)
            chosen = (products[names.index(part.parameter)] for part in self.cut.parts)
            pairs = zip(self.cut.parts, chosen, strict=True)
            total.add(rows, [None if p is None else part.rows(p)[local, owner[rows]] for part, p in pairs], weight)

        self._engine.products(names, len(vectors), spread, collect)
        return total.rows
