"""Figures of spectra and of their heterogeneity: each function draws one result.

No window is opened and no global state is changed.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.plots.style import TEXT_AS_TEXT
from hessian_tools.results import write_atomically
from hessian_tools.spectra.density import Axis, spectral_density, unresolved_below
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature, outliers
from hessian_tools.tables import shortened

MAX_PANELS = 48  # more small multiples than these cannot be read on one page
MAX_LABELS = 60  # more names than these on the side of a heat map would overlap
PAGE = 14.0  # inches, the widest small multiples
LETTER = 0.064  # inches of a letter in a block's name
# Colours that differ in every kind of colour vision.
LINE = "#1f4e79"
FILL = "#9ecae1"
MARK = "#d55e00"
ZERO = "#bbbbbb"  # of the line at zero
BAND = "#eeeeee"  # where nothing is resolved


def draw(
    folder: Path,
    spectra: BlockSpectra,
    js: JSHeterogeneity | None,
    title: str,
    kind: str = "png",
    normalized: bool = False,
) -> list[Path]:
    """Writes a run's pictures, as png, pdf or svg, and returns their paths.

    block_spectra (spectrum for one block alone) and, with ``js``, js_matrix. ``normalized``: see
    :func:`block_spectra`.
    """
    if len(spectra) == 1:
        (name,) = spectra.names
        figure = Figure((8, 4.4), layout="constrained")
        axes = figure.subplots()
        curvature = spectra.curvature
        spectrum(axes, spectra[name], normalized=normalized, curvature=curvature)
        titled(figure, f"{title}: {spectra.curvature} spectrum of {name}")
        return [written(figure, folder / f"spectrum.{kind}")]
    titles = f"{title}: {spectra.curvature} spectra by block"
    figure = block_spectra(spectra, title=titles, normalized=normalized)
    paths = [written(figure, folder / f"block_spectra.{kind}")]
    if js is not None and any(READINGS[name].drawn for name in js.readings):
        matrices = js_matrices(js, title=f"{title}: distances between block spectra")
        paths.append(written(matrices, folder / f"js_matrix.{kind}"))
    return paths


def block_spectra(
    spectra: BlockSpectra,
    *,
    title: str = "",
    normalized: bool = False,
) -> Figure:
    """Small multiples, a panel a block: share of eigenvalues per decade over one symlog axis.

    Both axes are logarithmic, for what matters (outliers) is few eigenvalues far out. The lowest
    share drawn is about that of one eigenvalue of the largest block. Ritz values that are not
    resolved at the kernel's width are spread as far as they are uncertain, and a grey band marks
    where they do not even tell the sign. Each panel gives its extreme Ritz values, with "≤" and "≥"
    where they are bounds. Beyond MAX_PANELS blocks, the title says how many of them (evenly spread)
    are shown.

    ``normalized``: each block is divided by its tenth largest Ritz value, as in the figures of
    arXiv 2402.16788, which shows shapes whatever their scales; its title says by what.
    """
    count = min(len(spectra), MAX_PANELS)
    shown = np.unique(np.linspace(0, len(spectra) - 1, count).astype(int))
    labels = shortened(spectra.names)
    quadratures = [spectra[name] for name in spectra.names]
    if normalized:
        units = [tenth_largest(quadrature) for quadrature in quadratures]
        pairs = zip(quadratures, units, strict=True)
        quadratures = [quadrature.scaled(1 / unit) for quadrature, unit in pairs]
        labels = [f"{label} ÷ {unit:.2g}" for label, unit in zip(labels, units, strict=True)]
    figure, panels = _grid_of_panels([labels[i] for i in shown])
    drawn = dict(zip(spectra.names, quadratures, strict=True))
    density = spectral_density(drawn, grid="symlog", spread_unresolved=True)
    largest = max(quadrature.size for quadrature in quadratures)
    lowest = math.floor(math.log10(0.5 / largest))
    for panel, row in zip(panels.flat, shown, strict=False):
        _filled(panel, density.grid, density.values[row], 10.0**lowest)
        _mark_ends(panel, density.axis, quadratures[row], 10.0**lowest)
        panel.axvline(0.0, color=ZERO, linewidth=0.6, zorder=0)
        _mark_unresolved(panel, density.axis, quadratures[row])
        panel.set_title(labels[row], fontsize=7.5, pad=3)
        panel.tick_params(labelsize=6.5)
    first: Axes = panels[0, 0]
    symlog_ticks(first, density.axis, density.grid[0], density.grid[-1])
    _share_ticks(first, lowest)
    missing = f" ({len(shown)} of {len(spectra)} shown)" if len(shown) < len(spectra) else ""
    titled(figure, f"{title}{missing}")
    linear = f"logarithmic beyond ±{density.axis.linthresh:.1g}, linear between"
    ends = "extreme Ritz values marked, ≤ and ≥ where they are bounds only"
    exact = sum(quadrature.status == "exact" for quadrature in quadratures)
    ends += f"\ngrey: not resolved; {exact} of {len(quadratures)} spectra are exact"
    what = "eigenvalue / tenth largest Ritz value of the block" if normalized else "eigenvalue"
    horizontal = f"{what} ({linear})\n{ends}"
    figure.supxlabel(horizontal, fontsize=8)
    vertical = f"share of eigenvalues per decade\n(kernel of {density.width:g} decades)"
    figure.supylabel(vertical, fontsize=8)
    return figure


def _mark_unresolved(axes: Axes, axis: Axis, quadrature: Quadrature) -> None:
    """A band where Ritz values say no more than that eigenvalues are small."""
    reach = float(axis.position(unresolved_below(quadrature)))
    if reach > 0:
        axes.axvspan(-reach, reach, color=BAND, linewidth=0, zorder=-1)


def tenth_largest(quadrature: Quadrature) -> float:
    """The tenth largest of all Ritz values, the last where there are fewer; 1 if not positive."""
    nodes = np.sort(quadrature.pooled[0])[::-1]
    value = float(nodes[min(9, len(nodes) - 1)])
    return value if value > 0 else 1.0


def _grid_of_panels(labels: Sequence[str]) -> tuple[Figure, NDArray[Any]]:  # of Axes
    """A figure with a panel a label; panels that are left over are hidden."""
    count = len(labels)
    width = max(2.1, LETTER * max(map(len, labels)))
    most = max(2, min(6, int(PAGE / width)))
    columns = count
    if count > most:
        # one column fewer where that leaves fewer places empty
        is_fuller = -count % most > -count % (most - 1)
        columns = most - is_fuller
    rows = -(-count // columns)
    size = (max(5.0, width * columns + 0.7), 1.5 * rows + 1.2)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, panel in enumerate(panels.flat):
        panel.set_visible(index < count)
        panel.tick_params(labelbottom=index + columns >= count)
    return figure, panels


def _mark_ends(panel: Axes, axis: Axis, quadrature: Quadrature, lowest: float) -> None:
    """The extreme Ritz values, as marks at the bottom and as numbers."""
    ends = [quadrature.smallest.value, quadrature.largest.value]
    panel.plot(axis.position(np.array(ends)), [lowest] * 2, "|", color=MARK, markersize=9)
    panel.text(
        0.5,
        0.95,
        extremes(quadrature, 3),
        transform=panel.transAxes,
        fontsize=6.5,
        color=MARK,
        ha="center",
        va="top",
    )


def extremes(quadrature: Quadrature, digits: int) -> str:
    """The ends of a spectrum in words.

    A Ritz value lies inside the spectrum, so one that has not converged is a bound on its end.
    """
    low, high = quadrature.smallest, quadrature.largest
    below = "" if low.is_known else "≤ "
    above = "" if high.is_known else "≥ "
    return f"{below}{low.value:.{digits}g}  to  {above}{high.value:.{digits}g}"


def _share_ticks(panel: Axes, lowest: int) -> None:
    """Powers of ten from 10^``lowest`` to 1."""
    # a share is at most 2 a decade; then room for text
    panel.set_ylim(10.0**lowest, 2 * 10 ** (-lowest / 4))
    step = max(1, round(-lowest / 3))
    panel.set_yticks([10.0**power for power in range(0, lowest - 1, -step)])
    panel.yaxis.set_minor_locator(NullLocator())


def js_matrices(js: JSHeterogeneity, *, title: str = "") -> Figure:
    """Heat maps of the readings that are drawn, side by side."""
    side = min(9.0, max(2.5, 0.155 * len(js.names)))
    margin = LETTER * max(map(len, shortened(js.names)))
    readings = [name for name in js.readings if READINGS[name].drawn]
    size = (len(readings) * (side + 1.2) + margin, side + margin + 1.2)
    figure = Figure(size, layout="compressed")
    panels = figure.subplots(1, len(readings), sharey=True, squeeze=False)[0]
    for panel, reading in zip(panels, readings, strict=True):
        js_matrix(panel, js, reading)
    titled(figure, title)
    return figure


def js_matrix(axes: Axes, js: JSHeterogeneity, reading: str) -> None:
    """Heat map of one reading between all pairs of blocks, (B, B)."""
    result = js.readings[reading]
    labels = shortened(js.names)
    image = axes.imshow(result.matrix, cmap="viridis", interpolation="nearest")
    every = -(-len(labels) // MAX_LABELS)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=6.5)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(result.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    mean = f"mean over pairs {js.told(reading)}, {result.unit}"
    axes.set_title(f"{READINGS[reading].title}\n{mean}", fontsize=9)


def spectrum(
    axes: Axes,
    quadrature: Quadrature,
    *,
    num_outliers: int = 10,
    normalized: bool = False,
    curvature: str = "Hessian",
) -> None:
    """One spectrum: density over a linear eigenvalue axis, logarithmic upwards.

    :func:`outliers` are marked. The kernel is 0.6 of the mean distance of the nodes, so that the
    density shows none of the single nodes, but for exact spectra not below 1/200 of the range.
    ``normalized``: divided by its tenth largest Ritz value, see :func:`block_spectra`.
    """
    horizontal = f"eigenvalue of the mean loss's {curvature}"
    if normalized:
        unit = tenth_largest(quadrature)
        quadrature = quadrature.scaled(1 / unit)
        horizontal += f" / its tenth largest Ritz value, {unit:.2g}"
    span = float(np.ptp(quadrature.nodes))
    width = span * max(1 / 200, 0.6 / quadrature.nodes.shape[1]) or None
    density = spectral_density(quadrature, num_points=4_000, width=width)
    peak = 1 / quadrature.size / (density.width * math.sqrt(2 * math.pi))  # one eigenvalue's
    floor = 0.1 * peak
    _filled(axes, density.grid, density.values[0], floor)
    marked = outliers(quadrature, num_outliers)
    if len(marked):
        label = f"{len(marked)} outliers, converged to 1 %"
        heights = np.full(len(marked), 2 * floor)
        axes.plot(marked, heights, "v", color=MARK, markersize=5, label=label)
        axes.legend(fontsize=8, frameon=False)
    axes.axvline(0.0, color=ZERO, linewidth=0.6, zorder=0)
    axes.set_title(f"n = {quadrature.size:,}, {extremes(quadrature, 4)}", fontsize=9)
    axes.set_xlabel(horizontal, fontsize=9)
    vertical = f"density per unit of eigenvalue\n(Gaussian kernel of {density.width:.2g})"
    axes.set_ylabel(vertical, fontsize=9)
    axes.set_ylim(floor, None)


def symlog_ticks(axes: Axes, axis: Axis, low: float, high: float) -> None:
    """Ticks at powers of ten of the eigenvalue, on both sides of zero, on an axis in decades."""
    step = max(1, math.ceil((high - low) / 5))  # decades between labels, so that they do not touch
    first = math.ceil(math.log10(axis.linthresh))
    powers = 10.0 ** (first + np.arange(max(high, -low) + 1))
    powers = powers[axis.position(powers) <= max(high, -low)]
    major = powers[axis.position(powers) >= 0.7 * step]
    on_both_sides = major[axis.position(major) <= min(high, -low)]
    if len(on_both_sides):  # the same labels left and right
        major = on_both_sides
    major = major[::-1][::step]
    labelled = np.concatenate([-major, [0.0], major])
    labelled = labelled[_is_between(axis, labelled, low, high)]
    axes.set_xticks(axis.position(labelled), [_power(value) for value in labelled])
    unlabelled = np.concatenate([-powers, powers])
    unlabelled = unlabelled[_is_between(axis, unlabelled, low, high)]
    axes.set_xticks(axis.position(unlabelled), minor=True)


def _is_between(
    axis: Axis,
    eigenvalues: NDArray[np.float64],
    low: float,
    high: float,
) -> NDArray[np.bool_]:
    positions = axis.position(eigenvalues)
    return (positions >= low) & (positions <= high)


def titled(figure: Figure, title: str) -> None:
    """Puts ``title`` on top, wrapped to the figure's width, which grows in height for it."""
    lines = textwrap.wrap(title, int(12 * figure.get_figwidth()))  # letters an inch at this size
    figure.set_figheight(figure.get_figheight() + 0.17 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=10)


def written(figure: Figure, path: Path) -> Path:
    """The figure in the format of ``path``, whole or not at all; returns ``path``.

    A PNG has 150 dots an inch; PDF and SVG keep text as text. The file knows its title.
    """
    buffer = io.BytesIO()
    metadata = {"Title": figure.get_suptitle().replace("\n", " ")}
    with matplotlib.rc_context(TEXT_AS_TEXT):
        figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    return write_atomically(path, buffer.getvalue())


def _filled(
    axes: Axes,
    grid: NDArray[np.float64],
    values: NDArray[np.float64],
    floor: float,
) -> None:
    values = np.maximum(values, floor)
    axes.fill_between(grid, values, floor, color=FILL, linewidth=0)
    axes.semilogy(grid, values, color=LINE, linewidth=0.9)


def _power(value: float) -> str:
    if not value:
        return "0"
    sign = "-" if value < 0 else ""
    return f"${sign}10^{{{round(math.log10(abs(value)))}}}$"
