"""Figures of a checked partition: each tensor's evidence, and the Hessian as a heat map of entries
or of blocks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from hessian_tools.plots.spectra import MAX_LABELS, titled, written
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.structure.report import CutEvidence, PartitionReport, TensorReport
from hessian_tools.tables import shortened

MOST_ROWS = 80  # tensors of one picture
MOST_BORDERS = 64  # more lines between blocks than these would run together
DECADES = 5  # of a heat map's colours
COUPLING_FLOOR = 1e-2  # of colours
COLOURS = {
    "follows": "#1f7a4d",
    "too coarse": "#b8860b",
    "too fine": "#7b3fa0",
    "wrong axis": "#d55e00",
    "undecided": "#7f7f7f",
}
GREY = "#555555"  # of cuts that are not claimed
MARKS = {"rows": "s", "columns": "D", "heads": "^", "roles": "P", "elements": ".", "experts": "X"}
OTHER_MARKS = "*vp<>hd"


def draw(
    folder: Path,
    report: PartitionReport,
    drawn: DenseBlock | Coupling | None,
    title: str,
    kind: str = "png",
) -> list[Path]:
    """Writes evidence, and hessian (dense entries) or coupling (between tensors).

    ``kind``: png, pdf or svg.
    """
    paths = []
    count = min(MOST_ROWS, len(_with_alternatives(report)))
    if count:
        figure = Figure((10, 0.22 * count + 2.4), layout="constrained")
        evidence(figure.subplots(), report)
        of_what = f"each way to cut a tensor's {report.curvature}"
        titled(figure, f"{title}: mass inside the blocks of {of_what}")
        paths.append(written(figure, folder / f"evidence.{kind}"))
    if drawn is not None:
        figure = Figure((10, 9), layout="compressed")
        if isinstance(drawn, DenseBlock):
            dense(figure.subplots(), drawn)
            titled(figure, f"{title}: dense {drawn.curvature} over the blocks claimed")
            path = folder / f"hessian.{kind}"
        else:
            tensors(figure.subplots(), drawn)
            titled(figure, f"{title}: coupling between tensors")
            path = folder / f"coupling.{kind}"
        paths.append(written(figure, path))
    return paths


def evidence(axes: Axes, report: PartitionReport) -> None:
    """A row a tensor: the excess mass of every cut but the whole, and the verdict.

    The excess is 0 without structure and 1 where all mass is inside. A row has the verdict's
    colour; the claimed cut is ringed.
    """
    several = _with_alternatives(report)
    shown = several[:MOST_ROWS]
    finite = [cut for tensor in shown for cut in tensor.evidence if np.isfinite(cut.excess)]
    # in the order of their first appearance
    marks = marks_of(dict.fromkeys(cut.cut for cut in finite))
    for row, tensor in enumerate(shown):
        axes.axhspan(
            row - 0.5,
            row + 0.5,
            color=COLOURS[tensor.verdict],
            alpha=0.10,
            linewidth=0,
        )
        for cut in tensor.evidence:
            if np.isfinite(cut.excess):
                _mark(axes, row, cut, tensor, marks)
        axes.text(
            1.01,
            row,
            _verdict_text(tensor),
            transform=axes.get_yaxis_transform(),  # beside the frame, whatever its range
            fontsize=7,
            color=COLOURS[tensor.verdict],
            va="center",
        )
    axes.set_yticks(range(len(shown)), shortened([t.name for t in shown]), fontsize=6.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(*_range(finite))
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.axvline(0, color="black", linewidth=0.6)
    missing = len(several) - len(shown)
    axes.set_xlabel(
        "excess of mass inside blocks: 0 without structure, 1 block-diagonal (two standard errors)"
        + (f"; {missing} more tensors not shown" if missing else ""),
        fontsize=8,
    )
    axes.legend(
        handles=_legend(marks),
        ncols=7,
        fontsize=7,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
    )
    axes.spines[["top", "right"]].set_visible(False)


def _with_alternatives(report: PartitionReport) -> list[TensorReport]:
    """Tensors that can be cut in more than one way."""
    return [tensor for tensor in report.tensors if len(tensor.evidence) > 1]


def marks_of(cuts: Iterable[str]) -> dict[str, str]:
    """A marker for each cut, no two alike as long as there are markers."""
    others = itertools.cycle(OTHER_MARKS)
    return {cut: MARKS[cut] if cut in MARKS else next(others) for cut in cuts}


def _range(evidence: Sequence[CutEvidence]) -> tuple[float, float]:
    """Of the excess axis: all error bars, as far as they leave 0 to 1 readable."""
    errors = [0.0 if np.isnan(cut.excess_error) else 2 * cut.excess_error for cut in evidence]
    pairs = list(zip(evidence, errors, strict=True))
    low = min([0.0, *(cut.excess - error for cut, error in pairs)])
    high = max([1.0, *(cut.excess + error for cut, error in pairs)])
    return max(low, -0.6) - 0.05, min(high, 1.6) + 0.05


def _mark(
    axes: Axes, row: int, cut: CutEvidence, tensor: TensorReport, marks: Mapping[str, str]
) -> None:
    is_claim = cut.cut == tensor.claim
    axes.errorbar(
        cut.excess,
        row,
        xerr=2 * cut.excess_error,
        marker=marks[cut.cut],
        color=COLOURS[tensor.verdict] if is_claim else GREY,
        markersize=7 if is_claim else 4.5,
        markeredgecolor="black" if is_claim else "none",
        elinewidth=0.8,
        linestyle="none",
        zorder=3 if is_claim else 2,
    )


def _verdict_text(tensor: TensorReport) -> str:
    words = f"{tensor.claim}: {tensor.verdict}"
    if tensor.claim in (WHOLE, ELEMENTS):
        return words
    return f"{words}, contrast {tensor.claimed.contrast:.3g}"


def _legend(marks: Mapping[str, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], marker=mark, color=GREY, linestyle="none", label=cut)
        for cut, mark in marks.items()
    ]
    ringed = Line2D(
        [],
        [],
        marker="o",
        color="#bbbbbb",
        markeredgecolor="black",
        linestyle="none",
        markersize=7,
        label="claimed (black edge)",
    )
    return [*handles, ringed]


def dense(axes: Axes, block: DenseBlock) -> None:
    """Heat map of log10 |H_ij|, with the borders of tensors, and of blocks where these are few."""
    sizes = np.abs(block.matrix)
    floor = (sizes.max() or 1.0) * 10.0**-DECADES
    logarithms = np.log10(np.maximum(sizes, floor))
    image = axes.imshow(logarithms, cmap="magma", interpolation="nearest")
    owners = [name.partition("[")[0] for name in block.names]
    starts = [i for i, name in enumerate(owners) if i == 0 or owners[i - 1] != name]
    ends = [*starts[1:], len(owners)]
    _borders(axes, block.offsets[starts], 0.9)
    _borders(axes, block.offsets, 0.25)
    centres = (block.offsets[starts] + block.offsets[ends]) / 2
    labels = shortened([owners[i] for i in starts])
    axes.set_yticks(centres, labels, fontsize=7)
    axes.set_xticks(centres, labels, fontsize=7, rotation=90)
    _colour_bar(axes, image, f"log10 of |entry|, the lowest {DECADES} decades below the largest")


def _borders(axes: Axes, edges: NDArray[np.int64], width: float) -> None:
    if len(edges) > MOST_BORDERS:
        return
    for edge in edges:
        if edge > 0:
            axes.axhline(edge - 0.5, color="white", linewidth=width, alpha=0.8)
            axes.axvline(edge - 0.5, color="white", linewidth=width, alpha=0.8)


def tensors(axes: Axes, coupling: Coupling) -> None:
    """Heat map of |H_ij|_F / sqrt(|H_ii|_F |H_jj|_F) between tensors, estimated."""
    image = axes.imshow(
        coupling.tensor_coupling,
        cmap="viridis",
        norm=LogNorm(COUPLING_FLOOR, clip=True),
        interpolation="nearest",
    )
    labels = shortened(coupling.groups)
    every = -(-len(labels) // MAX_LABELS)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=6.5)
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=6.5)
    _colour_bar(
        axes, image, "normalised coupling of tensors (1: as strong as within; below 0.01 as 0.01)"
    )


def _colour_bar(axes: Axes, image: AxesImage, label: str) -> None:
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label(label, fontsize=8)
