"""Heat maps between blocks: a picture of colours, and the numbers under the pointer.

Letters: B blocks.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.page.scales import Scale, Tick
from hessian_tools.page.views import NUMBERS, Cell, Column, Row, Table, evenly_spread, number
from hessian_tools.spectra.quadrature import Floats
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.tables import shortened

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 400  # of a dense matrix' side
MOST_LABELS = 72
NUM_PAIRS = 6
DECADES = 5  # of a dense matrix' colours
COUPLING_FLOOR = 1e-2
BAR = 260.0  # length of the colour bar
_TOP = 65534  # the largest share of the range, in 16 bits; beyond it, not known
# viridis (van der Walt & Smith 2015, CC0), at even distances
_COLOURS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725".split()
_SHADES = 255  # of colours; the one after them is transparent


@dataclass(frozen=True)
class HeatMap:
    """A symmetric matrix between blocks.

    Attributes:
        told: about it, in a sentence or two.
        image: a PNG of B x B pixels as a data URI, rows from the top.
        numbers: base64 of little-endian 16-bit shares of low to high, of the upper triangle with
            the diagonal, row by row; "" where cells have no numbers.
        is_log: whether these shares, and the colours, are of logarithms.
        ticks: of the colour bar.
        names: (B,) in full; labels short, empty where there is no room for them.
        borders: shares of the side at which blocks of a dense matrix begin.
        pairs: the cells that matter most, as a table.
    """

    title: str
    told: str
    unit: str
    image: str
    numbers: str
    low: float
    high: float
    is_log: bool
    ticks: list[Tick]
    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    borders: tuple[float, ...] = ()
    pairs: Table | None = None


@dataclass(frozen=True)
class MapsView:
    """Maps and the bar of their colours.

    ``joins``: whether a cell's two blocks can be compared in a chart of the same run.
    """

    maps: list[HeatMap]
    joins: bool
    bar: str
    bar_length: float = BAR


def maps_view(maps: list[HeatMap], joins: bool = False) -> MapsView:
    """Maps with the colours that they share."""
    return MapsView(maps, joins, _uri(_image(np.arange(_SHADES)[None] / (_SHADES - 1))))


def reading_maps(js: JSHeterogeneity, most: int) -> list[HeatMap]:
    """One a reading over pairs, of at most ``most`` blocks a side."""
    maps = []
    for name, reading in js.readings.items():
        title = READINGS[name].title if name in READINGS else name
        kept = evenly_spread(len(js.names), most)
        told = f"Mean over pairs: {js.told(name)}, {reading.unit}."
        values = reading.matrix[np.ix_(kept, kept)]
        high = float(values.max(initial=0.0, where=np.isfinite(values))) or 1.0
        names = [js.names[place] for place in kept]
        maps.append(
            _between_blocks(
                f"{title[:1].upper()}{title[1:]}",
                told + _left_out(kept, js.names),
                reading.unit,
                _Range(0.0, high, False),
                values,
                names,
                _pairs("Most different pairs", reading.matrix, js.names, reading.unit),
            )
        )
    return maps


def coupling_map(coupling: Coupling, most: int) -> HeatMap:
    """Between tensors, on a logarithmic scale."""
    kept = evenly_spread(len(coupling.groups), most)
    values = coupling.tensor_coupling[np.ix_(kept, kept)]
    high = max(1.0, float(values.max(initial=1.0, where=np.isfinite(values))))
    told = (
        f"Mass of the {coupling.curvature} between two tensors, normalised: 1 is as strong as "
        f"within. Below {COUPLING_FLOOR:g} it is drawn as {COUPLING_FLOOR:g}."
    )
    return _between_blocks(
        "Normalised coupling",
        told + _left_out(kept, coupling.groups),
        "normalised coupling",
        _Range(COUPLING_FLOOR, high, True),
        values,
        [coupling.groups[place] for place in kept],
        _pairs("Strongest couplings", coupling.tensor_coupling, coupling.groups, "coupling"),
    )


def dense_map(block: DenseBlock) -> HeatMap:
    """The sizes of all entries of a small model's matrix; of those in a pixel the largest."""
    sizes = np.abs(block.matrix)
    count = len(sizes)
    edges = np.linspace(0, count, min(count, MOST_PIXELS) + 1).astype(int)[:-1]
    sizes = np.maximum.reduceat(np.maximum.reduceat(sizes, edges, axis=0), edges, axis=1)
    highest = float(sizes.max()) or 1.0
    scale = _Range(highest * 10.0**-DECADES, highest, True)
    borders = (block.offsets[1:-1] / count).tolist() if len(block.names) <= MOST_LABELS else []
    return HeatMap(
        "Sizes of entries",
        f"{count:,} rows over {len(block.names):,} blocks, whose borders are drawn where they are "
        f"few; the lowest colour is {DECADES} decades below the largest entry.",
        "|entry|",
        _uri(_image(scale.shares(sizes))),
        "",
        scale.low,
        scale.high,
        True,
        scale.ticks(),
        borders=tuple(round(border, 4) for border in borders),
    )


