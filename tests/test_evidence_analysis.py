"""The evidence's statistics, on numbers whose answer is known."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
analysis = importlib.import_module("evidence.analysis")
gaps = importlib.import_module("evidence.gaps")
verdict = importlib.import_module("evidence_verdict")
calibration = importlib.import_module("evidence_calibration")
FAMILIES, SIZE = 12, 3
NAMES = tuple(f"f{number // SIZE}" for number in range(FAMILIES * SIZE))


def by_family(random: np.random.Generator, within: float = 0.3) -> np.ndarray:
    """Values whose families differ more than their members."""
    values = np.repeat(random.standard_normal(FAMILIES), SIZE)
    return values + within * random.standard_normal(len(values))


def test_the_correlation_is_scipys_and_leaves_out_what_is_undefined():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, 30).astype(float), random.standard_normal(30)  # x has ties
    assert analysis.correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    holes = np.append(x, [np.nan, 1.0]), np.append(y, [1.0, np.nan])
    assert analysis.correlation(*holes) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(analysis.correlation(np.ones(9), np.arange(9.0)))
    assert math.isnan(analysis.correlation(np.arange(3.0), np.arange(3.0)))


def test_r2_leaves_whole_families_out():
    random = np.random.default_rng(1)
    x = by_family(random)
    y = 2 * x + by_family(random)
    errors = spreads = 0.0
    for family in range(FAMILIES):
        test = np.arange(len(x)) // SIZE == family
        slope, intercept = np.polyfit(x[~test], y[~test], 1)
        errors += ((y[test] - slope * x[test] - intercept) ** 2).sum()
        spreads += ((y[test] - y[~test].mean()) ** 2).sum()
    sample = analysis.Sample(NAMES, y)
    assert analysis.left_out_r2(sample, x) == pytest.approx(1 - errors / spreads)
    assert analysis.left_out_r2(sample, np.ones(len(x))) == pytest.approx(0)


def test_the_interval_is_that_of_families_not_of_pairs():
    """Copies of pairs within families tell nothing new, and make no interval shorter."""
    random = np.random.default_rng(2)
    x = random.standard_normal(FAMILIES)
    y = x + random.standard_normal(FAMILIES)
    single = analysis.Sample(tuple(NAMES[::SIZE]), y)
    copied = analysis.Sample(NAMES, np.repeat(y, SIZE))
    expected = analysis.bootstrap(single, x, 500, seed=0)
    found = analysis.bootstrap(copied, np.repeat(x, SIZE), 500, seed=0)
    assert found == pytest.approx(expected, abs=1e-12)


def test_noise_passes_the_bar_as_often_as_it_says():
    passed = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        sample = analysis.Sample(NAMES, by_family(random))
        noise = [by_family(random) for _ in range(5)]
        limit = analysis.bar(sample, noise, draws=60, seed=seed)
        passed += max(abs(analysis.correlation(x, sample.target)) for x in noise) > limit
    assert passed <= 8  # 3 are expected; more than 8 come once in 200 such tests


def test_families_of_unequal_size_are_permuted_whole():
    names = ("a", "a", "b", "b", "b")
    sample = analysis.Sample(names, np.array([1.0, 2.0, 10.0, 20.0, 30.0]))
    values = np.arange(5.0)
    found = analysis.permuted(sample, [values], 50, seed=0)[:, 0]
    swapped = analysis.correlation(values, np.array([10.0, 20.0, 30.0, 1.0, 2.0]))
    assert set(np.round(found, 9)) == {1.0, round(swapped, 9)}


def test_many_correlations_at_once_are_those_one_by_one():
    random = np.random.default_rng(4)
    values = random.integers(0, 4, (20, 12)).astype(float)
    targets = random.standard_normal((20, 12))

    def one_by_one():
        return [analysis.correlation(x, y) for x, y in zip(values, targets, strict=True)]

    np.testing.assert_allclose(analysis._correlations(values, targets), one_by_one())
    values[0] = 1.0
    assert np.isnan(analysis._correlations(values, targets)[0])
    targets[3, 5] = np.nan
    np.testing.assert_allclose(analysis._correlations(values, targets), one_by_one())


def test_families_of_one_size_are_drawn_as_those_of_several_are():
    random = np.random.default_rng(5)
    values, target = by_family(random), by_family(random)
    equal = analysis.bootstrap(analysis.Sample(NAMES, target), values, 50, seed=1)
    groups = analysis.Sample(NAMES, target).groups
    chosen = np.random.default_rng(1).integers(len(groups), size=(50, len(groups)))
    found = []
    for row in chosen:
        places = np.concatenate([groups[number] for number in row])
        found.append(analysis.correlation(values[places], target[places]))
    assert equal == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])))


def test_only_what_is_right_survives():
    random = np.random.default_rng(3)
    truth = by_family(random, within=0)
    sample = analysis.Sample(NAMES, truth + 0.1 * by_family(random))
    right = truth + 0.1 * by_family(random)
    worse = truth + 0.5 * by_family(random)
    noise = by_family(random)
    found = {
        name: analysis.held(sample, values, draws=200)
        for name, values in {"right": right, "worse": worse, "noise": noise}.items()
    }
    limit = analysis.bar(sample, [right, worse, noise], draws=200)
    weak = {"baseline": analysis.held(sample, noise, draws=200)}
    assert analysis.candidates(found, weak, limit, len(NAMES)) == ["right", "worse"]
    strong = {"baseline": analysis.held(sample, right, draws=200)}
    assert analysis.candidates(found, strong, limit, len(NAMES)) == []
    undefined = np.where(np.arange(len(NAMES)) < 5, np.nan, right)
    holes = {"right": analysis.held(sample, undefined, draws=200)}
    assert analysis.candidates(holes, weak, limit, len(NAMES)) == []
    assert analysis.survives(sample, right, {"baseline": noise}, 2, draws=200)
    assert not analysis.survives(sample, worse, {"baseline": right}, 2, draws=200)
    assert not analysis.survives(sample, noise, {"baseline": -right}, 1, draws=200)


@pytest.mark.parametrize(
    "shares, expected",
    [
        ((0.5, 0.5, 0.5), 2),  # ahead at the smallest: a step below
        ((0.0, 0.04, 0.5), 4),  # half-way between 8 and 32
        ((0.0, 0.01, 0.03), 6),
        ((0.0, 0.0, 0.02), 8),
    ],
)
def test_the_crossover_is_between_the_batch_sizes(shares, expected):
    keys = [("a", arm, 300) for arm in ("small-batch", "main", "large-batch")]
    found = {key: gaps.Gap(share, 0.0, 0.0) for key, share in zip(keys, shares, strict=True)}
    assert verdict.crossover("a", found) == pytest.approx(expected)
    assert math.isnan(verdict.crossover("b", found))


# ------------------------------------------------------------------------------------- calibration


def test_the_packaged_calibration_is_that_of_the_committed_lines(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["", "--asset", str(tmp_path / "made.json")])
    calibration.main()
    assert (tmp_path / "made.json").read_text() == calibration.TARGET.read_text()


def test_the_finding_says_how_far_the_analysis_has_come():
    def told(candidates, **more):
        table = {"target": verdict.MAIN, "candidates": candidates, "families": 18}
        return calibration.finding({"open": [table], **more})

    assert "Too few families" in calibration.finding({"open": []})
    assert told([]) == "None of ten readings passed the bar set in advance on 18 families."
    assert "JS0 passed the bar" in told(["js0"]) and "not held against" in told(["js0"])
    assert "had not seen, JS0 told" in told(
        ["js0", "scale"], survives={"js0": True, "scale": False}
    )
    assert "No reading told" in told(["js0"], survives={"js0": False})
