"""How different the spectra of blocks are: readings, their errors, a verdict.

Reading order: estimate, divergence, measure, transport, log_axis, literature, readings, comparison,
verdict, block_heterogeneity. Then, for runs that add probes and steps until a reading is known well
enough: uncertainty, allocation, adaptive.
"""

from hessian_tools.heterogeneity.adaptive import AdaptiveJS0, adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import (
    JSHeterogeneity,
    Reading,
    ScaleSpread,
    js_heterogeneity,
)
from hessian_tools.heterogeneity.measure import Jackknifed, Measure, PairMeasure, Sampled
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.heterogeneity.uncertainty import Uncertainty
from hessian_tools.heterogeneity.verdict import Verdict

__all__ = [
    "READINGS",
    "AdaptiveJS0",
    "JSHeterogeneity",
    "Jackknifed",
    "Measure",
    "PairMeasure",
    "Reading",
    "Sampled",
    "ScaleSpread",
    "Uncertainty",
    "Verdict",
    "adaptive_js0",
    "js_heterogeneity",
]
