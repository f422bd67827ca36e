"""Spectra on the page: a table of blocks, a small curve in each row, and a chart of any two.

Letters: B blocks, G points of a curve.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import CURVATURE
from hessian_tools.page.curves import Curve, Drawing, PanelOf, drawing, line_path
from hessian_tools.page.scales import Scale, Tick, eigenvalue_ticks
from hessian_tools.page.views import (
    NUMBERS,
    Cell,
    Column,
    Fact,
    Headline,
    Row,
    Table,
    evenly_spread,
    number,
)
from hessian_tools.page.words import counted, plus_minus, shown
from hessian_tools.spectra.density import (
    LOG_WIDTH,
    SpectralDensity,
    SpectralGrid,
    spanning_grid,
    spectral_density,
    symlog_axis,
)
from hessian_tools.spectra.quadrature import (
    BlockSpectra,
    Floats,
    Quadrature,
    RitzValue,
    outliers,
)
from hessian_tools.tables import shortened

NUM_OUTLIERS = 10
_SPACING = 0.4  # of the kernel's width, between points of a curve
_HIGHEST = 2.5  # share a decade; the kernel's own peak is 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 628.0, 12.0, 212.0
_COLUMNS = (
    Column("block", "block"),
    Column("spectrum", "spectrum", "on the axes of the chart above", is_sortable=False),
    Column("size", NUMBERS, "rows of the block's matrix", is_ratio=True),
    Column("rms", NUMBERS, "root mean square eigenvalue, the block's scale", is_ratio=True),
    Column("smallest", NUMBERS, "lowest Ritz value; ≤: it bounds the eigenvalue", is_ratio=True),
    Column("largest", NUMBERS, "highest Ritz value; ≥: it bounds the eigenvalue", is_ratio=True),
    Column("trace ± 95 %", NUMBERS, "sum of the eigenvalues", is_ratio=True),
)
_DISTANCE = Column("mean distance", NUMBERS, "of its curvature from all others', decades")
_STATUS = Column("status", "text", "exact: all eigenvalues; complete: estimated from probes")


@dataclass(frozen=True)
class BlockCurve:
    """A block's density, drawn once and used in the chart and in its row.

    Attributes:
        path: closed along the bottom.
        ends: places of the smallest and the largest Ritz value.
        box: what of the chart a row shows, as an SVG's viewBox.
    """

    number: int
    name: str
    path: str
    ends: tuple[float, float]
    box: str = f"{_LEFT:g} {_TOP:g} {_RIGHT - _LEFT:g} {_BOTTOM - _TOP:g}"


@dataclass(frozen=True)
class BlocksView:
    """The chart and the table.

    Attributes:
        pair: numbers of the two blocks that are compared at first.
        why: how these two were chosen.
    """

    table: Table
    curves: tuple[BlockCurve, ...]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str
    pair: tuple[int, int]
    why: str
    notes: tuple[str, ...]
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM


@dataclass(frozen=True)
class SpectrumView:
    """The spectrum of one matrix."""

    drawing: Drawing
    facts: tuple[Fact, ...]
    notes: tuple[str, ...]


def blocks_view(spectra: BlockSpectra, js: JSHeterogeneity | None, most: int) -> BlocksView:
    """Of several blocks, at most ``most``; ``js`` of the same, where there is one."""
    kept = evenly_spread(len(spectra), most)
    names = [spectra.names[place] for place in kept]
    blocks = {name: spectra[name] for name in names}
    density = _densities(list(blocks.values()), names)
    along = Scale(float(density.grid[0]), float(density.grid[-1]), _LEFT, _RIGHT)
    lowest = _lowest(blocks.values())
    up = Scale(10.0**lowest, _HIGHEST, _BOTTOM, _TOP, is_log=True)
    curves = [
        _curve(place, name, block, density, along, up)
        for place, (name, block) in enumerate(blocks.items())
    ]
    distances = _distances(js, spectra)
    pair, why = _first_pair(blocks, js)
    products = f"{spectra.num_matvecs:,} {spectra.curvature}-vector products in all"
    notes = [*spectra.notes, f"{products}; {spectra.route}" if spectra.route else products]
    if len(names) < len(spectra):
        notes.append(
            f"{len(names):,} of {counted(len(spectra), 'block')} are shown, spread evenly; "
            "ht.load has all"
        )
    linear = shown(density.axis.linthresh)
    return BlocksView(
        _table(blocks, None if distances is None else distances[kept], curves, spectra.curvature),
        tuple(curves),
        eigenvalue_ticks(density.axis, along),
        [tick for tick in up.ticks(5) if tick.place >= _TOP],
        f"eigenvalue of the {spectra.curvature} (logarithmic beyond ±{linear}, linear between)",
        "share of eigenvalues per decade",
        pair,
        why,
        tuple(notes),
    )


def _densities(blocks: Sequence[Quadrature], names: Sequence[str]) -> SpectralDensity:
    axis = symlog_axis(blocks)
    whole = spanning_grid(blocks, axis, 2, 5 * LOG_WIDTH)
    count = math.ceil((whole.high - whole.low) / (_SPACING * LOG_WIDTH)) + 1
    grid = SpectralGrid(axis, whole.low, whole.high, count)
    by_name = dict(zip(names, blocks, strict=True))
    return spectral_density(by_name, grid=grid, width=LOG_WIDTH, spread_unresolved=True)


def _lowest(blocks: Iterable[Quadrature]) -> int:
    """The power of ten below the share of one eigenvalue of the largest block."""
    largest = max(block.size for block in blocks)
    return min(-1, math.floor(math.log10(0.5 / largest)))


def _curve(
    place: int,
    name: str,
    block: Quadrature,
    density: SpectralDensity,
    along: Scale,
    up: Scale,
) -> BlockCurve:
    heights = np.minimum(up.at(np.maximum(density.values[place], up.low)), _BOTTOM)
    x = along.at(density.grid)
    is_up = heights < _BOTTOM - 0.05
    # of what lies on the bottom, only the points beside what does not
    near = is_up | np.roll(is_up, 1) | np.roll(is_up, -1)
    near[[0, -1]] = True
    path = f"{line_path(x[near], heights[near])}Z"
    ends = along.at(density.axis.position([block.smallest.value, block.largest.value]))
    low, high = np.round(ends, 1).tolist()
    return BlockCurve(place, name, path, (low, high))


def _table(
    blocks: dict[str, Quadrature],
    distances: Floats | None,
    curves: Sequence[BlockCurve],
    curvature: str,
) -> Table:
    labels = shortened(list(blocks))
    columns = (*_COLUMNS, *([] if distances is None else [_DISTANCE]), _STATUS)
    rows = []
    for place, (name, block) in enumerate(blocks.items()):
        numbers = [
            Cell(labels[place], place, curves[place]),
            Cell("", None, curves[place]),
            number(block.size),
            number(block.rms.value),
            _end(block.smallest, "≤ "),
            _end(block.largest, "≥ "),
            _trace(block),
        ]
        if distances is not None:
            numbers.append(number(float(distances[place])))
        cells = (*numbers, Cell(block.status, block.status))
        rows.append(Row(cells, f"{name} {block.status}", place))
    caption = f"Blocks of the {curvature}"
    return Table(caption, columns, tuple(rows), filtered="Filter blocks by name or status")


def _end(ritz: RitzValue, bound: str) -> Cell:
    return number(ritz.value, f"{'' if ritz.is_known else bound}{shown(ritz.value)}")


def _trace(block: Quadrature) -> Cell:
    trace = block.trace
    return number(trace.value, plus_minus(trace.value, trace.half_width))


def _distances(js: JSHeterogeneity | None, spectra: BlockSpectra) -> Floats | None:
    """(B,) each block's mean distance to the others; None where there are none."""
    if js is None or CURVATURE not in js.readings or js.names != spectra.names:
        return None
    matrix = js.readings[CURVATURE].matrix
    known = np.isfinite(matrix)
    np.fill_diagonal(known, False)
    counts = known.sum(1)
    sums = np.where(known, matrix, 0.0).sum(1)
    means: Floats = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def _first_pair(
    blocks: dict[str, Quadrature],
    js: JSHeterogeneity | None,
) -> tuple[tuple[int, int], str]:
    """The most different blocks by the first reading over pairs, else by their scales."""
    names = list(blocks)
    scales = np.array([block.rms.value for block in blocks.values()])
    if js is not None and js.readings:
        reading, found = next(iter(js.readings.items()))
        above = np.triu(np.nan_to_num(found.matrix, nan=0.0), 1)
        one, other = np.unravel_index(int(np.argmax(above)), above.shape)
        farthest = (js.names[int(one)], js.names[int(other)])
        if all(name in blocks for name in farthest):
            places = sorted((names.index(name) for name in farthest), key=lambda i: -scales[i])
            return (places[0], places[1]), f"the two that are most different by {reading}"
    pair = (int(np.argmax(scales)), int(np.argmin(scales)))
    return pair, "those of the largest and the smallest scale"


