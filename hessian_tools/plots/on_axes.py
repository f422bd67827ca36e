"""A result on given axes: what ``result.plot(axes)`` draws, an entry of DRAWN for each type.

To draw another type, make it Drawable and add an entry.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from hessian_tools.heterogeneity.adaptive import AdaptiveJS0
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.plots import partition, spectra, training
from hessian_tools.plots.style import COLOURS, line_style, wrap_labels
from hessian_tools.spectra.density import SpectralDensity
from hessian_tools.spectra.eigenpairs import Eigenpairs
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.structure.report import PartitionReport
from hessian_tools.tracking.track import Track
from hessian_tools.training.races import Race
from hessian_tools.training.sweeps import RateSweep
from hessian_tools.training.trajectory import Trajectory

MOST_BLOCKS = 60  # of a picture whose rows have names
MOST_TICKS = 5
MOST_IN_LEGEND = 12
DENSITY_REACH = 1e-8  # of the highest density; below, a picture shows the kernel's tail only
ERRORS = ("_residual", "_low", "_high", "_error")  # of the reading whose name they follow
COLOUR = COLOURS[0]


def draw(result: object, axes: Axes | None = None) -> Axes:
    """Draws ``result`` on ``axes``, or on those of a new figure.

    Raises:
        TypeError: a type that has no picture.
    """
    for kind in type(result).__mro__:
        if kind in DRAWN:
            if axes is None:
                return _on_its_own(DRAWN[kind], result)
            DRAWN[kind](axes, result)
            return axes
    names = ", ".join(kind.__name__ for kind in DRAWN)
    raise TypeError(f"a {type(result).__name__} has no picture; these have: {names}")


def _on_its_own(drawing: Callable[[Axes, Any], None], result: object) -> Axes:
    """Axes of a new figure, whose labels keep inside it; what is square lies in its middle."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    drawing(axes, result)
    if axes.get_aspect() != "auto":
        figure.set_layout_engine("compressed")
    wrap_labels(figure)
    return axes


def block_extents(axes: Axes, result: BlockSpectra) -> None:
    """A row a block: from its smallest to its largest eigenvalue, a dot at the rms eigenvalue."""
    shown = list(result.items())[:MOST_BLOCKS]
    for row, (_, block) in enumerate(shown):
        ends = [block.smallest.value, block.largest.value]
        axes.plot(ends, [row, row], color=COLOUR, linewidth=1.5)
        axes.plot([block.rms.value], [row], "o", color=COLOUR, markersize=3.5)
    scales = [block.rms.value for _, block in shown if block.rms.value > 0]
    if scales:
        linthresh = min(scales)
        axes.set_xscale("symlog", linthresh=linthresh)
        few = SymmetricalLogLocator(base=10, linthresh=linthresh)
        few.set_params(numticks=MOST_TICKS)
        axes.xaxis.set_major_locator(few)
    axes.axvline(0.0, color=spectra.ZERO, linewidth=0.6, zorder=0)
    axes.set_yticks(range(len(shown)), spectra.shortened([n for n, _ in shown]), fontsize=6.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"eigenvalue of the {result.curvature} (dot: rms)", fontsize=8)
    if len(result) > len(shown):
        axes.set_title(f"the first {len(shown)} of {len(result)} blocks", fontsize=8)


def first_matrix(axes: Axes, result: JSHeterogeneity) -> None:
    """The heat map of the first reading between pairs of blocks."""
    spectra.js_matrix(axes, result, next(iter(result.readings)))


def adaptive_matrix(axes: Axes, result: AdaptiveJS0) -> None:
    """That of the readings it ended with."""
    first_matrix(axes, result.heterogeneity)


