"""SGD or Adam? What the spread of scales and the distance of curvatures can say, and no more.

Both readings stay the same when the loss is multiplied by a constant, and both have an interval
that covers. The rule:

- "nothing to compare": fewer than two blocks have a Hessian.
- "no heterogeneity found": both intervals reach zero.
- "Adam": the interval of the spread of scales lies above BETWEEN, where of nine networks at
  initialisation only Transformers were found, for which the literature reports that Adam wins by
  far.
- "undecided": everything else. Below BETWEEN, CNNs and an MLP lie beside an MLP-Mixer, of which the
  literature says opposite things; and an unresolved reading decides nothing.

The distance of curvatures does not separate these networks, and only confirms that blocks are
alike. The literature's own reading decides nothing: it changes when the loss is multiplied by a
constant and has a floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hessian_tools.results import registered

Decision = Literal["Adam", "undecided", "no heterogeneity found", "nothing to compare"]

# Spread of block scales in decades, half way in logarithm from the highest of two ResNets, a VGG,
# an MLP and a Mixer (0.77) to the lowest of four Transformers (1.17), see
# docs/evidence/js0_families.md.
BETWEEN = 0.95
_CALIBRATION = (
    "Calibration: nine networks at initialisation, and what the literature reports about their "
    "families (arXiv 2402.16788). Neither reading has been held against training yet: a question "
    "to try, not an answer."
)


class Evidence(NamedTuple):
    """A reading and its interval; the latter is nan where the reading is not resolved."""

    mean: float
    low: float
    high: float

    @property
    def is_resolved(self) -> bool:
        return not np.isnan(self.low)


@dataclass(frozen=True)
class Contrast:
    """The two blocks whose curvature differs most, and how."""

    first: str  # the block of the larger scale
    second: str
    scale_factor: float  # ratio of rms eigenvalues
    shape_decades: float  # "curvature" of the two, each divided by its own rms


@registered
@dataclass(frozen=True)
class Verdict:
    """What to train with, and how far that can be trusted; ``str`` gives all of it."""

    decision: str  # a Decision ("SGD" as well in results of earlier versions)
    reason: str
    uncertainty: str  # the intervals
    scale_free: str  # how the most different blocks differ, and what the literature's reading says
    calibration: str

    def __str__(self) -> str:
        parts = (self.reason, self.uncertainty, self.scale_free, self.calibration)
        return f"{self.decision}. {' '.join(part for part in parts if part)}"


def decide(
    readings: Mapping[str, Evidence],
    contrast: Contrast | None,
    literature: tuple[float, float] | None = None,
) -> Verdict:
    """The verdict on "scale" and "curvature".

    ``contrast`` is None where fewer than two blocks have a Hessian; ``literature`` is JS0 and its
    floor, where they were asked for.
    """
    if contrast is None:
        reason = "Fewer than two blocks have a Hessian beyond rounding."
        return Verdict("nothing to compare", reason, "", "", "")
    decision, reason = _decision(readings)
    details = [_contrast(contrast), *_literature(literature)]
    return Verdict(decision, reason, _intervals(readings), " ".join(details), _CALIBRATION)


def _decision(readings: Mapping[str, Evidence]) -> tuple[Decision, str]:
    unresolved = [name for name, found in readings.items() if not found.is_resolved]
    if unresolved:
        return "undecided", f"Not resolved at these probes and steps: {' and '.join(unresolved)}."
    if all(found.low <= 0 for found in readings.values()):
        return "no heterogeneity found", "The blocks may all have one and the same spectrum."
    if readings["scale"].low > BETWEEN:
        return "Adam", (
            f"Above a spread of scales of {BETWEEN:g} decades only Transformers were found, which "
            "are said to need Adam."
        )
    return "undecided", (
        f"Not above a spread of scales of {BETWEEN:g} decades: there the literature finds networks "
        "for SGD and networks for Adam."
    )


def _intervals(readings: Mapping[str, Evidence]) -> str:
    told = [
        f"{name} {max(found.mean, 0.0):.3g} decades ({max(found.low, 0.0):.3g} to {found.high:.3g})"
        for name, found in readings.items()
        if found.is_resolved
    ]
    return f"With 95 % intervals: {', '.join(told)}." if told else ""


def _contrast(pair: Contrast) -> str:
    return (
        f"The most different blocks are {pair.first} and {pair.second}: their scales (rms "
        f"eigenvalue) differ by a factor of {pair.scale_factor:.3g}, their shapes (curvature "
        f"divided by its own scale) by {max(pair.shape_decades, 0.0):.2g} decades."
    )


def _literature(found: tuple[float, float] | None) -> list[str]:
    if found is None:
        return []
    js0, floor = found
    return [
        f"The literature's JS0 is {js0:.3g}, of which blocks with one and the same spectrum would "
        f"have {floor:.3g} at these probes and steps; it moves with the loss' scale and decides "
        "nothing here."
    ]