def spectrum_view(name: str, quadrature: Quadrature, spectra: BlockSpectra) -> SpectrumView:
    """Of one matrix alone: its density on a linear axis, and its outliers."""
    span = float(np.ptp(quadrature.nodes))
    width = span * max(1 / 200, 0.6 / quadrature.nodes.shape[1]) or None
    density = spectral_density(quadrature, num_points=720, width=width)
    peak = 1 / quadrature.size / (density.width * math.sqrt(2 * math.pi))  # one eigenvalue's
    floor = 0.1 * peak
    values = np.maximum(density.values[0], floor)
    curve = Curve("density", density.grid, values)
    marked = outliers(quadrature, NUM_OUTLIERS)
    curves = [curve]
    if len(marked):
        heights = np.full(len(marked), 2 * floor)
        curves.append(Curve("outlier", marked, heights, style=1, drawn_as="crosses"))
    panel = PanelOf(
        "density per unit of eigenvalue",
        curves,
        is_log=True,
        limits=(floor, 2 * float(values.max())),
    )
    x_label = f"eigenvalue of the mean loss's {spectra.curvature}"
    described = f"Density of the eigenvalues of {name}; {counted(len(marked), 'outlier')} marked"
    drawn = drawing([panel], x_label, described, panel_height=220)
    notes = (*spectra.notes, f"Gaussian kernel of {shown(density.width)} on the eigenvalue axis")
    return SpectrumView(drawn, _facts(quadrature, marked), notes)


