"""Figures: each function draws one result. The only place that imports matplotlib; no window, no global state."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.results import write_atomically
from hessian_tools.spectra.density import Axis, spectral_density
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature

MAX_PANELS = 48  # more small multiples than these cannot be read on one page
MAX_LABELS = 60  # more names than these on the side of a heat map would overlap
PAGE = 14.0  # inches, the widest small multiples
LETTER = 0.064  # inches of a letter in a block's name
LINE, FILL, MARK = "#1f4e79", "#9ecae1", "#d55e00"  # told apart in every kind of colour vision


def draw(folder: Path, spectra: BlockSpectra, js: JSHeterogeneity | None, title: str) -> list[Path]:
    """Writes a run's pictures: block_spectra.png (spectrum.png for one block alone) and, with ``js``, js_matrix.png."""
    if len(spectra) == 1:
        (name,) = spectra.names
        figure = Figure((8, 4.4), layout="constrained")
        spectrum(figure.subplots(), spectra[name])
        titled(figure, f"{title}: Hessian spectrum of {name}")
        return [written(figure, folder / "spectrum.png")]
    paths = [
        written(
            block_spectra(spectra, title=f"{title}: Hessian spectra by block"),
            folder / "block_spectra.png",
        )
    ]
    if js is not None:
        side, margin = (
            min(9.0, max(2.5, 0.155 * len(js.names))),
            LETTER * max(map(len, shortened(js.names))),
        )
        readings = [name for name in js.readings if READINGS[name].drawn]
        figure = Figure(
            (len(readings) * (side + 1.2) + margin, side + margin + 1.2), layout="compressed"
        )
        panels = figure.subplots(1, len(readings), sharey=True, squeeze=False)[0]
        for panel, reading in zip(panels, readings, strict=True):
            js_matrix(panel, js, reading)
        titled(figure, f"{title}: distances between block spectra")
        paths.append(written(figure, folder / "js_matrix.png"))
    return paths


