"""The literature's four quadratics, and quadratics shaped like a measured network.

Sources: Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, arXiv 2402.16788 (kappa 5000) and the thesis arXiv
2608.16760 (cases 3 and 4 at kappa 2000). "Shifted and scaled to kappa" is theirs; whether blocks are shifted together
or each on its own they do not say, so both are here (``shift``). Together, the most negative block decides how
far all others lie from zero, their scales are lost and max_l kappa_l is kappa; on its own, each keeps its scale.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from hessian_tools.quadratic.problems import Quadratic, exact_quadrature, from_blocks
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.structure.dense import DenseBlock

CASES = (1, 2, 3, 4)
DRAWS = ("nodes", "weights")
SHIFTS = ("blocks", "joint")
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

    3: blocks {1, 2, 3}, {99, 100, 101}, {kappa - 2, kappa - 1, kappa}, heterogeneous; 4: the same nine eigenvalues,
    the i-th of each triple in block i, homogeneous. 1 and 2: 30 eigenvalues a block drawn by :func:`drawn_eigenvalues`
    from spectra of GPT-2 and ResNet-18 blocks that this package measured at initialisation, see :func:`from_spectra`.

    Args:
        kappa: condition number; 2000 unless given (cases 1 and 2: 5000).
        seed: of the bases. num_problems: N sets of bases in one Quadratic; None is one, without an axis.
        shift: of cases 1 and 2.
    Raises:
        ValueError: for another number, a kappa at which the groups of cases 3 and 4 overlap, or fewer than 1 problem.
    """
    if number not in CASES:
        raise ValueError(f"number is {number!r}; the cases are 1, 2, 3 and 4")
    kappa = (2000 if number > 2 else 5000) if kappa is None else kappa
    settings: dict[str, Any] = {
        "name": f"case {number}",
        "seed": seed,
        "num_problems": num_problems,
    }
    if number < 3:
        kept = json.loads(files("hessian_tools").joinpath(_MEASURED).read_text())[str(number)][
            "eigenvalues"
        ]
        return from_blocks(
            shifted_and_scaled(list(kept.values()), kappa, shift), names=kept, **settings
        )
    if not _LOWEST_KAPPA <= kappa < math.inf:
        raise ValueError(
            f"kappa is {kappa}; cases 3 and 4 need at least {_LOWEST_KAPPA}: their groups must be apart"
        )
    groups = [[1, 2, 3], [99, 100, 101], [kappa - 2, kappa - 1, kappa]]
    return from_blocks(
        groups if number == 3 else [list(column) for column in zip(*groups, strict=True)],
        **settings,
    )


def from_spectra(
    spectra: Mapping[str, Quadrature] | DenseBlock, *, per_block: int = 30, kappa: float = 5000, draw: str = "nodes",
    shift: str = "blocks", seed: int = 0, num_problems: int | None = None, name: str = "measured",
) -> Quadratic:  # fmt: skip
    """A quadratic shaped like a measured network: eigenvalues drawn from its block spectra, shifted and scaled.

    Args:
        spectra: BlockSpectra (what ``blockwise_slq`` returned), any mapping of names to Quadratures, or a DenseBlock,
            whose diagonal sub-blocks' eigenvalues are taken.
        per_block: eigenvalues drawn for each block; a block with fewer, known exactly, gives all of its own.
        kappa, shift: see :func:`shifted_and_scaled`.
        draw: "nodes", each Ritz value alike, which shows the whole range of every block; "weights", as if eigenvalues
            of the block were drawn at random, which rarely meets what is rare: with a few probes nearly all draws are
            the nodes next to zero.
        seed: of the draw and of the bases. num_problems: N sets of bases for the same eigenvalues.
    Raises:
        ValueError: for no block, a setting out of range, or blocks that no shift and scale can bring to ``kappa``.
    """
    if isinstance(spectra, DenseBlock):
        values = {block: np.linalg.eigvalsh(spectra.block(block)) for block in spectra.names}
        spectra = {block: exact_quadrature(torch.from_numpy(e)) for block, e in values.items()}
    if not spectra or per_block < 1 or draw not in DRAWS:
        given = f"spectra holds {len(spectra)} blocks, per_block is {per_block}, draw {draw!r}"
        raise ValueError(
            f"{given}; one block, one eigenvalue and one of {', '.join(map(repr, DRAWS))} are needed"
        )
    drawn = [
        drawn_eigenvalues(quadrature, per_block, draw, seed, block)
        for block, quadrature in spectra.items()
    ]
    blocks = shifted_and_scaled(drawn, kappa, shift)
    return from_blocks(blocks, names=spectra, name=name, seed=seed, num_problems=num_problems)


def drawn_eigenvalues(
    quadrature: Quadrature, count: int, draw: str, seed: int, name: str
) -> np.ndarray:
    """(count,) ascending draws from a block's nodes, see :func:`from_spectra`."""
    nodes, weights = quadrature.pooled
    if quadrature.status == "exact" and len(nodes) <= count:
        return np.sort(nodes)
    normal = draw_probes("gaussian", seed, f"eigenvalues of {name}", 1, count, dtype=torch.float64)[
        0
    ]
    order = np.argsort(nodes, kind="stable")
    reached = np.cumsum(weights[order] if draw == "weights" else np.ones(len(nodes)))
    picked = np.searchsorted(reached, torch.special.ndtr(normal).numpy() * reached[-1])
    return np.sort(nodes[order][picked.clip(max=len(nodes) - 1)])


def shifted_and_scaled(
    blocks: Sequence[Any], kappa: float, shift: str = "blocks"
) -> list[np.ndarray]:
    """``blocks`` of eigenvalues made positive, smallest 1 and largest ``kappa``.

    "joint": the one increasing affine map that takes the range of all to 1 .. kappa. "blocks": each block is shifted so
    that its lowest lies at a fixed small fraction c of its own range above zero, then all are scaled alike; with ranges
    from R_min to R_max, c = 1 / (kappa R_min / R_max - 1), and every block has kappa_l = kappa R_min / R_max.

    Raises:
        ValueError: for a kappa of at most 1, another shift, "joint" of equal eigenvalues, or "blocks" where one has no
            range or R_max / R_min reaches ``kappa``.
    """
    if not 1 < kappa < math.inf or shift not in SHIFTS:
        raise ValueError(
            f"kappa is {kappa} and shift {shift!r}; above 1, and one of {', '.join(map(repr, SHIFTS))}"
        )
    values = [np.asarray(block, dtype=np.float64) for block in blocks]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    ranges = [float(np.ptp(v)) for v in values]
    if shift == "joint":
        if not low < high:
            raise ValueError(
                f"all eigenvalues are {low}; shifting and scaling to kappa {kappa} needs two different ones"
            )
        return [1 + (v - low) * ((kappa - 1) / (high - low)) for v in values]
    if not min(ranges) * kappa > max(ranges):
        raise ValueError(
            f"blocks' ranges of eigenvalues go from {min(ranges):.3g} to {max(ranges):.3g}, more than kappa {kappa:g} "
            "allows when each is shifted alone; raise kappa, leave blocks out, or choose shift='joint'"
        )
    fraction = 1 / (kappa * min(ranges) / max(ranges) - 1)
    unit = min(ranges) * fraction
    return [(v - v.min() + fraction * r) / unit for v, r in zip(values, ranges, strict=True)]
