"""What a reading of heterogeneity is made of: a measure, and the work that measures share.

A :class:`Measure` holds the names of a reading and how it follows from the spectra of blocks, which
come as a :class:`Workspace`. There are two kinds:

- :class:`Sampled`: knows its error from the law of the probes
  (:mod:`hessian_tools.heterogeneity.estimate`), and what the Lanczos steps leave open.
- :class:`Jackknifed`: any other function of the spectra. Its error is found by leaving out one
  probe after the other (:mod:`hessian_tools.heterogeneity.comparison`), for which it is asked again
  about a :class:`Replacement` (one block is another): that should cost one row of the matrix
  instead of all of it.

Shapes: B blocks, G grid points.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from hessian_tools.heterogeneity.divergence import js_divergences, js_to, probabilities
from hessian_tools.heterogeneity.estimate import Sample
from hessian_tools.spectra.density import (
    LINEAR_FRACTION,
    LOG_WIDTH,
    Axis,
    SpectralGrid,
    symlog_axis,
    unresolved_below,
)
from hessian_tools.spectra.quadrature import Floats, Quadrature

ROUNDING = 0.1  # of the linear fraction: what is smaller is taken for zero


@dataclass(frozen=True)
class GridSettings:
    """Grids and kernels: the literature's, in eigenvalue units, and this package's log axis.

    Raises:
        ValueError: for a setting that is not positive and finite.
    """

    num_points: int = 50_000  # G of the literature's grid
    variance: float = 1e-5  # of the literature's kernel
    margin: float = 1.0  # of the literature's grid beyond the extreme nodes
    log_width: float = LOG_WIDTH  # standard deviation of the kernel on the log axis, in decades
    linear_fraction: float = LINEAR_FRACTION  # of the largest |node|: the axis is linear below

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 or not np.isfinite(value):
                raise ValueError(f"{name} is {value}; a positive finite number is needed")


class Workspace:
    """B blocks to be compared, and what several measures need of them, computed at most once.

    Attributes: ``axis``, the symlog axis of all blocks (:mod:`hessian_tools.spectra.density`), is
    linear where an eigenvalue has no logarithm: below the rounding, and below what the Lanczos
    steps resolve. ``is_zero``, (B,), are the blocks in which nothing exceeds a tenth of the former.

    ``axis`` is given where another's is to be used.
    """

    def __init__(
        self,
        blocks: Sequence[Quadrature],
        settings: GridSettings,
        axis: Axis | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.settings = settings
        rounding = symlog_axis(self.blocks, settings.linear_fraction)
        self.is_zero = np.array([_largest(block) for block in self.blocks]) <= (
            ROUNDING * rounding.linthresh
        )
        if axis is None:
            resolved = max(map(unresolved_below, self.blocks))
            axis = Axis("symlog", max(rounding.linthresh, resolved))
        self.axis = axis
        self._densities: dict[type[Densities], Densities] = {}

    def densities(self, kind: type["Densities"]) -> "Densities":
        """All blocks smoothed as ``kind`` does it."""
        if kind not in self._densities:
            self._densities[kind] = kind(self)
        return self._densities[kind]

    def serves(self, other: "Workspace") -> bool:
        """Whether axis and grids used so far are also right for the blocks of ``other``."""
        if other.axis != self.axis:
            return False
        return all(
            densities.serves(other.densities(kind).grid)
            for kind, densities in self._densities.items()
        )


def _largest(block: Quadrature) -> float:
    return float(np.abs(block.nodes).max())


class Densities(ABC):
    """The blocks of a workspace smoothed on one grid; a subclass says on which, and how wide."""

    def __init__(self, workspace: Workspace) -> None:
        self.blocks = workspace.blocks
        self.grid = self.grid_for(workspace)
        self.width = self.width_for(workspace.settings)

    @abstractmethod
    def grid_for(self, workspace: Workspace) -> SpectralGrid:
        """One grid for all blocks."""

    @abstractmethod
    def width_for(self, settings: GridSettings) -> float:
        """The kernel's standard deviation, in the unit of the grid's axis."""

    def serves(self, needed: SpectralGrid) -> bool:
        """Whether this grid gives the same readings as the grid ``needed``."""
        return self.grid == needed

    @cached_property
    def rows(self) -> Floats:
        """(B, G) probabilities of grid points."""
        return probabilities(self.grid, self.blocks, self.width)

    @cached_property
    def divergences(self) -> Floats:
        """(B, B) JS divergences in nats."""
        return js_divergences(self.rows)


class Replacement:
    """Block ``index`` of a workspace replaced by ``block``, for which axis and grids serve."""

    def __init__(self, workspace: Workspace, index: int, block: Quadrature) -> None:
        self.workspace = workspace
        self.index = index
        self.block = block
        self.others = np.arange(len(workspace.blocks)) != index  # (B,) mask of those that stay
        self._divergences: dict[type[Densities], Floats] = {}

    def divergences(self, kind: type[Densities]) -> Floats:
        """(B - 1,) JS divergences in nats of the new block and those that stay."""
        if kind not in self._divergences:
            densities = self.workspace.densities(kind)
            row = probabilities(densities.grid, [self.block], densities.width)[0]
            self._divergences[kind] = js_to(row, densities.rows[self.others])
        return self._divergences[kind]


@dataclass(frozen=True)
class Measure(ABC):
    """One way to measure heterogeneity; what it gives for a set of block spectra is a reading.

    A subclass of :class:`Sampled` or :class:`Jackknifed` gives every field a default and says how
    the reading is computed. It becomes known to tables, pictures and the command line by its entry
    in :data:`hessian_tools.heterogeneity.readings.READINGS`.
    """

    name: str  # what users ask for, and the key of a result
    label: str  # in the header of tables
    title: str  # on pictures
    unit: str
    description: str
    scale_free: bool  # whether it stays the same when the loss is multiplied by a constant
    drawn: bool = False  # whether js_matrix.png shows it
    over_pairs: bool = True  # whether it is a mean over pairs of blocks
    # what an adaptive run can bring to a tolerance: its error must hold what the steps leave open
    tolerable: bool = True
    least: float = 0.1  # a tolerance is a fraction of the reading, or of this where it is larger
    first_steps: int = 16  # Lanczos steps with which an adaptive run begins
    needs_steps: bool = True  # whether more than two Lanczos steps change it
    step_doubt: float = 1.0  # times the change of the last steps, in the interval


class Sampled(Measure):
    """A reading whose error follows from the law of the probes."""

    @abstractmethod
    def sample(self, workspace: Workspace) -> Sample:
        """The reading, and what each block's probes leave uncertain of it."""


