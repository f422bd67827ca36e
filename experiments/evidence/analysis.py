"""Which predictors hold on families they have not seen: the statistics of the protocol.

docs/evidence/protocol.md, "Analysis" and "Survival". Families, not pairs, are the independent
units: they are what is resampled, left out and permuted.

Letters: P pairs, K predictors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
DRAWS = 10_000  # of bootstraps and of permutations
LEVEL = 0.05
MOST_UNDEFINED = 0.1  # of the pairs, of a predictor that may survive
FEWEST = 4  # pairs, below which a correlation means nothing


@dataclass(frozen=True)
class Sample:
    """Pairs with what is to be predicted.

    Attributes:
        families: (P,) names, pairs of one family side by side.
        target: (P,) gaps; nan where there is none.
    """

    families: tuple[str, ...]
    target: Floats

    @property
    def groups(self) -> list[NDArray[np.int64]]:
        """The places of each family's pairs."""
        names = np.array(self.families)
        return [np.flatnonzero(names == name) for name in dict.fromkeys(self.families)]


@dataclass(frozen=True)
class Held:
    """A predictor, or a baseline, held against the target.

    Attributes:
        correlation: Spearman's, of the pairs on which both are defined.
        low, high: 95 % interval by bootstrap over families.
        r2: of a linear fit, each family predicted from the others, against the others' mean.
        undefined: pairs that were left out.
    """

    correlation: float
    low: float
    high: float
    r2: float
    undefined: int


def held(sample: Sample, values: Floats, draws: int = DRAWS, seed: int = 0) -> Held:
    """One predictor's ``values``, (P,), against the sample's target."""
    low, high = bootstrap(sample, values, draws, seed)
    defined = np.isfinite(values) & np.isfinite(sample.target)
    return Held(
        correlation(values, sample.target),
        low,
        high,
        left_out_r2(sample, values),
        int((~defined).sum()),
    )


def correlation(values: Floats, target: Floats) -> float:
    """Spearman's, ties at their mean rank; nan where either has no two values."""
    defined = np.isfinite(values) & np.isfinite(target)
    if defined.sum() < FEWEST:
        return math.nan
    x = stats.rankdata(values[defined])
    y = stats.rankdata(target[defined])
    x -= x.mean()
    y -= y.mean()
    sizes = float(x @ x) * float(y @ y)
    return float(x @ y) / math.sqrt(sizes) if sizes > 0 else math.nan


def bootstrap(sample: Sample, values: Floats, draws: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of the correlation: families drawn with replacement."""
    random = np.random.default_rng(seed)
    groups = sample.groups
    chosen = random.integers(len(groups), size=(draws, len(groups)))
    if len(set(map(len, groups))) == 1:  # rows of one length
        places = np.stack(groups)[chosen].reshape(draws, -1)
        found = _correlations(values[places], sample.target[places])
    else:
        drawn = [np.concatenate([groups[number] for number in row]) for row in chosen]
        found = np.array([correlation(values[row], sample.target[row]) for row in drawn])
    found = found[np.isfinite(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.quantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def left_out_r2(sample: Sample, values: Floats) -> float:
    """1 - (squared errors of a line through the other families) / (those of their mean)."""
    defined = np.isfinite(values) & np.isfinite(sample.target)
    errors = spreads = 0.0
    for places in sample.groups:
        inside = np.zeros(len(values), dtype=bool)
        inside[places] = True
        test, train = inside & defined, ~inside & defined
        if not test.any() or train.sum() < 2:
            continue
        x, y = values[train], sample.target[train]
        slope = np.cov(x, y, bias=True)[0, 1] / x.var() if x.var() > 0 else 0.0
        guess = y.mean() + slope * (values[test] - x.mean())
        errors += float(((sample.target[test] - guess) ** 2).sum())
        spreads += float(((sample.target[test] - y.mean()) ** 2).sum())
    return 1 - errors / spreads if spreads > 0 else math.nan


def permuted(sample: Sample, predictors: Sequence[Floats], draws: int, seed: int) -> Floats:
    """(draws, K) correlations where gaps of whole families have been permuted among families.

    Families of unequal size are laid end to end in their new order.
    """
    random = np.random.default_rng(seed)
    groups = sample.groups
    order = np.concatenate(groups)
    laid_out = [values[order] for values in predictors]
    shuffled = [
        np.concatenate([groups[number] for number in random.permutation(len(groups))])
        for _ in range(draws)
    ]
    targets = sample.target[np.array(shuffled)]  # (draws, P)
    columns = [_correlations(np.tile(values, (draws, 1)), targets) for values in laid_out]
    return np.stack(columns, axis=1)


def _correlations(values: Floats, targets: Floats) -> Floats:
    """(draws,) of :func:`correlation`, row by row, of (draws, P) and (draws, P)."""
    if not (np.isfinite(values).all() and np.isfinite(targets).all()):
        return np.array([correlation(x, y) for x, y in zip(values, targets, strict=True)])
    x = stats.rankdata(values, axis=1)
    y = stats.rankdata(targets, axis=1)
    x -= x.mean(axis=1, keepdims=True)
    y -= y.mean(axis=1, keepdims=True)
    sizes = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    products = (x * y).sum(axis=1)
    found: Floats = np.divide(products, sizes, out=np.full(len(y), math.nan), where=sizes > 0)
    return found


def bar(sample: Sample, predictors: Sequence[Floats], draws: int = DRAWS, seed: int = 0) -> float:
    """What the best of so many predictors reaches in size by chance, in 95 of 100 cases."""
    largest = np.nanmax(np.abs(permuted(sample, predictors, draws, seed)), axis=1)
    return float(np.quantile(largest, 1 - LEVEL))


def candidates(
    found: Mapping[str, Held],
    baselines: Mapping[str, Held],
    chance: float,
    pairs: int,
) -> list[str]:
    """At most two predictors that go to the held-out families, the larger R2 first.

    ``baselines``: without the race, which costs what it would save.
    """
    to_beat = max([0.0, *(line.r2 for line in baselines.values() if math.isfinite(line.r2))])
    passed = [
        name
        for name, line in found.items()
        if line.correlation > chance
        and line.low > 0
        and line.r2 > to_beat
        and line.undefined <= MOST_UNDEFINED * pairs
    ]
    return sorted(passed, key=lambda name: -found[name].r2)[:2]


def survives(
    sample: Sample,
    values: Floats,
    baselines: Mapping[str, Floats],
    num_candidates: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> bool:
    """Whether a candidate holds on the held-out families of ``sample``."""
    reached = correlation(values, sample.target)
    others = [correlation(baseline, sample.target) for baseline in baselines.values()]
    by_chance = permuted(sample, [values], draws, seed)[:, 0]
    level = 1 - LEVEL / num_candidates
    limit = float(np.nanquantile(by_chance, level))
    return reached > limit and all(reached > other for other in others if math.isfinite(other))
