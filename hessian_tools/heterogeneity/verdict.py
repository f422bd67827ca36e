"""SGD or Adam? What is known of two readings that stay when the loss is multiplied by a constant.

Both the spread of scales and the distance of curvatures have an interval that covers. The rule:

- "nothing to compare": fewer than two blocks have a Hessian.
- "no heterogeneity found": both intervals reach zero.
- "undecided": everything else. No reading has passed so far where it was to tell what SGD loses to
  Adam, so that the verdict says what was measured on networks that were trained
  (:mod:`hessian_tools.heterogeneity.calibration`), and that a race decides.

The literature's own reading decides nothing: it changes when the loss is multiplied by a constant
and has a floor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hessian_tools.heterogeneity.calibration import Calibration, nearest_text
from hessian_tools.results import registered

Decision = Literal["undecided", "no heterogeneity found", "nothing to compare"]


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

    decision: str  # a Decision ("SGD" and "Adam" as well in results of earlier versions)
    reason: str
    uncertainty: str  # the intervals
    scale_free: str  # how the most different blocks differ, and what the literature's reading says
    calibration: str  # what networks that were trained have shown

    def __str__(self) -> str:
        parts = (self.reason, self.uncertainty, self.scale_free, self.calibration)
        return f"{self.decision}. {' '.join(part for part in parts if part)}"


def decide(
    readings: Mapping[str, Evidence],
    contrast: Contrast | None,
    literature: tuple[float, float] | None = None,
    calibration: Calibration | None = None,
) -> Verdict:
    """The verdict on "scale" and "curvature".

    ``contrast`` is None where fewer than two blocks have a Hessian; ``literature`` is JS0 and its
    floor, where they were asked for; ``calibration`` is the packaged one by default.
    """
    if contrast is None:
        reason = "Fewer than two blocks have a Hessian beyond rounding."
        return Verdict("nothing to compare", reason, "", "", "")
    decision, reason = _decision(readings)
    details = " ".join([_contrast(contrast), *_literature(literature)])
    known = calibration or Calibration.packaged()
    return Verdict(decision, reason, _intervals(readings), details, _calibrated(readings, known))


def _decision(readings: Mapping[str, Evidence]) -> tuple[Decision, str]:
    unresolved = [name for name, found in readings.items() if not found.is_resolved]
    if unresolved:
        return "undecided", f"Not resolved at these probes and steps: {' and '.join(unresolved)}."
    if all(found.low <= 0 for found in readings.values()):
        return "no heterogeneity found", "The blocks may all have one and the same spectrum."
    return "undecided", "A race of a few minutes decides between SGD and Adam; readings do not yet."


def _calibrated(readings: Mapping[str, Evidence], calibration: Calibration) -> str:
    words = calibration.text()
    if all(found.is_resolved for found in readings.values()):
        scale, curvature = (max(readings[name].mean, 0.0) for name in ("scale", "curvature"))
        words += f" {nearest_text(calibration.nearest(scale, curvature))}"
    return words


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