class Jackknifed(Measure):
    """A reading that is computed again without one probe after the other."""

    @abstractmethod
    def values(self, workspace: Workspace) -> Floats:
        """What the reading is taken of: (B, B) for pairs of blocks, (B,) for single ones."""

    @abstractmethod
    def mean(self, values: Floats) -> float:
        """The reading, from what ``values`` returned."""

    @abstractmethod
    def mean_after(self, replacement: Replacement, values: Floats, mean: float) -> float:
        """The reading after ``replacement``; ``values`` and ``mean`` are those before it."""

    def floor(self, workspace: Workspace) -> float:
        """What blocks with one and the same spectrum would read at these probes and steps.

        nan where nothing tells.
        """
        return float("nan")


class PairMeasure(Jackknifed):
    """A distance between two blocks; the reading is its mean over the B (B - 1) / 2 pairs."""

    @abstractmethod
    def row(self, replacement: Replacement) -> Floats:
        """(B - 1,) distances of the new block from those that stay."""

    def mean(self, values: Floats) -> float:
        return float(values[np.triu_indices(len(values), 1)].mean())

    def mean_after(self, replacement: Replacement, values: Floats, mean: float) -> float:
        others = replacement.others
        change = self.row(replacement) - values[replacement.index, others]
        num_pairs = len(others) * (len(others) - 1) / 2
        return mean + float(change.sum()) / num_pairs
