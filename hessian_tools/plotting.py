"""Figures: each function draws one result. The only place that imports matplotlib; no window system, no global state."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hessian_tools.density import LOG_WIDTH, Axis, spectral_density
from hessian_tools.heterogeneity import JSHeterogeneity
from hessian_tools.quadrature import BlockSpectra, Quadrature
from hessian_tools.results import write_atomically

MAX_PANELS = 60  # more small multiples than these cannot be read on one page
MAX_LABELS = 60  # more names than these on the side of a heat map would overlap
PAGE = 14.0  # inches, the widest picture
LINE, FILL, MARK = "#1f4e79", "#9ecae1", "#d55e00"  # told apart in every kind of colour vision
READING_NAMES = {
    "unnormalised": "JS0 (literature, unnormalised)", "bounded": "JS, bounded", "log": "JS on a logarithmic axis",
    "wasserstein": "Wasserstein distance on a logarithmic axis",
}  # fmt: skip


def block_spectra(spectra: BlockSpectra, *, title: str = "") -> Figure:
    """Small multiples, a panel a block: share of eigenvalues per decade over one symlog eigenvalue axis shared by all.

    Beyond MAX_PANELS blocks, the title says how many of them (evenly spread) are shown.
    """
    labels = dict(zip(spectra.names, shortened(spectra.names), strict=True))
    shown = np.unique(np.linspace(0, len(spectra) - 1, min(len(spectra), MAX_PANELS)).astype(int))
    chosen = [spectra.names[i] for i in shown]
    density = spectral_density(spectra, grid="symlog")
    width = max(2.1, 0.068 * max(len(labels[name]) for name in chosen))  # inches that the longest name needs
    most = max(1, min(6, int(PAGE / width)))
    columns = len(chosen) if len(chosen) <= most else min(range(max(1, most - 2), most + 1), key=lambda c: (-len(chosen) % c, -c))
    rows = -(-len(chosen) // columns)
    figure = Figure((width * columns + 0.7, 1.5 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    floor = 10.0 ** math.floor(math.log10(0.5 / max(quadrature.size for quadrature in spectra.values())))
    for panel, row in zip(panels.flat, shown, strict=False):
        name = spectra.names[row]
        values = np.maximum(density.values[row], floor)
        panel.fill_between(density.grid, values, floor, color=FILL, linewidth=0)
        panel.semilogy(density.grid, values, color=LINE, linewidth=0.8)
        ends = [spectra[name].smallest.value, spectra[name].largest.value]
        panel.plot(density.axis.position(np.array(ends)), [floor, floor], "|", color=MARK, markersize=9, clip_on=False)
        panel.set_title(labels[name], fontsize=7.5, pad=3)
        panel.text(0.5, 0.95, "{:.3g}  to  {:.3g}".format(*ends), transform=panel.transAxes, fontsize=6.5, ha="center", va="top", color=MARK)
        panel.tick_params(labelsize=6.5)
    for index, panel in enumerate(panels.flat):
        panel.set_visible(index < len(chosen))
        panel.tick_params(labelbottom=index + columns >= len(chosen))
    symlog_ticks(panels[0, 0], density.axis, density.grid[0], density.grid[-1])
    panels[0, 0].set_ylim(floor, 60)
    panels[0, 0].yaxis.set_major_locator(LogLocator(numticks=5))
    panels[0, 0].yaxis.set_minor_locator(LogLocator(numticks=20))
    figure.suptitle(title + ("" if len(chosen) == len(spectra) else f" ({len(chosen)} of {len(spectra)} blocks shown)"), fontsize=10)
    figure.supxlabel(f"eigenvalue (logarithmic, linear within ±{density.axis.linthresh:.0e}); smallest and largest marked", fontsize=8)
    figure.supylabel(f"share of eigenvalues per decade (kernel: {density.width:g} decades)", fontsize=8)
    return figure


def js_matrix(axes: Axes, js: JSHeterogeneity, reading: str) -> None:
    """Heat map of one reading between all pairs of blocks, (B, B)."""
    found = js.readings[reading]
    image = axes.imshow(found.matrix, cmap="viridis", interpolation="nearest")
    labels = shortened(js.names)
    every = -(-len(labels) // MAX_LABELS)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=6.5)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(found.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title(f"{READING_NAMES[reading]}\nmean over pairs {found.mean:.3g} ± {found.standard_error:.1g} {found.unit}", fontsize=9)


def spectrum(axes: Axes, quadrature: Quadrature, *, num_outliers: int = 10) -> None:
    density = spectral_density(quadrature, num_points=4_000)
    width = KW * (quadrature.nodes.max() - quadrature.nodes.min()) / quadrature.nodes.shape[1] if KW else None
    density = spectral_density(quadrature, num_points=4_000, width=width)
    floor = 0.1 / quadrature.size / (density.width * np.sqrt(2 * np.pi))  # a tenth of one eigenvalue's peak
    values = np.maximum(density.values[0], floor)
    axes.fill_between(density.grid, values, floor, color=FILL, linewidth=0)
    axes.semilogy(density.grid, values, color=LINE, linewidth=0.9)
    marked = outliers(quadrature, num_outliers)
    axes.plot(marked, np.full(len(marked), floor * 1.6), linestyle="none", marker="v", color=MARK, markersize=5,
              label=f"{len(marked)} converged outliers")  # fmt: skip
    axes.set_xlabel("eigenvalue of the mean loss's Hessian", fontsize=9)
    axes.set_ylabel(f"density per unit of eigenvalue\n(Gaussian kernel of {density.width:.2g})", fontsize=9)
    axes.set_ylim(floor, None)
    axes.legend(fontsize=8, frameon=False)

KW = None

def outliers(quadrature: Quadrature, count: int) -> np.ndarray:
    """Up to ``count`` eigenvalues outside the bulk, from the probe whose Ritz values reach furthest."""
    best = int(np.argmax(np.abs(quadrature.nodes).max(axis=1)))
    nodes, residuals, weights = (a[best] for a in (quadrature.nodes, quadrature.residuals, quadrature.weights))
    single = weights < 20 / quadrature.size  # a random probe gives one eigenvector weight about 1/n (chi-square spread)
    converged = (residuals <= 0.01 * np.abs(nodes)) & single & (weights > 0)
    found = nodes[converged]
    found = found[np.concatenate([[True], np.diff(found) > 1e-3 * np.abs(found[1:])])] if len(found) else found
    return np.sort(found[np.argsort(-np.abs(found))[:count]])


def symlog_ticks(axes: Axes, axis: Axis, low: float, high: float) -> None:
    """Ticks at powers of ten of the eigenvalue, on both sides of zero, on an axis in decades."""
    powers = 10.0 ** np.arange(np.ceil(np.log10(axis.linthresh)) + 1, 40)
    powers = powers[axis.position(powers) <= max(high, -low)]
    major = powers[::-1][:: max(1, -(-len(powers) // 3))]
    for values, minor in ((np.concatenate([-major, [0], major]), False), (np.concatenate([-powers, powers]), True)):
        positions = axis.position(values)
        inside = (positions >= low) & (positions <= high)
        labels = [] if minor else [_power(value) for value in values[inside]]
        axes.set_xticks(positions[inside], labels or None, minor=minor)


def shortened(names: Sequence[str]) -> list[str]:
    """Names without what all share at the front, and without ``.weight`` where that leaves them different."""
    prefix = names[0].split(".") if len(names) > 1 else []
    while prefix and not all(name.startswith(".".join(prefix) + ".") for name in names):
        prefix.pop()
    short = [name[len(".".join([*prefix, ""])) :] for name in names]
    bare = [name.replace(".weight", "") for name in short]
    return bare if len(set(bare)) == len(bare) else short


def _power(value: float) -> str:
    return f"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$" if value else "0"
