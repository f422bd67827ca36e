"""The literature's four quadratics, and quadratics shaped like a measured network.

Sources: Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, arXiv 2402.16788 (kappa 5000) and
the thesis arXiv 2608.16760 (cases 3 and 4 at kappa 2000). "Shifted and scaled to kappa" is theirs.
They do not say whether blocks are shifted together or each on its own, so ``shift`` offers both.
Together, the most negative block decides how far all others lie from zero: their scales are lost
and max_l kappa_l is kappa. On its own, each block keeps its scale.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import ArrayLike

from hessian_tools.quadratic.construction import from_blocks
from hessian_tools.quadratic.problems import Quadratic, exact_quadrature, gaussian
from hessian_tools.spectra.quadrature import Floats, Quadrature
from hessian_tools.structure.dense import DenseBlock

CASES = (1, 2, 3, 4)
DRAWS = ("nodes", "weights")
SHIFTS = ("blocks", "joint")
_MEASURED_CASES = (1, 2)
KAPPA_OF_MEASURED = 5000  # the paper's
_KAPPA_OF_TRIPLES = 2000  # the thesis'
_LOWEST_KAPPA = 104  # of cases 3 and 4: the third group lies above the second
_MEASURED = "assets/quadratic_cases.json"


def case(
    number: int,
    *,
    kappa: float | None = None,
    seed: int = 0,
    num_problems: int | None = None,
    shift: str = "blocks",
) -> Quadratic:
    """The four cases of the literature, with random orthogonal bases.

    3: blocks {1, 2, 3}, {99, 100, 101}, {kappa - 2, kappa - 1, kappa}, heterogeneous. 4: the same
    nine eigenvalues, the i-th of each triple in block i, homogeneous. 1 and 2: 30 eigenvalues a
    block, drawn by :func:`drawn_eigenvalues` from spectra of GPT-2 and ResNet-18 blocks that this
    package measured at initialisation, see :func:`from_spectra`.

    Args:
        kappa: condition number; 2000 unless given (cases 1 and 2: 5000).
        seed: of the bases.
        num_problems: N sets of bases in one Quadratic; None is one, without an axis.
        shift: of cases 1 and 2.
    Raises:
        ValueError: for another number, a kappa at which the groups of cases 3 and 4 overlap, or
            fewer than 1 problem.
    """
    if number not in CASES:
        raise ValueError(f"number is {number!r}; the cases are 1, 2, 3 and 4")
    blocks: Mapping[str, ArrayLike]
    if number in _MEASURED_CASES:
        kappa = KAPPA_OF_MEASURED if kappa is None else kappa
        blocks = _measured_blocks(number, kappa, shift)
    else:
        kappa = _KAPPA_OF_TRIPLES if kappa is None else kappa
        blocks = _triples(number, kappa)
    return from_blocks(
        list(blocks.values()),
        names=blocks,
        name=f"case {number}",
        seed=seed,
        num_problems=num_problems,
    )


def _measured_blocks(number: int, kappa: float, shift: str) -> dict[str, Floats]:
    measured = json.loads(files("hessian_tools").joinpath(_MEASURED).read_text())
    blocks = measured[str(number)]["eigenvalues"]
    values = shifted_and_scaled(list(blocks.values()), kappa, shift)
    return dict(zip(blocks, values, strict=True))


def _triples(number: int, kappa: float) -> dict[str, list[float]]:
    """The nine eigenvalues of cases 3 and 4, in the blocks of the one or the other."""
    if not _LOWEST_KAPPA <= kappa < math.inf:
        raise ValueError(
            f"kappa is {kappa}; cases 3 and 4 need at least {_LOWEST_KAPPA}: "
            "their groups must be apart"
        )
    groups: list[list[float]] = [[1, 2, 3], [99, 100, 101], [kappa - 2, kappa - 1, kappa]]
    if number == 4:
        groups = [list(column) for column in zip(*groups, strict=True)]
    return {f"block {index}": group for index, group in enumerate(groups, start=1)}


def from_spectra(
    spectra: Mapping[str, Quadrature] | DenseBlock,
    *,
    per_block: int = 30,
    kappa: float = KAPPA_OF_MEASURED,
    draw: str = "nodes",
    shift: str = "blocks",
    seed: int = 0,
    num_problems: int | None = None,
    name: str = "measured",
) -> Quadratic:
    """A quadratic shaped like a measured network: eigenvalues drawn from its block spectra.

    Args:
        spectra: BlockSpectra (what ``blockwise_slq`` returned), any mapping of names to
            Quadratures, or a DenseBlock, whose diagonal sub-blocks' eigenvalues are taken.
        per_block: eigenvalues drawn for each block; a block with fewer, all known exactly, gives
            those.
        kappa, shift: see :func:`shifted_and_scaled`.
        draw: "nodes" draws every Ritz value with the same probability, which shows the whole range
            of each block. "weights" draws as if from the block's eigenvalues, which rarely meets
            what is rare: with a few probes nearly all draws are the nodes next to zero.
        seed: of the draw and of the bases.
        num_problems: N sets of bases for the same eigenvalues.
    Raises:
        ValueError: for no block, a setting out of range, or blocks that no shift and scale can
            bring to ``kappa``.
    """
    if isinstance(spectra, DenseBlock):
        spectra = _exact_spectra(spectra)
    if not spectra or per_block < 1 or draw not in DRAWS:
        raise ValueError(
            f"spectra holds {len(spectra)} blocks, per_block is {per_block}, draw {draw!r}; "
            "one block, one eigenvalue and one of 'nodes', 'weights' are needed"
        )
    drawn = [
        drawn_eigenvalues(quadrature, per_block, draw, seed, block)
        for block, quadrature in spectra.items()
    ]
    blocks = shifted_and_scaled(drawn, kappa, shift)
    return from_blocks(blocks, names=spectra, name=name, seed=seed, num_problems=num_problems)


def _exact_spectra(dense: DenseBlock) -> dict[str, Quadrature]:
    eigenvalues = {name: np.linalg.eigvalsh(dense.block(name)) for name in dense.names}
    return {name: exact_quadrature(e.astype(np.float64)) for name, e in eigenvalues.items()}


def drawn_eigenvalues(
    quadrature: Quadrature,
    count: int,
    draw: str,
    seed: int,
    name: str,
) -> Floats:
    """(count,) ascending draws from a block's nodes, see :func:`from_spectra`."""
    nodes, weights = quadrature.pooled
    if quadrature.status == "exact" and len(nodes) <= count:
        return np.sort(nodes)
    normal = gaussian(seed, f"eigenvalues of {name}", 1, count)[0]
    uniform = torch.special.ndtr(normal).numpy()
    # inverse of the nodes' distribution function
    order = np.argsort(nodes, kind="stable")
    masses = weights[order] if draw == "weights" else np.ones(len(nodes))
    cumulative = np.cumsum(masses)
    picked = np.searchsorted(cumulative, uniform * cumulative[-1])
    return np.sort(nodes[order][picked.clip(max=len(nodes) - 1)])