def densities(axes: Axes, result: SpectralDensity) -> None:
    """A line a spectrum, over the axis of the grid, upwards logarithmic over eight decades."""
    for number, (name, values) in enumerate(zip(result.names, result.values, strict=True)):
        colour, dash = line_style(number)
        axes.semilogy(result.grid, values, dash, color=colour, linewidth=1.0, label=name)
    axes.set_ylim(float(result.values.max()) * DENSITY_REACH, None)
    if result.axis.kind == "symlog":
        spectra.symlog_ticks(axes, result.axis, result.grid[0], result.grid[-1])
    axes.set_xlabel("eigenvalue", fontsize=8)
    per = "decade" if result.axis.kind == "symlog" else "unit of eigenvalue"
    axes.set_ylabel(f"share of eigenvalues per {per}", fontsize=8)
    if 1 < len(result.names) <= MOST_IN_LEGEND:
        axes.legend(fontsize=7, frameon=False)


def eigenvalues(axes: Axes, result: Eigenpairs) -> None:
    """The eigenvalues in their order, with the residuals within which they lie."""
    places = np.arange(1, len(result.values) + 1)
    axes.errorbar(places, result.values, result.residuals, fmt="o", color=COLOUR, markersize=4)
    axes.axhline(0.0, color=spectra.ZERO, linewidth=0.6, zorder=0)
    axes.set_xlabel("number", fontsize=8)
    axes.set_ylabel("eigenvalue", fontsize=8)


def losses(axes: Axes, result: Trajectory) -> None:
    """The smoothed training loss, with crosses for validation."""
    curve = result.smoothed()
    axes.plot(np.arange(1, len(curve) + 1), curve, color=COLOUR, linewidth=1.2)
    axes.plot(result.validation_steps, result.validation_losses, "x", color=COLOUR)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("training loss, smoothed (crosses: validation)", fontsize=8)


def loss_against_rate(axes: Axes, result: RateSweep) -> None:
    """The mean loss at every rate; crosses below mark rates that diverged."""
    means = result.mean_losses
    finite = np.isfinite(means)
    axes.plot(result.rates[finite], means[finite], "o-", color=COLOUR, markersize=4)
    bottom = axes.get_xaxis_transform()
    outside = result.rates[~finite]
    axes.plot(outside, np.full(len(outside), 0.02), "x", color=COLOUR, transform=bottom)
    axes.set_xscale("log")
    axes.set_xlabel(f"learning rate of {result.optimizer}", fontsize=8)
    axes.set_ylabel(f"loss after {result.num_steps:,} steps (crosses: diverged)", fontsize=8)


def race_curves(axes: Axes, result: Race) -> None:
    """Loss curves at the best rates, of the first batch size."""
    for number, entry in enumerate(result.ranking(result.batch_sizes[0])):
        if entry.runs:
            training.curve(axes, entry, number)
    axes.set_xscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("training loss, smoothed (crosses: validation)", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def readings(axes: Axes, result: Track) -> None:
    """Every reading along training, those of intervals and residuals left out."""
    names = [name for name in result.readings if not name.endswith(ERRORS)]
    for number, name in enumerate(names):
        values = result.readings[name]
        taken = np.isfinite(values)
        colour, dash = line_style(number)
        axes.plot(
            result.steps[taken],
            values[taken],
            f"o{dash}",
            color=colour,
            markersize=3,
            label=name,
        )
    everything = np.concatenate([result.readings[name] for name in names] or [np.empty(0)])
    sizes = np.abs(everything[np.isfinite(everything) & (everything != 0)])
    if len(sizes) and np.nanmin(everything) > 0:
        axes.set_yscale("log")
    elif len(sizes):
        axes.set_yscale("symlog", linthresh=float(sizes.min()))
    axes.set_xlabel("step", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


DRAWN: dict[type, Callable[[Axes, Any], None]] = {
    Quadrature: spectra.spectrum,
    BlockSpectra: block_extents,
    SpectralDensity: densities,
    JSHeterogeneity: first_matrix,
    AdaptiveJS0: adaptive_matrix,
    PartitionReport: partition.evidence,
    DenseBlock: partition.dense,
    Coupling: partition.tensors,
    Eigenpairs: eigenvalues,
    Trajectory: losses,
    RateSweep: loss_against_rate,
    Race: race_curves,
    Track: readings,
}
