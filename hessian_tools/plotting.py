"""Figures: each function draws one result on given axes. The only place that imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessian_tools.density import Axis, spectral_density
from hessian_tools.heterogeneity import JSHeterogeneity
from hessian_tools.quadrature import BlockSpectra, Quadrature

MAX_PANELS = 48  # more small multiples than these cannot be read on one page
LINE, FILL, OUTLIER = "#1f4e79", "#9ecae1", "#c0392b"


def block_spectra(spectra: BlockSpectra, *, title: str = "") -> Figure:
    """Small multiples, a panel a block: density per decade over one symlog eigenvalue axis shared by all.

    Beyond MAX_PANELS blocks, the title says how many of them (evenly spread) are shown.
    """
    chosen = _spread(spectra.names, MAX_PANELS)
    density = spectral_density(spectra, grid="symlog")
    columns = min(5, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 0.6, 1.55 * rows + 1.1), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    labels = shortened(spectra.names)
    for panel, name in zip(axes.flat, chosen, strict=False):
        row = spectra.names.index(name)
        panel.fill_between(density.grid, density.values[row], color=FILL, linewidth=0)
        panel.plot(density.grid, density.values[row], color=LINE, linewidth=0.9)
        panel.set_title(labels[row], fontsize=7.5, pad=2)
        panel.tick_params(labelsize=6.5)
        top = spectra[name].largest.value
        panel.text(0.97, 0.93, f"max {top:.2g}", transform=panel.transAxes, fontsize=6.5, ha="right", va="top")
    for index, panel in enumerate(axes.flat):
        if index >= len(chosen):
            panel.set_visible(False)
        elif index + columns >= len(chosen):
            panel.tick_params(labelbottom=True)
    symlog_ticks(axes[0, 0], density.axis, density.grid[0], density.grid[-1])
    shown = "" if len(chosen) == len(spectra) else f" ({len(chosen)} of {len(spectra)} blocks shown)"
    figure.suptitle(f"{title or 'Hessian spectra by block'}{shown}", fontsize=10)
    figure.supxlabel(
        f"eigenvalue of the mean loss's Hessian (logarithmic, linear below {density.axis.linthresh:.0e})", fontsize=8
    )
    figure.supylabel(f"share of eigenvalues per decade\n(kernel of {density.width:g} decades)", fontsize=8)
    return figure


def js_matrix(axes: Axes, js: JSHeterogeneity, reading: str = "wasserstein") -> None:
    """Heat map of one reading between all pairs of blocks, (B, B)."""
    found = js.readings[reading]
    image = axes.imshow(found.matrix, cmap="viridis", interpolation="nearest")
    labels = shortened(js.names)
    every = max(1, -(-len(labels) // 60))  # more labels than these would overlap
    size = max(3.5, min(8, 260 / len(labels)))
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=size)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=size)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(f"{reading} distance between spectra ({found.unit})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title(f"{reading}: mean over pairs {found.mean:.3g} ± {found.standard_error:.2g}", fontsize=9)


def spectrum(axes: Axes, quadrature: Quadrature, *, num_outliers: int = 10) -> None:
    """One spectrum: density over a linear eigenvalue axis, log scale; outliers marked by their Ritz values.

    Outliers are the ``num_outliers`` extreme Ritz values, by magnitude, whose residual bound is below 1 % of themselves and
    whose weight is that of a few eigenvalues: they stand for single eigenvalues, not for a part of the bulk.
    """
    density = spectral_density(quadrature, num_points=4_000)
    floor = 0.1 / quadrature.size / (density.width * np.sqrt(2 * np.pi))  # a tenth of one eigenvalue's peak
    values = np.maximum(density.values[0], floor)
    axes.fill_between(density.grid, values, floor, color=FILL, linewidth=0)
    axes.semilogy(density.grid, values, color=LINE, linewidth=0.9)
    marked = outliers(quadrature, num_outliers)
    axes.plot(marked, np.full(len(marked), floor * 1.6), linestyle="none", marker="v", color=OUTLIER, markersize=5,
              label=f"{len(marked)} converged outliers")  # fmt: skip
    axes.set_xlabel("eigenvalue of the mean loss's Hessian", fontsize=9)
    axes.set_ylabel(f"density per unit of eigenvalue\n(Gaussian kernel of {density.width:.2g})", fontsize=9)
    axes.set_ylim(floor, None)
    axes.set_title(
        f"n = {quadrature.size:,}: smallest {quadrature.smallest.value:.4g}, largest {quadrature.largest.value:.4g}",
        fontsize=9,
    )
    axes.legend(fontsize=8, frameon=False)


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
    """Ticks at powers of ten of the eigenvalue on an axis in decades."""
    decades = np.arange(np.ceil(np.log10(axis.linthresh)) + 1, 40)
    powers = 10.0**decades
    within = powers[axis.position(powers) <= max(high, -low)]
    step = max(1, len(within) // 3)
    chosen = within[::-1][::step]
    values = np.concatenate([-chosen, [0], chosen])
    positions = axis.position(values)
    inside = (positions >= low) & (positions <= high)
    axes.set_xticks(positions[inside], [_power(value) for value in values[inside]])


def shortened(names: Sequence[str]) -> list[str]:
    """Names without what all share at the front, and without ``.weight`` where that leaves them different."""
    prefix = names[0].split(".") if len(names) > 1 else []
    while prefix and not all(name.startswith(".".join(prefix) + ".") for name in names):
        prefix.pop()
    cut = len(".".join(prefix)) + 1 if prefix else 0
    short = [name[cut:] for name in names]
    bare = [name.replace(".weight", "") for name in short]
    return bare if len(set(bare)) == len(bare) else short


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG and closes the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_js0(folder: Path, spectra: BlockSpectra, js: JSHeterogeneity, title: str) -> list[Path]:
    """The pictures of a js0 run: block_spectra.png and js_matrix.png."""
    matplotlib.use("Agg")
    paths = [
        save_figure(block_spectra(spectra, title=f"{title}: Hessian spectra by block"), folder / "block_spectra.png")
    ]
    size = min(14.0, 5.5 + 0.12 * len(js.names))
    figure, axes = plt.subplots(figsize=(size, size * 0.85), layout="constrained")
    js_matrix(axes, js)
    figure.suptitle(title, fontsize=10)
    return [*paths, save_figure(figure, folder / "js_matrix.png")]


def draw_spectrum(folder: Path, spectra: BlockSpectra, title: str) -> list[Path]:
    """The picture of a spectrum run: spectrum.png for one operator, block_spectra.png for several blocks."""
    matplotlib.use("Agg")
    if len(spectra) > 1:
        return [
            save_figure(
                block_spectra(spectra, title=f"{title}: Hessian spectra by block"), folder / "block_spectra.png"
            )
        ]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    (name,) = spectra.names
    spectrum(axes, spectra[name])
    figure.suptitle(f"{title}: spectral density of {name}", fontsize=10)
    return [save_figure(figure, folder / "spectrum.png")]


def _power(value: float) -> str:
    if value == 0:
        return "0"
    exponent = round(np.log10(abs(value)))
    return f"${'-' if value < 0 else ''}10^{{{exponent}}}$"


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).astype(int))]
