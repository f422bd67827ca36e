"""Figures of a checked partition: each tensor's evidence, and the Hessian as a heat map of entries or of blocks."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hessian_tools.plots.spectra import MAX_LABELS, shortened, titled, written
from hessian_tools.structure.coupling import Coupling
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.structure.report import PartitionReport

MOST_ROWS = 80  # tensors of one picture
MOST_BORDERS = 64  # lines between blocks that can be told apart
DECADES = 5  # of a heat map's colours
COLOURS = {"follows": "#1f7a4d", "too coarse": "#b8860b", "too fine": "#7b3fa0", "wrong axis": "#d55e00",
           "undecided": "#7f7f7f"}  # fmt: skip
COUPLING_FLOOR = 1e-2  # of colours
MARKS = {"rows": "s", "columns": "D", "heads": "^", "roles": "P", "elements": ".", "experts": "X"}


def draw(
    folder: Path, report: PartitionReport, drawn: DenseBlock | Coupling | None, title: str
) -> list[Path]:
    """Writes evidence.png, and hessian.png (dense entries) or coupling.png (between tensors)."""
    shown = [t for t in report.tensors if len(t.evidence) > 1][:MOST_ROWS]
    paths = []
    if shown:
        figure = Figure((10, 0.22 * len(shown) + 2.4), layout="constrained")
        evidence(figure.subplots(), report)
        titled(figure, f"{title}: mass inside the blocks of each way to cut a tensor's Hessian")
        paths.append(written(figure, folder / "evidence.png"))
    if drawn is not None:
        figure = Figure((10, 9), layout="compressed")
        if isinstance(drawn, DenseBlock):
            dense(figure.subplots(), drawn)
            titled(figure, f"{title}: dense Hessian over the blocks claimed")
        else:
            tensors(figure.subplots(), drawn)
            titled(figure, f"{title}: coupling between tensors")
        paths.append(
            written(
                figure,
                folder / ("hessian.png" if isinstance(drawn, DenseBlock) else "coupling.png"),
            )
        )
    return paths


def evidence(axes: Axes, report: PartitionReport) -> None:
    """A row a tensor: the excess mass of every cut but the whole (0 without structure, 1 all inside), the verdict's
    colour, the claimed cut ringed."""
    shown = [t for t in report.tensors if len(t.evidence) > 1][:MOST_ROWS]
    used = {}
    for row, tensor in enumerate(shown):
        colour = COLOURS[tensor.verdict]
        axes.axhspan(row - 0.5, row + 0.5, color=colour, alpha=0.10, linewidth=0)
        for found in tensor.evidence:
            if not np.isfinite(found.excess):
                continue
            mark = MARKS.get(found.cut, "*")
            used[found.cut] = mark
            is_claim = found.cut == tensor.claim
            axes.errorbar(
                found.excess, row, xerr=2 * found.excess_error, marker=mark, color=colour if is_claim else "#555555",
                markersize=7 if is_claim else 4.5, markeredgecolor="black" if is_claim else "none", elinewidth=0.8,
                linestyle="none", zorder=3 if is_claim else 2,
            )  # fmt: skip
        told = (
            "" if tensor.claim in (WHOLE, ELEMENTS) else f", contrast {tensor.claimed.contrast:.3g}"
        )
        axes.text(
            1.03,
            row,
            f"{tensor.claim}: {tensor.verdict}{told}",
            fontsize=7,
            color=colour,
            va="center",
        )
    axes.set_yticks(range(len(shown)), shortened([t.name for t in shown]), fontsize=6.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-0.12, 1.42)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.axvline(0, color="black", linewidth=0.6)
    missing = len([t for t in report.tensors if len(t.evidence) > 1]) - len(shown)
    more = f"; {missing} more tensors not shown" if missing else ""
    axes.set_xlabel(f"excess of mass inside blocks: 0 without structure, 1 block-diagonal (two standard errors){more}",
                    fontsize=8)  # fmt: skip
    handles = [
        Line2D([], [], marker=mark, color="#555555", linestyle="none", label=cut)
        for cut, mark in used.items()
    ]
    handles.append(Line2D([], [], marker="o", color="#bbbbbb", markeredgecolor="black", linestyle="none", markersize=7,
                          label="claimed (black edge)"))  # fmt: skip
    axes.legend(
        handles=handles,
        ncols=7,
        fontsize=7,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
    )
    axes.spines[["top", "right"]].set_visible(False)


def dense(axes: Axes, block: DenseBlock) -> None:
    """Heat map of log10 |H_ij|, with the blocks' borders where these can be told apart, tensors' otherwise."""
    sizes = np.abs(block.matrix)
    top = sizes.max() or 1.0
    image = axes.imshow(
        np.log10(np.maximum(sizes, top * 10.0**-DECADES)), cmap="magma", interpolation="nearest"
    )
    owners = [name.partition("[")[0] for name in block.names]
    starts = [i for i, name in enumerate(owners) if i == 0 or owners[i - 1] != name]
    for edges, width in ((block.offsets[starts], 0.9), (block.offsets, 0.25)):
        if len(edges) <= MOST_BORDERS:
            for edge in edges[edges > 0]:
                axes.axhline(edge - 0.5, color="white", linewidth=width, alpha=0.8)
                axes.axvline(edge - 0.5, color="white", linewidth=width, alpha=0.8)
    ends = [*starts[1:], len(owners)]
    centres = [(block.offsets[a] + block.offsets[b]) / 2 for a, b in zip(starts, ends, strict=True)]
    labels = shortened([owners[i] for i in starts])
    axes.set_yticks(centres, labels, fontsize=7)
    axes.set_xticks(centres, labels, fontsize=7, rotation=90)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(f"log10 of |entry|, the lowest {DECADES} decades below the largest", fontsize=8)


def tensors(axes: Axes, found: Coupling) -> None:
    """Heat map of |H_ij|_F / sqrt(|H_ii|_F |H_jj|_F) between tensors, estimated."""
    labels, every = shortened(found.groups), -(-len(found.groups) // MAX_LABELS)
    image = axes.imshow(
        found.tensor_coupling,
        cmap="viridis",
        norm=LogNorm(COUPLING_FLOOR, clip=True),
        interpolation="nearest",
    )
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=6.5)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(
        "normalised coupling of tensors (1: as strong as within; below 0.01 as 0.01)", fontsize=8
    )