def shifted_and_scaled(
    blocks: Sequence[ArrayLike],
    kappa: float,
    shift: str = "blocks",
) -> list[Floats]:
    """``blocks`` of eigenvalues made positive, with 1 as the smallest and ``kappa`` as the largest.

    "joint": the one increasing affine map that takes the range of all to 1 .. kappa. "blocks": each
    block is shifted so that its lowest lies at a fixed small fraction c of its own range above
    zero, then all are scaled alike. With ranges from R_min to R_max, c = 1 / (kappa R_min / R_max
    - 1), and every block has kappa_l = kappa R_min / R_max.

    Raises:
        ValueError: for a kappa of at most 1, another shift, "joint" of equal eigenvalues, or
            "blocks" where one has no range or R_max / R_min reaches ``kappa``.
    """
    if not 1 < kappa < math.inf or shift not in SHIFTS:
        raise ValueError(
            f"kappa is {kappa} and shift {shift!r}; above 1, and one of 'blocks', 'joint'"
        )
    values = [np.asarray(block, dtype=np.float64) for block in blocks]
    if shift == "joint":
        return _shifted_together(values, kappa)
    return _shifted_each(values, kappa)


def _shifted_together(blocks: Sequence[Floats], kappa: float) -> list[Floats]:
    low = min(float(v.min()) for v in blocks)
    high = max(float(v.max()) for v in blocks)
    if not low < high:
        raise ValueError(
            f"all eigenvalues are {low}; "
            f"shifting and scaling to kappa {kappa} needs two different ones"
        )
    return [1 + (v - low) * ((kappa - 1) / (high - low)) for v in blocks]


def _shifted_each(blocks: Sequence[Floats], kappa: float) -> list[Floats]:
    ranges = [float(np.ptp(v)) for v in blocks]
    least, greatest = min(ranges), max(ranges)
    if not least * kappa > greatest:
        raise ValueError(
            f"blocks' ranges of eigenvalues go from {least:.3g} to {greatest:.3g}, more than "
            f"kappa {kappa:g} allows when each is shifted alone; "
            "raise kappa, leave blocks out, or choose shift='joint'"
        )
    fraction = 1 / (kappa * least / greatest - 1)
    unit = least * fraction
    return [(v - v.min() + fraction * r) / unit for v, r in zip(blocks, ranges, strict=True)]
