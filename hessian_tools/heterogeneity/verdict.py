"""SGD or Adam? The literature's reading against the literature's table, with its uncertainty.

Rule: the gap between the highest CNN and the lowest Transformer-like network published at
initialisation is cut into three equal logarithmic parts. The decision is "SGD" if JS0 with two
standard errors to either side lies in the lowest, "Adam" if it lies in the highest, and "undecided"
otherwise: between, when a single probe leaves the error unknown, when a scale-free reading says the
opposite, for the table's own reading changes when the loss is only multiplied by a constant, and
when the literature's kernel is wider than all spectra, which then look alike whatever they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.results import registered

Decision = Literal["SGD", "Adam", "undecided"]


class PublishedJS0(NamedTuple):
    """A row of the table of Zhang et al., "Why Transformers Need Adam", arXiv 2402.16788."""

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
_CALIBRATION = (
    "Calibration: the literature's table alone (arXiv 2402.16788, networks at initialisation), "
    "the gap between CNNs and Transformers cut in three at {:.2f} and {:.2f}. JS0 depends on the "
    "scale of the loss and on the grid, and the table's loss was summed over micro-batches: a "
    "guide, until the project's own evidence replaces it."
)


@dataclass(frozen=True)
class Contrast:
    """The two blocks whose spectra differ most, and how."""

    first: str  # the block of the larger scale
    second: str
    scale_factor: float  # ratio of rms eigenvalues, inf when the second block's Hessian is zero
    shape_decades: float  # 1-Wasserstein distance of spectra over their own rms, nan if one is zero


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
        parts = (self.reason, self.uncertainty, self.scale_free, self.calibration)
        return f"{self.decision}. {' '.join(parts)}"


def thirds(low: float, high: float) -> tuple[float, float]:
    """The values that cut the gap from ``low`` to ``high`` into three equal logarithmic parts."""
    step = (high / low) ** (1 / 3)
    return low * step, high / step


def published_boundaries() -> tuple[float, float]:
    """(0.70, 4.96): JS0 below is like the published CNNs, above like the Transformers."""
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
    unseen: str = "",
) -> Verdict:
    """The verdict on JS0 (the unnormalised mean; nan when it was not asked for).

    ``scale_free`` maps readings with reference cases ("log", "wasserstein"), where computed, to
    their means; ``bias`` is the estimated bias of ``js0``, by which the interval is widened;
    ``unseen`` says why JS0 could see nothing, "" where it could.
    """
    boundaries = published_boundaries()
    low = min(js0, js0 - bias) - 2 * standard_error
    high = max(js0, js0 - bias) + 2 * standard_error
    decision = _side(low, high, boundaries)
    reason = _reason(js0, standard_error, decision, boundaries)
    if unseen and decision != "undecided":
        reason += f" That alone would say {decision}, but {unseen}."
        decision = "undecided"
    opposed = [
        name
        for name, mean in scale_free.items()
        if {decision, _leaning(name, mean)} == {"SGD", "Adam"}
    ]
    if opposed:
        reason += (
            f" That alone would say {decision}; contradicted by {' and '.join(opposed)}, it "
            "decides nothing."
        )
        decision = "undecided"
    uncertainty = "Its uncertainty is unknown."
    if not math.isnan(standard_error) and not math.isnan(js0):
        source = "jackknife over probes" if standard_error else "exact spectra"
        uncertainty = (
            f"Standard error {standard_error:.2g} and bias {bias:+.2g} ({source}): "
            f"{low:.3g} to {high:.3g}."
        )
    return Verdict(
        decision,
        f"{reason} {_contrast(contrast)}",
        uncertainty,
        _scale_free(scale_free),
        _CALIBRATION.format(*boundaries),
    )


def _side(low: float, high: float, boundaries: tuple[float, float]) -> Decision:
    """On which side of the boundaries an interval lies; "undecided" if it is not clear of them."""
    lower, upper = boundaries
    if high < lower:
        return "SGD"
    if low > upper:
        return "Adam"
    return "undecided"


def _leaning(name: str, mean: float) -> Decision:
    cases = READINGS[name].reference_cases
    assert cases is not None
    return _side(mean, mean, thirds(*cases))


def _reason(
    js0: float,
    standard_error: float,
    decision: Decision,
    boundaries: tuple[float, float],
) -> str:
    """What JS0 alone says, in words."""
    if math.isnan(js0):
        return "The literature's reading JS0 was not computed, so nothing is decided."
    if math.isnan(standard_error):
        return (
            f"JS0 is {js0:.3g}, but one probe leaves its error unknown, so nothing is decided; "
            "take two or more."
        )
    lower, upper = boundaries
    places = {
        "SGD": f"below {lower:.2f}, with the published CNNs",
        "Adam": f"above {upper:.2f}, with the published Transformers",
        "undecided": (
            f"not clear of the range {lower:.2f} to {upper:.2f} between CNNs and Transformers"
        ),
    }
    return f"JS0 is {js0:.3g}, {places[decision]}."


def _contrast(pair: Contrast) -> str:
    names = f"The most different blocks are {pair.first} and {pair.second}"
    if math.isnan(pair.shape_decades):
        zero = "the latter" if pair.scale_factor > 1 else "both"
        return f"{names}; the Hessian of {zero} is exactly zero."
    return (
        f"{names}: their scales (rms eigenvalue) differ by a factor of {pair.scale_factor:.3g}, "
        "their shapes (spectra divided by their own scale) by "
        f"{pair.shape_decades:.2g} decades."
    )


def _scale_free(means: Mapping[str, float]) -> str:
    if not means:
        return "Readings that do not depend on the loss' scale were not computed."
    statements = []
    for name, mean in means.items():
        measure = READINGS[name]
        assert measure.reference_cases is not None
        low, high = measure.reference_cases
        cases = f"two reference quadratics have {low:g} and {high:g}: {_leaning(name, mean)}"
        statements.append(f"{name} {mean:.3g} {measure.unit} ({cases})")
    listed = "; ".join(statements)
    return f"Scale-free readings, without any published calibration: {listed}."
