"""What to give up, in order, when memory runs out although the plan fitted.

A plan is made from counted bytes, but others use the memory as well, and kernels allocate what
nobody counts. So whoever follows a plan (:mod:`hessian_tools.curvature.engine.engine`) asks here
for one that needs less, and goes on with the work that is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hessian_tools.curvature.engine.plan import Plan, planned
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.segments.recompute import LAYERED, STREAMED
from hessian_tools.problem.batches import Batch, batch_length


@dataclass
class Work:
    """A micro-batch whose products are asked for."""

    weight: float  # in L
    batch: Batch
    rows_done: int = 0


@dataclass(frozen=True)
class Step:
    """A plan that needs less, and what is left to do under it."""

    plan: Plan
    work: Sequence[Work]
    words: str


@dataclass(frozen=True)
class Setback:
    """Where memory ran out: the plan followed, and what is left to do."""

    plan: Plan
    work: Sequence[Work]
    rows: int  # of the first micro-batch that are left
    graphs_held: bool  # whether the graphs of all micro-batches were recorded
    trials: Trials

    def fewer_probes(self) -> Step | None:
        """Half as many probes at once."""
        rows = min(self.plan.rows, self.rows) // 2
        if rows == 0:
            return None
        plan = replace(self.plan, rows=rows)
        return Step(plan, self.work, f"{rows} probes at once")

    def double_backward(self) -> Step | None:
        """No tangent program any more."""
        if self.plan.fallback is None:
            return None
        return Step(self.plan.fallback, self.work, "double backward")

    def rebuilt_graphs(self) -> Step | None:
        """Graphs one at a time, where they did not fit together."""
        if not self.plan.recorded or self.graphs_held:
            return None
        plan = self._counted_anew(replace(self.plan, recorded=False))
        return Step(plan, self.work, "graphs rebuilt for every product")

    def smaller_batches(self) -> Step | None:
        """Micro-batches of half as many examples, where the problem allows it."""
        longest = max(batch_length(batch) or 1 for _, batch in self.plan.pieces)
        size = (longest + 1) // 2
        split = self.trials.problem.split
        try:
            cuts = {id(batch): split(weight, batch, size) for weight, batch in self.plan.pieces}
        except ValueError:
            return None
        if all(len(cut) == 1 for cut in cuts.values()):
            return None
        pieces = [piece for _, batch in self.plan.pieces for piece in cuts[id(batch)]]
        plan = self._counted_anew(replace(self.plan, pieces=tuple(pieces)))
        work = [
            Work(weight, piece, old.rows_done)
            for old in self.work
            for weight, piece in cuts[id(old.batch)]
        ]
        return Step(plan, work, f"micro-batches of {size}")

    def more_segments(self) -> Step | None:
        """Attention and loss, then layers, computed again instead of kept."""
        now = self.plan.segments
        if now.layers:
            return None
        for segments in [LAYERED] if now else [STREAMED, LAYERED]:
            if self.trials.usable(segments):
                plan = self._counted_anew(replace(self.plan, segments=segments))
                return Step(plan, self.work, f"recomputing {segments}")
        return None

    def _counted_anew(self, plan: Plan) -> Plan:
        """The plan with the bytes of its ways, where they can be counted."""
        footprint = self.trials.footprint(plan.segments)
        if footprint is None:
            return plan
        budget = self.trials.budget
        counted = planned(plan.pieces, plan.recorded, plan.segments, footprint, budget)
        return replace(
            plan,
            needs=counted.needs,
            krylov_bytes=counted.krylov_bytes,
            bounded=False,
        )


# In order: what costs the least time first.
_WAYS_OUT: tuple[Callable[[Setback], Step | None], ...] = (
    Setback.fewer_probes,
    Setback.double_backward,
    Setback.rebuilt_graphs,
    Setback.smaller_batches,
    Setback.more_segments,
)


def retreat(setback: Setback, failure: str) -> Step:
    """The first way out that the plan and the model allow; the plan's notes tell of it.

    Raises:
        MemoryError: there is nothing left to give up; it quotes ``failure``.
    """
    for way_out in _WAYS_OUT:
        step = way_out(setback)
        if step is not None:
            note = f"out of memory once, from then on {step.words}"
            plan = replace(step.plan, notes=(*step.plan.notes, note))
            return replace(step, plan=plan)
    raise MemoryError(
        f"out of memory ({failure}) with the most frugal plan: {setback.plan}; "
        "pass shorter examples"
    )
