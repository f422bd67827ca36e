"""SGD or Adam? The literature's reading of heterogeneity against the literature's table, with its uncertainty, in
words.

Rule: the gap between the highest CNN and the lowest Transformer-like network published at initialisation is cut into
three equal logarithmic parts. The decision is "SGD" if JS0 with two standard errors to either side lies in the lowest,
"Adam" if it lies in the highest, and "undecided" otherwise: between, when a single probe leaves the error unknown, and
when a scale-free reading says the opposite, for the table's own reading changes when the loss is only multiplied by a
constant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hessian_tools.results import registered


class PublishedJS0(NamedTuple):
    """One row of the table of Zhang et al., "Why Transformers Need Adam", NeurIPS 2024, arXiv 2402.16788."""

    model: str
    js0: float
    transformer_like: bool  # a network on which Adam beats SGD by far
    at_initialisation: bool


PUBLISHED_JS0 = (
    PublishedJS0("VGG16", 0.09, False, True),
    PublishedJS0("ResNet18", 0.10, False, True),
    PublishedJS0("GPT2 (pretrained)", 18.84, True, False),
    PublishedJS0("MLP-mixer", 34.90, True, True),
    PublishedJS0("BERT", 53.38, True, True),
    PublishedJS0("GPT2", 83.23, True, True),
    PublishedJS0("ViT-base", 286.41, True, True),
)
# Readings of the quadratics on which GD beats Adam (case 4) and Adam beats GD (case 3) of the same paper, kappa = 2000,
# exact eigenvalues; not published, computed by this package (tests/test_heterogeneity.py recomputes them).
SCALE_FREE_CASES = {"log": (0.081, 0.693), "wasserstein": (0.11, 2.03)}
_CALIBRATION = (
    "Calibration: the literature's table alone (arXiv 2402.16788, networks at initialisation), the gap between CNNs "
    "and Transformers cut in three at {:.2f} and {:.2f}. JS0 depends on the scale of the loss and on the grid, and the "
    "table's loss was summed over micro-batches: a guide, until the project's own evidence replaces it."
)


@dataclass(frozen=True)
class Contrast:
    """The two blocks whose spectra differ most, and how."""

    first: str  # the block of the larger scale
    second: str
    scale_factor: (
        float  # ratio of root mean square eigenvalues, inf when the second block's Hessian is zero
    )
    shape_decades: (
        float  # 1-Wasserstein distance after each is divided by its own rms, nan when one is zero
    )


@registered
@dataclass(frozen=True)
class Verdict:
    """What to train with, and how far that can be trusted; ``str`` gives all of it."""

    decision: str  # "SGD" | "Adam" | "undecided"
    reason: str
    uncertainty: str
    scale_free: str  # what the readings say that do not depend on the loss' scale
    calibration: str

    def __str__(self) -> str:
        return f"{self.decision}. {self.reason} {self.uncertainty} {self.scale_free} {self.calibration}"


def thirds(low: float, high: float) -> tuple[float, float]:
    """The two values that cut the gap from ``low`` to ``high`` into three equal logarithmic parts."""
    step = (high / low) ** (1 / 3)
    return low * step, high / step


def published_boundaries() -> tuple[float, float]:
    """(0.70, 4.96): JS0 below the first is like the published CNNs, above the second like the Transformers."""
    started = [row for row in PUBLISHED_JS0 if row.at_initialisation]
    cnn = max(row.js0 for row in started if not row.transformer_like)
    return thirds(cnn, min(row.js0 for row in started if row.transformer_like))


def decide(
    js0: float,
    standard_error: float,
    contrast: Contrast,
    scale_free: Mapping[str, float],
    *,
    bias: float = 0.0,
) -> Verdict:
    """The verdict on JS0 (the unnormalised mean; nan when it was not asked for).

    ``scale_free`` maps "log" (nats) and "wasserstein" (decades), where computed, to their means; ``bias`` is the
    estimated bias of ``js0``, by which the interval is widened.
    """
    corrected = js0 - bias
    low, high = min(js0, corrected) - 2 * standard_error, max(js0, corrected) + 2 * standard_error
    lower, upper = published_boundaries()
    decision, place = (
        "undecided",
        f"not clear of the range {lower:.2f} to {upper:.2f} between CNNs and Transformers",
    )
    if high < lower:
        decision, place = "SGD", f"below {lower:.2f}, with the published CNNs"
    elif low > upper:
        decision, place = "Adam", f"above {upper:.2f}, with the published Transformers"
    leanings = {name: _leaning(name, mean) for name, mean in scale_free.items()}
    opposed = " and ".join(
        name for name, leaning in leanings.items() if {decision, leaning} == {"SGD", "Adam"}
    )
    uncertainty = "Its uncertainty is unknown."
    if math.isnan(js0):
        reading = "The literature's reading JS0 was not computed, so nothing is decided."
    elif math.isnan(standard_error):
        reading = f"JS0 is {js0:.3g}, but one probe leaves its error unknown, so nothing is decided; take two or more."
    else:
        reading = f"JS0 is {js0:.3g}, {place}."
        source = "jackknife over probes" if standard_error else "exact spectra"
        uncertainty = f"Standard error {standard_error:.2g} and bias {bias:+.2g} ({source}): {low:.3g} to {high:.3g}."
    if opposed:
        reading += (
            f" That alone would say {decision}; contradicted by {opposed}, it decides nothing."
        )
        decision = "undecided"
    calibration = _CALIBRATION.format(lower, upper)
    return Verdict(
        decision,
        f"{reading} {_contrast(contrast)}",
        uncertainty,
        _scale_free(scale_free),
        calibration,
    )


def _contrast(pair: Contrast) -> str:
    names = f"The most different blocks are {pair.first} and {pair.second}"
    if math.isnan(pair.shape_decades):
        return f"{names}; the Hessian of {'the latter' if pair.scale_factor > 1 else 'both'} is exactly zero."
    return (
        f"{names}: their scales (rms eigenvalue) differ by a factor of {pair.scale_factor:.3g}, "
        f"their shapes (spectra divided by their own scale) by {pair.shape_decades:.2g} decades."
    )


def _leaning(name: str, mean: float) -> str:
    lower, upper = thirds(*SCALE_FREE_CASES[name])
    return ("SGD", "undecided", "Adam")[(mean >= lower) + (mean > upper)]


def _scale_free(means: Mapping[str, float]) -> str:
    if not means:
        return "Readings that do not depend on the loss' scale were not computed."
    told = []
    for name, mean in means.items():
        unit, (low, high) = {"log": "nats", "wasserstein": "decades"}[name], SCALE_FREE_CASES[name]
        cases = f"two reference quadratics have {low:g} and {high:g}: {_leaning(name, mean)}"
        told.append(f"{name} {mean:.3g} {unit} ({cases})")
    return f"Scale-free readings, without any published calibration: {'; '.join(told)}."
