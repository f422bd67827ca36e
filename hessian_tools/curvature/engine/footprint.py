"""What one way to compute takes in memory, by the examples and the probes that go together.

Everything that a product holds is affine in the examples n of a micro-batch and, for given
examples, in the probes r that go through together. So trials on one and on two examples, with two
and three probes, give the peak of every product.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Affine:
    """``constant + slope n`` bytes for n examples."""

    constant: float
    slope: float

    def __call__(self, examples: float) -> float:
        return self.constant + self.slope * examples

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> "Affine":
        """Through the first and last (n, bytes), neither part negative; one point: no constant."""
        n, low = points[0]
        m, high = points[-1]
        if m == n:
            return cls(0.0, max(low, 0.0) / n)
        slope = max((high - low) / (m - n), 0.0)
        return cls(max(low - slope * n, 0.0), slope)


@dataclass(frozen=True)
class Needs:
    """Bytes that products of the whole Hessian need besides model and data."""

    graphs: int  # of all recorded graphs, or of the largest where they are rebuilt
    recording: int  # besides, while the largest is recorded
    fixed: int  # besides, in a pass over it, whatever its probes
    row: int  # and for each probe, its vector and product included

    def peak(self, rows: int = 1) -> int:
        """The highest number of bytes with ``rows`` probes at once."""
        return self.graphs + max(self.recording, self.fixed + rows * self.row)


@dataclass(frozen=True)
class Trial:
    """Bytes counted while a way to compute was tried on one micro-batch."""

    graph: int  # the gradient's graph
    recording: int  # besides, while it was recorded
    passes: Mapping[int, int]  # besides, in a pass, by its number of probes

    def row(self) -> float:
        """Bytes that each further probe takes; all of a pass where only one was made."""
        fewest = min(self.passes)
        most = max(self.passes)
        if fewest == most:
            return self.passes[most] / most
        return (self.passes[most] - self.passes[fewest]) / (most - fewest)

    def fixed(self) -> float:
        """Bytes of a pass that do not grow with its probes."""
        most = max(self.passes)
        return self.passes[most] - most * self.row()


@dataclass(frozen=True)
class Footprint:
    """Bytes that one way to compute takes, each by the examples of a micro-batch.

    The four are those of :class:`Needs`, for one micro-batch.
    """

    graph: Affine
    recording: Affine
    fixed: Affine
    row: Affine

    def needs(self, lengths: Sequence[int], recorded: bool) -> Needs:
        """Of micro-batches with ``lengths`` examples, all recorded or rebuilt one at a time."""
        longest = max(lengths)
        graphs = sum(map(self.graph, lengths)) if recorded else self.graph(longest)
        return Needs(
            graphs=int(graphs),
            recording=int(self.recording(longest)),
            fixed=int(self.fixed(longest)),
            row=int(self.row(longest)),
        )

    @classmethod
    def measured(cls, trials: Mapping[int, Trial], vectors: int) -> "Footprint":
        """From trials on n examples, by n, for one or two n, all with the same numbers of probes.

        ``vectors``: bytes of a probe's vector and product, which the passes did not have.
        """

        def along(measure: Callable[[Trial], float]) -> Affine:
            return Affine.through([(n, measure(trial)) for n, trial in trials.items()])

        row = along(Trial.row)
        return cls(
            graph=along(lambda trial: trial.graph),
            recording=along(lambda trial: trial.recording),
            fixed=along(Trial.fixed),
            row=replace(row, constant=row.constant + vectors),
        )
