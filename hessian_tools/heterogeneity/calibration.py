"""What SGD lost to Adam on networks that were trained: what a verdict compares with.

``assets/calibration.json`` is written by ``experiments/evidence_calibration.py`` from the committed
lines of the evidence, docs/evidence/verdict.md. A gap is (L_sgd - L_adam) / (L_0 - L_adam), of
training losses at the end, both optimizers at their best rates, and L_0 at the start.
"""

import functools
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ASSET = "calibration.json"
NEAREST = 4


@dataclass(frozen=True)
class TrainedPair:
    """A network and its data.

    Attributes:
        name: FAMILY/WHAT of the evidence's suite.
        scale, curvature: its readings at initialisation, decades.
        gap: negative where SGD was ahead.
    """

    name: str
    scale: float
    curvature: float
    gap: float

    def distance(self, scale: float, curvature: float) -> float:
        """From readings, in decades."""
        return float(np.hypot(self.scale - scale, self.curvature - curvature))


@dataclass(frozen=True)
class Calibration:
    """All pairs that were trained, and what the analysis found.

    Attributes:
        batch_size: examples in a batch; ``num_steps`` of a run.
        tie: gaps smaller in size are none.
        finding: a sentence; which readings told the gap of families that they had not seen.
    """

    pairs: tuple[TrainedPair, ...]
    batch_size: int
    num_steps: int
    tie: float
    finding: str

    @classmethod
    @functools.cache
    def packaged(cls) -> "Calibration":
        """That of assets/calibration.json."""
        path = importlib.resources.files("hessian_tools") / "assets" / ASSET
        found = json.loads(path.read_text("utf-8"))
        pairs = tuple(TrainedPair(**pair) for pair in found.pop("pairs"))
        return cls(pairs, **found)

    def nearest(self, scale: float, curvature: float) -> list[TrainedPair]:
        """The pairs whose two readings are closest."""
        return sorted(self.pairs, key=lambda pair: pair.distance(scale, curvature))[:NEAREST]

    def text(self) -> str:
        """How often which optimizer was ahead, and what the analysis found."""
        gaps = np.array([pair.gap for pair in self.pairs])
        adam = int((gaps >= self.tie).sum())
        sgd = int((gaps <= -self.tie).sum())
        low, middle, high = np.quantile(gaps, [0.1, 0.5, 0.9])
        return (
            f"Of {len(gaps)} small networks trained here (batches of {self.batch_size}, "
            f"{self.num_steps:,} steps, best rates) Adam ended ahead of SGD with momentum on "
            f"{adam}, behind on {sgd}, and on {len(gaps) - adam - sgd} within {self.tie:.0%} of "
            f"the progress; SGD's loss of progress was {_share(middle)} in the middle, "
            f"{_share(low)} to {_share(high)} for 8 in 10. {self.finding}"
        )


def nearest_text(pairs: Sequence[TrainedPair]) -> str:
    """Which were nearest, and what they lost."""
    told = ", ".join(f"{pair.name} {_share(pair.gap)}" for pair in pairs)
    return f"Nearest in both readings, with what SGD lost there: {told}."


def _share(gap: float) -> str:
    """A share of progress, without the minus of what rounds to zero."""
    return f"{100 * gap + 0.0:.0f}%".replace("-0%", "0%")