def block_spectra(spectra: BlockSpectra, *, title: str = "") -> Figure:
    """Small multiples, a panel a block: share of eigenvalues per decade over one symlog eigenvalue axis shared by all.

    Both axes are logarithmic, for what matters (outliers) is few eigenvalues far out. The lowest share drawn is about
    that of one eigenvalue of the largest block. Each panel tells its smallest and largest eigenvalue (Ritz values).
    Beyond MAX_PANELS blocks, the title says how many of them (evenly spread) are shown.
    """
    shown = np.unique(np.linspace(0, len(spectra) - 1, min(len(spectra), MAX_PANELS)).astype(int))
    names, labels = [spectra.names[i] for i in shown], shortened(spectra.names)
    width = max(2.1, LETTER * max(len(labels[i]) for i in shown))
    most = max(2, min(6, int(PAGE / width)))
    columns = (
        len(shown) if len(shown) <= most else most - (-len(shown) % most > -len(shown) % (most - 1))
    )
    rows = -(-len(shown) // columns)
    figure = Figure((max(5.0, width * columns + 0.7), 1.5 * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    density = spectral_density(spectra, grid="symlog")
    lowest = math.floor(math.log10(0.5 / max(quadrature.size for quadrature in spectra.values())))
    for panel, row, name in zip(panels.flat, shown, names, strict=False):
        _filled(panel, density.grid, density.values[row], 10.0**lowest)
        ends = [spectra[name].smallest.value, spectra[name].largest.value]
        panel.plot(
            density.axis.position(np.array(ends)), [10.0**lowest] * 2, "|", color=MARK, markersize=9
        )
        panel.text(0.5, 0.95, "{:.3g}  to  {:.3g}".format(*ends), transform=panel.transAxes, fontsize=6.5, color=MARK,
                   ha="center", va="top")  # fmt: skip
        panel.set_title(labels[row], fontsize=7.5, pad=3)
        panel.tick_params(labelsize=6.5)
    for index, panel in enumerate(panels.flat):
        panel.set_visible(index < len(shown))
        panel.tick_params(labelbottom=index + columns >= len(shown))
    symlog_ticks(panels[0, 0], density.axis, density.grid[0], density.grid[-1])
    panels[0, 0].set_ylim(
        10.0**lowest, 2 * 10 ** (-lowest / 4)
    )  # a share is at most 2 a decade; then room for text
    panels[0, 0].set_yticks(
        [10.0**power for power in range(0, lowest - 1, -max(1, round(-lowest / 3)))]
    )
    panels[0, 0].yaxis.set_minor_locator(NullLocator())
    missing = f" ({len(shown)} of {len(spectra)} shown)" if len(shown) < len(spectra) else ""
    titled(figure, f"{title}{missing}")
    linear = f"logarithmic beyond ±{density.axis.linthresh:.1g}, linear between"
    figure.supxlabel(
        f"eigenvalue ({linear})\nsmallest and largest of each block marked", fontsize=8
    )
    figure.supylabel(
        f"share of eigenvalues per decade\n(kernel of {density.width:g} decades)", fontsize=8
    )
    return figure


def js_matrix(axes: Axes, js: JSHeterogeneity, reading: str) -> None:
    """Heat map of one reading between all pairs of blocks, (B, B)."""
    found, labels = js.readings[reading], shortened(js.names)
    image = axes.imshow(found.matrix, cmap="viridis", interpolation="nearest")
    every = -(-len(labels) // MAX_LABELS)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=6.5)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(found.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    error = "" if math.isnan(found.standard_error) else f" ± {found.standard_error:.2g}"
    axes.set_title(
        f"{READINGS[reading].title}\nmean over pairs {found.mean:.3g}{error} {found.unit}",
        fontsize=9,
    )


def spectrum(axes: Axes, quadrature: Quadrature, *, num_outliers: int = 10) -> None:
    """One spectrum: density over a linear eigenvalue axis, logarithmic upwards, outliers marked (see :func:`outliers`).

    The kernel is 0.6 of the mean distance of the nodes, so that the density shows none of the single nodes, but for
    exact spectra not below 1/200 of the range.
    """
    span = float(np.ptp(quadrature.nodes))
    width = span * max(1 / 200, 0.6 / quadrature.nodes.shape[1]) or None
    density = spectral_density(quadrature, num_points=4_000, width=width)
    floor = (
        0.1 / quadrature.size / (density.width * math.sqrt(2 * math.pi))
    )  # a tenth of one eigenvalue's peak
    _filled(axes, density.grid, density.values[0], floor)
    marked = outliers(quadrature, num_outliers)
    if len(marked):
        label = f"{len(marked)} outliers, converged to 1 %"
        axes.plot(
            marked, np.full(len(marked), 2 * floor), "v", color=MARK, markersize=5, label=label
        )
        axes.legend(fontsize=8, frameon=False)
    ends = f"smallest {quadrature.smallest.value:.4g}, largest {quadrature.largest.value:.4g}"
    axes.set_title(f"n = {quadrature.size:,}, {ends}", fontsize=9)
    axes.set_xlabel("eigenvalue of the mean loss's Hessian", fontsize=9)
    axes.set_ylabel(
        f"density per unit of eigenvalue\n(Gaussian kernel of {density.width:.2g})", fontsize=9
    )
    axes.set_ylim(floor, None)


def outliers(quadrature: Quadrature, count: int) -> np.ndarray:
    """At most ``count`` single eigenvalues far outside the bulk, ascending.

    They are Ritz values of the probe that reaches furthest: above 4 times the rms eigenvalue in magnitude (a
    semicircle ends at 2), known to 1 % by their residual bound, of a weight that is one eigenvalue's (1/n on average,
    up to 20/n by chance); the largest in magnitude, copies that differ by less than 1e-3 once.
    """
    best = int(np.argmax(np.abs(quadrature.nodes).max(axis=1)))
    nodes, residuals, weights = (
        a[best] for a in (quadrature.nodes, quadrature.residuals, quadrature.weights)
    )
    sizes = np.abs(nodes)
    single = (weights > 0) & (weights < 20 / quadrature.size)
    found = nodes[single & (residuals <= 0.01 * sizes) & (sizes > 4 * quadrature.rms.value)]
    found = found[np.diff(found, prepend=-np.inf) > 1e-3 * np.abs(found)]
    return np.sort(found[np.argsort(-np.abs(found))[:count]])


def symlog_ticks(axes: Axes, axis: Axis, low: float, high: float) -> None:
    """Ticks at powers of ten of the eigenvalue, on both sides of zero where there are any, on an axis in decades."""
    step = max(1, math.ceil((high - low) / 5))  # decades between labels, so that they do not touch
    powers = 10.0 ** (math.ceil(math.log10(axis.linthresh)) + np.arange(max(high, -low) + 1))
    powers = powers[axis.position(powers) <= max(high, -low)]
    major = powers[axis.position(powers) >= 0.7 * step]
    both = major[axis.position(major) <= min(high, -low)]  # the same labels left and right
    major = (both if len(both) else major)[::-1][::step]
    for values, minor in (
        (np.concatenate([-major, [0.0], major]), False),
        (np.concatenate([-powers, powers]), True),
    ):
        positions = axis.position(values)
        inside = (positions >= low) & (positions <= high)
        axes.set_xticks(
            positions[inside], None if minor else [_power(v) for v in values[inside]], minor=minor
        )


def shortened(names: Sequence[str]) -> list[str]:
    """Names without ``.weight``, if they stay different, and without what all share at the front."""
    bare = [name.replace(".weight", "") for name in names]
    names = bare if len(set(bare)) == len(bare) else names
    prefix = names[0].split(".") if len(names) > 1 else []
    while prefix and not all(name.startswith(".".join([*prefix, ""])) for name in names):
        prefix.pop()
    return [name[len(".".join([*prefix, ""])) if prefix else 0 :] for name in names]


def titled(figure: Figure, title: str) -> None:
    """Puts ``title`` on top, wrapped to the figure's width, which grows in height for it."""
    lines = textwrap.wrap(title, int(12 * figure.get_figwidth()))  # letters an inch at this size
    figure.set_figheight(figure.get_figheight() + 0.17 * (len(lines) - 1))
    figure.suptitle("\n".join(lines), fontsize=10)


def written(figure: Figure, path: Path) -> Path:
    """The figure as a PNG of 150 dots an inch, whole or not at all; returns ``path``."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return write_atomically(path, buffer.getvalue())


def _filled(axes: Axes, grid: np.ndarray, values: np.ndarray, floor: float) -> None:
    values = np.maximum(values, floor)
    axes.fill_between(grid, values, floor, color=FILL, linewidth=0)
    axes.semilogy(grid, values, color=LINE, linewidth=0.9)


def _power(value: float) -> str:
    return f"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$" if value else "0"