def _facts(quadrature: Quadrature, marked: Floats) -> tuple[Fact, ...]:
    trace = quadrature.trace
    known = [
        Fact("rows", f"{quadrature.size:,}"),
        Fact("smallest eigenvalue", _end(quadrature.smallest, "≤ ").text),
        Fact("largest eigenvalue", _end(quadrature.largest, "≥ ").text),
        Fact("rms eigenvalue", shown(quadrature.rms.value)),
        Fact("trace ± 95 %", plus_minus(trace.value, trace.half_width)),
        Fact("products", f"{quadrature.num_matvecs:,}"),
        Fact("probes × steps", f"{quadrature.num_probes} × {quadrature.nodes.shape[1]}"),
    ]
    if len(marked):
        known.append(Fact("outliers, known to 1 %", ", ".join(map(shown, marked.tolist()))))
    return tuple(known)


def spectrum_headline(spectra: BlockSpectra) -> Headline:
    """How far the eigenvalues reach."""
    largest = max(spectra.items(), key=lambda pair: pair[1].largest.value)
    smallest = min(spectra.items(), key=lambda pair: pair[1].smallest.value)
    ends = f"from {_end(smallest[1].smallest, '≤ ').text} to {_end(largest[1].largest, '≥ ').text}"
    if len(spectra) == 1:
        whole = largest[1]
        reason = (
            f"The eigenvalues of the {spectra.curvature} ({whole.size:,} rows) reach {ends}; their "
            f"root mean square is {shown(whole.rms.value)}."
        )
    else:
        reason = (
            f"The eigenvalues of {counted(len(spectra), 'block')} of the {spectra.curvature} reach "
            f"{ends}: the lowest is {smallest[0]}'s, the highest {largest[0]}'s."
        )
    return Headline("plain", "Spectrum", reason)
