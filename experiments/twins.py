"""A pretrained network against random ones of its configuration: are its blocks more alike?"""

from collections.abc import Iterable, Mapping

import hessian_tools as ht
from hessian_tools.heterogeneity.block_heterogeneity import ScaleSpread
from hessian_tools.results import Journal

PRETRAINED = "pretrained"
SEEDS = (0, 1)  # of the random networks of a kind


def names(kinds: Iterable[str]) -> list[str]:
    """The pretrained network, and the random ones of every kind: "KIND, seed SEED"."""
    return [PRETRAINED, *(f"{kind}, seed {seed}" for kind in kinds for seed in SEEDS)]


def parted(name: str) -> tuple[str, int]:
    """Kind and seed of a random network's name."""
    kind, _, seed = name.rpartition(", seed ")
    return kind, int(seed)


def spectra(
    problem: ht.Problem,
    blocks: Iterable[ht.Block],
    num_probes: int,
    journal: Journal,
    name: str,
) -> ht.BlockSpectra:
    """Two Lanczos steps, which is what the rms eigenvalue of a block needs.

    Blocks that the journal has under ``name`` are not computed again.
    """
    prefix = f"{name}|"
    known = {
        key.removeprefix(prefix): found
        for key, found in journal.finished.items()
        if key.startswith(prefix)
    }
    return ht.blockwise_slq(
        ht.HessianOperator(problem),
        list(blocks),
        num_probes=num_probes,
        num_steps=2,
        exact=False,
        finished=known,
        on_block=lambda block, found: journal.append(prefix + block, found),
    )


def spread(found: ht.BlockSpectra) -> ScaleSpread:
    """Of the scales of blocks, decades, with its 95 % interval."""
    return ht.js_heterogeneity(found).scale_spread


def judged(spreads: Mapping[str, tuple[float, float]]) -> str:
    """Of the intervals by network."""
    low, high = spreads[PRETRAINED]
    others = [interval for name, interval in spreads.items() if name != PRETRAINED]
    if all(high < other_low for other_low, _ in others):
        return "holds here"
    if all(low > other_high for _, other_high in others):
        return "does not hold here"
    return "not decidable"
