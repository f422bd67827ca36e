"""Plan: what is recorded, cut and recomputed so that products stay within a memory budget.

Nothing is guessed. Where the bytes alive while one graph is recorded show that the cheapest way
fits by far, :func:`undoubted` takes it. Else :mod:`hessian_tools.curvature.engine.trials` counts
the bytes alive in small products, :mod:`hessian_tools.curvature.engine.footprint` derives from them
the peak of every way to compute, and :func:`choose` takes the cheapest that fits. A probe of the
whole Hessian costs, F being a forward pass and k the probes that go together:

    recorded                               6 F
    recorded, attention and loss streamed  little more than 6 F
    recorded, layers recomputed            6 F + 3 F / k
    rebuilt                                6 F + 3 F / k
    rebuilt, streamed                      little more than 6 F + 3 F / k
    rebuilt, layers recomputed             6 F + 7 F / k

each with whole batches or with micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from hessian_tools.curvature.engine.footprint import Footprint, Needs
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.segments.recompute import LAYERED, NONE, STREAMED, Segments
from hessian_tools.problem.batches import Batch, batch_length
from hessian_tools.problem.problem import Problem

MAX_ROWS = 64  # more probes at once bring no further speed and cost memory
PRODUCT_SHARE = 0.6  # of the budget, for graphs and passes; the rest is for Lanczos vectors
LAST_SHARE = 0.95  # where nothing fits into that
MOST_PIECES = 8  # a batch is cut into no more while there is another way

# What is tried in turn: the share of the budget, and how often a batch may be cut (None: down to
# single examples).
_STAGES = ((PRODUCT_SHARE, MOST_PIECES), (PRODUCT_SHARE, None), (LAST_SHARE, None))

Piece = tuple[float, Batch]  # weight in L, micro-batch


@dataclass(frozen=True)
class PlanRequest:
    """What a user has settled; None: the budget decides."""

    record: bool | None = None
    microbatch: int | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class Plan:
    """How products are computed within the memory budget. All bytes are besides model and data."""

    recorded: bool  # graphs of the gradient kept for all products (else rebuilt for each)
    segments: Segments  # what is computed again instead of kept
    pieces: tuple[Piece, ...] = field(repr=False)
    rows: int  # probes that go through together
    needs: Needs
    krylov_bytes: int  # what the budget leaves for Lanczos vectors
    bounded: bool = False  # whether ``needs`` are at most that, not measured by trials
    notes: tuple[str, ...] = ()  # what was not possible, and what running out of memory has changed
    # The plan for double backward to go back to, where this one is for a tangent program.
    fallback: "Plan | None" = field(default=None, repr=False)

    @property
    def graph_bytes(self) -> int:
        """Bytes of all graphs (recorded) or of the largest (rebuilt)."""
        return self.needs.graphs

    def peak_bytes(self, rows: int | None = None) -> int:
        """The peak of products of the whole Hessian with ``rows`` probes, by default ``self.rows``.

        Products of blocks need less.
        """
        return self.needs.peak(self.rows if rows is None else rows)

    def __str__(self) -> str:
        return "; ".join([self._graphs(), self._peaks(), *self.notes])

    def _graphs(self) -> str:
        kind = "recorded once" if self.recorded else "rebuilt for every product"
        most = "at most " if self.bounded else ""
        graphs = f"{most}{format_bytes(self.graph_bytes)}"
        again = f", recomputing {self.segments}" if self.segments else ""
        return (
            f"{len(self.pieces)} gradient graph(s) {kind} ({graphs}){again}, "
            f"up to {self.rows} probes at once"
        )

    def _peaks(self) -> str:
        most = "at most " if self.bounded else ""
        return (
            f"peak {most}{format_bytes(self.peak_bytes())} for the whole matrix "
            f"({format_bytes(self.peak_bytes(1))} with one probe; blocks need less)"
        )

    def announcement(
        self,
        products: int,
        blocks: int,
        passes: float,
        forward_seconds: float,
        kind: str = "Hessian-vector",
    ) -> str:
        """The lines to print before ``products`` matrix-vector products of ``blocks`` blocks.

        Time is a forecast from ``forward_seconds``, one forward pass over all data, and the counted
        cost of a product, ``passes`` forward passes and what is recomputed.
        """
        rebuilding = 0 if self.recorded else 3 / self.rows
        recomputing = 4 / self.rows if self.segments.layers else 0
        seconds = products * forward_seconds * (passes + (rebuilding + recomputing))
        memory = "; ".join([self._peaks(), *self.notes])
        return (
            f"plan: {products} {kind} products for {blocks} block(s), "
            f"about {_duration(seconds)}\n"
            f"plan: {self._graphs()}\n"
            f"plan: {memory}; {format_bytes(self.krylov_bytes)} left for Lanczos vectors"
        )


@dataclass(frozen=True)
class Candidate:
    """One way to compute, with batches cut to at most ``size`` examples (None: whole batches)."""

    recorded: bool
    segments: Segments
    size: int | None
    footprint: Footprint
    peak: int  # bytes of products with one probe
    share: float  # of the budget that it may take

    def plan(self, problem: Problem, budget: int) -> Plan:
        """The plan that carries it out.

        Raises:
            ValueError: a batch cannot be cut.
        """
        pieces = _pieces(problem, self.size)
        return planned(pieces, self.recorded, self.segments, self.footprint, budget)


def planned(
    pieces: Sequence[Piece],
    recorded: bool,
    segments: Segments,
    footprint: Footprint,
    budget: int,
) -> Plan:
    """The plan for given micro-batches, with as many probes at once as the budget allows."""
    needs = footprint.needs([batch_length(batch) or 1 for _, batch in pieces], recorded)
    room = int(PRODUCT_SHARE * budget) - needs.graphs - needs.fixed
    rows = max(1, min(MAX_ROWS, room // max(needs.row, 1)))
    left = max(0, budget - needs.peak(rows))
    return Plan(recorded, segments, tuple(pieces), rows, needs, krylov_bytes=left)


def undoubted(trials: Trials, request: PlanRequest) -> Plan | None:
    """The plan that costs least, where a bound of its bytes lies within the budget.

    None where that is in doubt, and trials must decide. The bound may leave room for fewer probes
    at once than there is; what is worth more products is worth trials later.

    Raises:
        ValueError: a batch that cannot be cut as requested.
    """
    footprint = None if request.segments else trials.bound()
    if footprint is None:
        return None
    problem, budget = trials.problem, trials.budget
    recorded = request.record is not False
    needs = footprint.needs(_lengths(problem, request.microbatch), recorded)
    if needs.peak() > PRODUCT_SHARE * budget:
        return None
    pieces = _pieces(problem, request.microbatch)
    plan = planned(pieces, recorded, NONE, footprint, budget)
    return replace(plan, bounded=True)


def choose(trials: Trials, request: PlanRequest) -> Plan:
    """The cheapest plan within the budget of ``trials``; its notes say what was not possible.

    With ``record=True`` or a ``microbatch`` nothing is refused: of what is left the way with the
    lowest peak is taken.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut; layers
            that must but cannot be segments.
    """
    asked = request.segments
    if asked and not trials.usable(asked):
        raise ValueError(f"segments is {asked!r}, but layers cannot be: {trials.refused[asked]}")
    plan = _cheapest(trials, request)
    reasons = [
        f"layers cannot be recomputed: {reason}"
        for segments, reason in trials.refused.items()
        if reason and segments.layers
    ]
    return replace(plan, notes=tuple(reasons))


def _cheapest(trials: Trials, request: PlanRequest) -> Plan:
    problem, budget = trials.problem, trials.budget
    tried: list[Candidate] = []
    uncuttable = ""
    for candidate in _candidates(trials, request):
        if uncuttable and candidate.size is not None:
            continue  # what forbade one size forbids all
        tried.append(candidate)
        if candidate.peak > candidate.share * budget:
            continue
        try:
            return candidate.plan(problem, budget)
        except ValueError as error:
            if request.microbatch is not None:
                raise
            uncuttable = str(error)
    if tried and (request.record or request.microbatch is not None):
        return min(tried, key=lambda candidate: candidate.peak).plan(problem, budget)
    raise ValueError(uncuttable or _too_little(trials, request, tried))


def _candidates(trials: Trials, request: PlanRequest) -> Iterator[Candidate]:
    """Ways to compute in order of cost, those that leave room for Lanczos vectors first.

    A way is measured when its turn comes.
    """
    for share, most_pieces in _STAGES:
        for recorded, segments in _ways(request):
            footprint = trials.footprint(segments)
            if footprint is None:
                continue
            for size in _sizes(trials.problem, request.microbatch, most_pieces):
                peak = footprint.needs(_lengths(trials.problem, size), recorded).peak()
                yield Candidate(recorded, segments, size, footprint, peak, share)


def _ways(request: PlanRequest) -> list[tuple[bool, Segments]]:
    """(recorded, segments) in order of cost, as far as the user has not settled them."""
    kinds = [NONE, STREAMED, LAYERED] if request.segments is None else [request.segments]
    recording = [True, False] if request.record is None else [request.record]
    return [(recorded, kind) for recorded in recording for kind in kinds]


def _sizes(
    problem: Problem,
    microbatch: int | None,
    most_pieces: int | None,
) -> Iterator[int | None]:
    """Micro-batches to try: None (whole batches), then halves of the longest batch."""
    if microbatch is not None:
        yield microbatch
        return
    yield None
    if problem.batch_stats:
        return
    longest = max(_lengths(problem, None))
    size = longest
    while size > 1:
        size = (size + 1) // 2
        if most_pieces is not None and size * most_pieces < longest:
            return
        yield size


def _lengths(problem: Problem, size: int | None) -> list[int]:
    """Examples of each micro-batch, were all batches cut to at most ``size`` examples."""
    lengths: list[int] = []
    for batch in problem.batches:
        length = batch_length(batch) or 1
        step = size or length
        lengths += [min(step, length - first) for first in range(0, length, step)]
    return lengths


def _pieces(problem: Problem, size: int | None) -> list[Piece]:
    weighted = list(zip(problem.weights, problem.batches, strict=True))
    if not size:
        return weighted
    return [piece for weight, batch in weighted for piece in problem.split(weight, batch, size)]


def _too_little(trials: Trials, request: PlanRequest, tried: Sequence[Candidate]) -> str:
    """The error for a budget into which nothing fits, with the budget that would do if known."""
    peaks = [candidate.peak for candidate in tried]
    if not tried:  # not even the trials fitted: measure the most frugal way whatever it takes
        footprint = trials.footprint(_ways(request)[-1][1], beyond=True)
        if footprint is not None:
            peaks = [footprint.needs([1], recorded=False).peak()]
    need = f"; allow at least {format_bytes(min(peaks) / LAST_SHARE)}" if peaks else ""
    return (
        f"memory={format_bytes(trials.budget)} is too little for one probe's pass over the "
        f"smallest micro-batch, the most frugal way{need}"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