@dataclass(frozen=True)
class _Range:
    """Of colours and numbers."""

    low: float
    high: float
    is_log: bool

    def shares(self, values: Floats) -> Floats:
        """From 0 to 1; nan stays."""
        if not self.is_log:
            return np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)
        logs = np.log(np.maximum(values, self.low) / self.low)
        return np.clip(logs / math.log(self.high / self.low), 0.0, 1.0)

    def ticks(self) -> list[Tick]:
        return Scale(self.low, self.high, 0.0, BAR, self.is_log).ticks(5)


def _between_blocks(
    title: str,
    told: str,
    unit: str,
    scale: _Range,
    values: Floats,
    names: Sequence[str],
    pairs: Table,
) -> HeatMap:
    shares = scale.shares(values)
    return HeatMap(
        title,
        told,
        unit,
        _uri(_image(shares)),
        _numbers(shares),
        scale.low,
        scale.high,
        scale.is_log,
        scale.ticks(),
        tuple(names),
        tuple(shortened(names)) if len(names) <= MOST_LABELS else (),
        pairs=pairs,
    )


def _left_out(kept: Sequence[int], names: Sequence[str]) -> str:
    if len(kept) == len(names):
        return ""
    return f" {len(kept):,} of {len(names):,} blocks are drawn, spread evenly."


def _numbers(shares: Floats) -> str:
    whole = np.where(np.isfinite(shares), np.round(shares * _TOP), _TOP + 1)
    upper = whole[np.triu_indices(len(whole))].astype("<u2")
    return base64.b64encode(upper.tobytes()).decode()


def _image(shares: Floats) -> "Image":
    """One pixel a cell; what is not known is transparent."""
    from PIL import Image

    known = np.isfinite(shares)
    shades = np.round(np.where(known, shares, 0.0) * (_SHADES - 1))
    image = Image.fromarray(np.where(known, shades, _SHADES).astype(np.uint8))
    image.putpalette(_palette().tobytes())
    return image


def _palette() -> NDArray[np.uint8]:
    """(256, 3), the last one for what is transparent."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _COLOURS])
    at = np.linspace(0, len(anchors) - 1, _SHADES)
    places = np.arange(len(anchors))
    channels = [np.interp(at, places, anchors[:, channel]) for channel in range(3)]
    colours = np.round(np.stack(channels, axis=1)).astype(np.uint8)
    return np.concatenate([colours, np.zeros((1, 3), np.uint8)])


def _uri(image: "Image") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, transparency=_SHADES)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pairs(caption: str, matrix: Floats, names: Sequence[str], unit: str) -> Table:
    """The pairs with the highest numbers."""
    labels = shortened(names)
    rows, columns = np.triu_indices(len(names), 1)
    values = matrix[rows, columns]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:NUM_PAIRS]
    found = []
    for one, other, value in zip(rows[order], columns[order], values[order], strict=True):
        if np.isfinite(value):
            ends = [Cell(labels[end], labels[end], names[end]) for end in (one, other)]
            found.append(Row((*ends, number(float(value)))))
    header = (Column("block", "name"), Column("and", "name"), Column(unit, NUMBERS))
    return Table(caption, header, tuple(found))
