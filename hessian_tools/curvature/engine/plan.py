"""Plan: what is recorded, cut and recomputed so that products stay within a memory budget.

Nothing is guessed. A route is tried on one and on two examples, with two and three probes, while the bytes alive are
counted; everything that a product holds is affine in the examples of a micro-batch and, for given examples, in the
probes that go through together. A trial stops as soon as it exceeds the budget. From that follows the peak of every way
to compute, and the cheapest that fits is taken (k probes go together, F is a forward pass; a probe of the whole
Hessian):

    recorded                               6 F
    recorded, attention and loss streamed  6 F and a little
    recorded, layers recomputed            6 F + 3 F / k
    rebuilt                                6 F + 3 F / k
    rebuilt, streamed                      the same and a little
    rebuilt, layers recomputed             6 F + 7 F / k

each with whole batches or with micro-batches. Letters: n examples of a micro-batch, r probes, P parameters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.engine.recompute import LAYERED, NONE, STREAMED, Segments
from hessian_tools.problem.batches import batch_length
from hessian_tools.problem.problem import Problem

MAX_ROWS = 64  # more probes at once bring no further speed and cost memory
PRODUCT_SHARE = 0.6  # of the budget, for graphs and passes; the rest is for Lanczos vectors
LAST_SHARE = 0.95  # where nothing fits into that
# a batch of one probe is stored as no other, its strides being free, so it is tried only where more do not fit
MEASURED_ROWS = (2, 3, 1)
FEWEST_PIECES = 8  # a batch is cut into no more while there is another way


@dataclass(frozen=True)
class Affine:
    """``constant + slope n`` bytes."""

    constant: float
    slope: float

    def __call__(self, examples: float) -> float:
        return self.constant + self.slope * examples

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> "Affine":
        """Through the first and last (n, bytes), neither part negative; through the origin for a single point."""
        (n, low), (m, high) = points[0], points[-1]
        if m == n:
            return cls(0.0, max(low, 0.0) / n)
        slope = max((high - low) / (m - n), 0.0)
        return cls(max(low - slope * n, 0.0), slope)


@dataclass(frozen=True)
class Footprint:
    """Bytes that one way to compute takes, by the examples of a micro-batch."""

    graph: Affine  # the gradient's graph
    recording: Affine  # while it is recorded, besides
    fixed: Affine  # a pass over it, besides, whatever its probes
    row: Affine  # and for each probe of the whole Hessian

    def bytes(self, lengths: Sequence[int], recorded: bool) -> tuple[int, int, int, int]:
        """(graphs, recording, fixed, row) for micro-batches of such lengths, all recorded or one at a time."""
        longest = max(lengths)
        graphs = sum(map(self.graph, lengths)) if recorded else self.graph(longest)
        return (
            int(graphs),
            int(self.recording(longest)),
            int(self.fixed(longest)),
            int(self.row(longest)),
        )

    @classmethod
    def measured(cls, trials: Mapping[int, "Trial"], vectors: int) -> "Footprint":
        """From trials on n examples, for one or two n.

        ``vectors``: bytes of a probe's vector and product, which the passes did not have.
        """
        rows = sorted(set.intersection(*(set(trial.passes) for trial in trials.values())))

        def along(choose: Callable[["Trial"], float]) -> Affine:
            return Affine.through([(n, choose(trial)) for n, trial in trials.items()])

        def row(trial: "Trial") -> float:
            low, high = trial.passes[rows[0]], trial.passes[rows[-1]]
            return high / rows[-1] if len(rows) == 1 else (high - low) / (rows[-1] - rows[0])

        slope = along(row)
        fixed = along(lambda trial: trial.passes[rows[-1]] - rows[-1] * row(trial))
        row_bytes = replace(slope, constant=slope.constant + vectors)
        return cls(
            along(lambda trial: trial.graph), along(lambda trial: trial.recording), fixed, row_bytes
        )


@dataclass(frozen=True)
class Trial:
    """Bytes counted while a route was tried."""

    graph: int  # the gradient's graph
    recording: int  # while it was recorded, besides
    passes: Mapping[int, int]  # in passes of so many probes, besides


@dataclass(frozen=True)
class Wishes:
    """What a user has settled; None: the budget decides."""

    record: bool | None = None
    microbatch: int | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class Plan:
    """How products are computed within the memory budget. All bytes are besides model and data."""

    recorded: bool  # graphs of the gradient kept for all products (else rebuilt for each)
    segments: Segments  # what is computed again instead of kept
    pieces: tuple[tuple[float, Any], ...] = field(repr=False)  # (weight in L, micro-batch)
    rows: int  # probes that go through together
    graph_bytes: int  # of all graphs (recorded) or of the largest (rebuilt)
    recording_bytes: int  # besides, while the largest is recorded
    pass_bytes: int  # besides, in a pass over it, whatever its probes
    row_bytes: int  # and for each probe of the whole Hessian, its vector and product included
    krylov_bytes: int  # what the budget leaves for Lanczos vectors
    notes: tuple[str, ...] = ()  # what was not possible, and what running out of memory has changed

    def peak_bytes(self, rows: int | None = None) -> int:
        """The peak of products of the whole Hessian with ``rows`` probes, default ``self.rows``; blocks need less."""
        passing = self.pass_bytes + (self.rows if rows is None else rows) * self.row_bytes
        return self.graph_bytes + max(self.recording_bytes, passing)

    def __str__(self) -> str:
        kind = "recorded once" if self.recorded else "rebuilt for every product"
        graphs = f"{len(self.pieces)} gradient graph(s) {kind} ({format_bytes(self.graph_bytes)})"
        again = f", recomputing {self.segments}" if self.segments else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{graphs}{again}, up to {self.rows} probes at once; peak {format_bytes(self.peak_bytes())} for the whole "
            f"Hessian ({format_bytes(self.peak_bytes(1))} with one probe; blocks need less){notes}"
        )

    def announcement(self, products: int, blocks: int, forward_seconds: float) -> str:
        """The lines to print before ``products`` Hessian-vector products of ``blocks`` blocks.

        Time is a forecast from ``forward_seconds``, one forward pass over all data, and the counted cost of a product:
        6 forward passes for the whole Hessian (one block), 1.3 for one of several blocks, and what is recomputed.
        """
        again = (0 if self.recorded else 3 / self.rows) + (
            4 / self.rows if self.segments.layers else 0
        )
        seconds = products * forward_seconds * ((6 if blocks == 1 else 1.3) + again)
        graphs, route = str(self).split("; ", 1)
        return (
            f"plan: {products} Hessian-vector products for {blocks} block(s), about {_duration(seconds)}\n"
            f"plan: {graphs}\nplan: {route}; {format_bytes(self.krylov_bytes)} left for Lanczos vectors"
        )


def planned(
    pieces: Sequence[tuple[float, Any]],
    recorded: bool,
    segments: Segments,
    found: Footprint,
    budget: int,
) -> Plan:
    """The plan for given micro-batches (weight, batch): as many probes at once as the budget allows, at least one."""
    lengths = [batch_length(batch) or 1 for _, batch in pieces]
    graphs, recording, fixed, row = found.bytes(lengths, recorded)
    rows = max(1, min(MAX_ROWS, (int(PRODUCT_SHARE * budget) - graphs - fixed) // max(row, 1)))
    left = budget - graphs - max(recording, fixed + rows * row)
    return Plan(
        recorded, segments, tuple(pieces), rows, graphs, recording, fixed, row, max(0, left)
    )


def choose(
    problem: Problem, budget: int, footprint: Callable[..., Footprint | None], wishes: Wishes
) -> Plan:
    """The cheapest plan within ``budget`` bytes; ``footprint(kind of segments, beyond the budget=False)`` measures.

    With ``record=True`` or a ``microbatch`` nothing is refused: of what is left the way with the lowest peak is taken.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut.
    """
    uncut, refused, tried = _pieces(problem, None), "", []
    for share, fewest in (
        (PRODUCT_SHARE, FEWEST_PIECES),
        (PRODUCT_SHARE, None),
        (LAST_SHARE, None),
    ):
        for recorded, segments in _ways(problem, wishes):
            if (found := footprint(segments)) is None:
                continue
            for size in _sizes(problem, wishes, fewest, refused):
                peak = _peak(found.bytes(_lengths(problem, size), recorded))
                tried.append((peak, size or 0, recorded, segments))
                if peak > share * budget:
                    continue
                try:
                    pieces = _pieces(problem, size) if size else uncut
                except ValueError as error:
                    if wishes.microbatch is not None:
                        raise
                    refused = str(error)
                    break
                return planned(pieces, recorded, segments, found, budget)
    if tried and (wishes.record or wishes.microbatch is not None):
        _, size, recorded, segments = min(tried, key=lambda t: t[0])
        found = footprint(segments)
        assert found is not None  # it was measured when this way was tried
        return planned(_pieces(problem, size or None), recorded, segments, found, budget)
    if refused:
        raise ValueError(refused)
    if not tried and (found := footprint(_ways(problem, wishes)[-1][1], True)) is not None:
        tried.append((_peak(found.bytes([1], False)), 1, False, NONE))
    need = (
        f"; allow at least {format_bytes(min(t[0] for t in tried) / LAST_SHARE)}" if tried else ""
    )
    raise ValueError(
        f"memory={format_bytes(budget)} is too little for one probe's pass over the smallest micro-batch, the most "
        f"frugal way{need}"
    )


def _ways(problem: Problem, wishes: Wishes) -> list[tuple[bool, Segments]]:
    kinds = [NONE, STREAMED, LAYERED] if wishes.segments is None else [wishes.segments]
    recording = (True, False) if wishes.record is None else (wishes.record,)
    return [(recorded, kind) for recorded in recording for kind in kinds]


def _sizes(
    problem: Problem, wishes: Wishes, fewest: int | None, refused: str
) -> Iterator[int | None]:
    """Micro-batches to try: None (whole batches), then halves of the longest batch, to 1 or 1 / ``fewest`` of it."""
    if wishes.microbatch is not None:
        yield wishes.microbatch
        return
    yield None
    size = longest = max(batch_length(batch) or 1 for batch in problem.batches)
    while size > 1 and not refused and not problem.batch_stats:
        size = (size + 1) // 2
        if fewest is not None and size * fewest < longest:
            return
        yield size


def _lengths(problem: Problem, size: int | None) -> list[int]:
    lengths = [batch_length(batch) or 1 for batch in problem.batches]
    return [min(size or n, n - first) for n in lengths for first in range(0, n, size or n)]


def _pieces(problem: Problem, size: int | None) -> list[tuple[float, Any]]:
    weighted = list(zip(problem.weights, problem.batches, strict=True))
    return (
        weighted
        if size is None
        else [piece for pair in weighted for piece in problem.split(*pair, size)]
    )


def _peak(sizes: tuple[int, int, int, int]) -> int:
    graphs, recording, fixed, row = sizes
    return graphs + max(recording, fixed + row)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
