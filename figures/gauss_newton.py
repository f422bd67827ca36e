"""Draws the block spectra of Hessian and Gauss-Newton matrix over each other, two networks.

`python figures/gauss_newton.py [RESULT] [PICTURE]` reads results only.
"""

import math
import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

import hessian_tools as ht
from hessian_tools.plots.spectra import symlog_ticks
from hessian_tools.tables import shortened

COLUMNS = 9
COLOURS = {"Hessian": "#1f5fa8", "Gauss-Newton": "#d55e00"}
ZERO = "#888888"


def shares(of_network: dict[str, Any], block: str) -> str:
    """How much of the block's mass the Gauss-Newton matrix has."""
    h, g, _ = of_network["masses"][block].sum(1)
    share = 100 * g / h
    return f"{share:.0f} %" if share >= 1 else f"{share:.1g} %"


def network(figure: SubFigure, name: str, of_network: dict[str, Any]) -> None:
    """A panel a block: share of eigenvalues per decade over one symlog axis."""
    spectra = {kind: of_network[kind]["spectra"] for kind in COLOURS}
    blocks = list(spectra["Hessian"])
    pooled = {f"{kind}|{b}": spectra[kind][b] for kind in COLOURS for b in blocks}
    density = ht.spectral_density(pooled, grid="symlog", spread_unresolved=True)
    lowest = 0.5 / max(quadrature.size for quadrature in pooled.values())
    rows = math.ceil(len(blocks) / COLUMNS)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(blocks) :]:
        panel.set_visible(False)
    values = dict(zip(pooled, density.values, strict=True))
    for panel, block, label in zip(panels.flat, blocks, shortened(blocks), strict=False):
        for kind, colour in COLOURS.items():
            heights = values[f"{kind}|{block}"].clip(lowest)
            panel.fill_between(density.grid, lowest, heights, color=colour, alpha=0.18, lw=0)
            panel.plot(density.grid, heights, color=colour, linewidth=1)
        panel.axvline(0, color=ZERO, linewidth=0.6, zorder=0)
        panel.set_title(f"{label}\n{shares(of_network, block)}", fontsize=7.5, pad=3)
        panel.tick_params(labelsize=6.5, labelbottom=True)
        panel.set_yscale("log")
        panel.set_ylim(lowest, 3)
    symlog_ticks(panels[0, 0], density.axis, density.grid[0], density.grid[-1])
    whole = shares(of_network, "whole")
    figure.suptitle(f"{name}: of the whole Hessian's mass, Gauss-Newton has {whole}", fontsize=10)


def main(
    source: str = "results/gauss_newton/result",
    target: str = __file__.replace(".py", ".png"),
) -> None:
    found = ht.load(source)
    rows = [math.ceil(len(of["Hessian"]["spectra"]) / COLUMNS) for of in found.values()]
    figure = Figure((16, 1.75 * sum(rows) + 1.8), layout="constrained")
    parts = figure.subfigures(len(found), 1, height_ratios=[r + 0.4 for r in rows], squeeze=False)
    for part, (name, of_network) in zip(parts.flat, found.items(), strict=True):
        network(part, name, of_network)
    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="upper right", frameon=False, fontsize=9, ncols=2)
    figure.supxlabel(
        "eigenvalue, symlog; per cent: |G|² over |H|² of the block (squared Frobenius norms)",
        fontsize=8.5,
    )
    figure.supylabel("share of eigenvalues per decade", fontsize=8.5)
    title = "Block spectra of the Hessian and the Gauss-Newton matrix at initialisation"
    figure.suptitle(title, fontsize=11)
    figure.savefig(target, dpi=130, metadata={"Title": title})


if __name__ == "__main__":
    main(*sys.argv[1:])
