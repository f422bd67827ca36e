"""Readings of heterogeneity against scipy, quad, the literature's recipe written out, and closed
forms."""

import numpy as np
import pytest
from problems.planted import blocks, exact, quadrature
from scipy.integrate import quad
from scipy.spatial.distance import jensenshannon
from scipy.special import logsumexp
from scipy.stats import norm, wasserstein_distance

from hessian_tools.heterogeneity.block_heterogeneity import js_heterogeneity
from hessian_tools.heterogeneity.comparison import Comparison
from hessian_tools.heterogeneity.divergence import js_divergences
from hessian_tools.heterogeneity.literature import literature_grid
from hessian_tools.heterogeneity.log_axis import wasserstein_distances
from hessian_tools.heterogeneity.measure import GridSettings
from hessian_tools.heterogeneity.readings import READINGS, pair_readings
from hessian_tools.heterogeneity.verdict import (
    PUBLISHED_JS0,
    Contrast,
    decide,
    published_boundaries,
)
from hessian_tools.spectra.density import Axis, symlog_axis

CASE3 = {"a": exact([1, 2, 3]), "b": exact([99, 100, 101]), "c": exact([1998, 1999, 2000])}
CASE4 = {"a": exact([1, 99, 1998]), "b": exact([2, 100, 1999]), "c": exact([3, 101, 2000])}


def test_js_against_scipy_and_its_bounds():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(300, 0.05), size=12)  # many exact and near zeros
    rows[rows < 1e-12] = 0
    rows[5] = rows[4]
    rows[6], rows[7] = 0, 0
    rows[6, :150], rows[7, 150:] = 1 / 150, 1 / 150
    rows /= rows.sum(axis=1, keepdims=True)
    found = js_divergences(rows)
    expected = np.array([[jensenshannon(p, q) ** 2 for q in rows] for p in rows])
    assert np.allclose(found, expected, atol=1e-14) and np.array_equal(found, found.T)
    assert abs(found[4, 5]) < 1e-16 and found[6, 7] == pytest.approx(np.log(2), abs=1e-15)
    assert found.max() <= np.log(2) + 1e-14 and np.all(np.diag(found) == 0)


@pytest.mark.parametrize("distance", [0.05, 0.3, 1.0, 4.0])
def test_log_reading_of_two_points_is_that_of_two_gaussians(distance):
    """Spectra {1} and {10^d}: N(0, 0.2^2) against N(d, 0.2^2) in decades, by adaptive
    integration."""

    def integrand(t):
        p, q = norm.pdf(t, 0, 0.2), norm.pdf(t, distance, 0.2)
        m = (p + q) / 2
        return sum(x * np.log(x / m) / 2 for x in (p, q) if x > 1e-300)

    expected = quad(
        integrand, -3, distance + 3, points=[0, distance / 2, distance], epsabs=1e-12, limit=500
    )[0]
    js = js_heterogeneity({"a": exact([1.0]), "b": exact([10.0**distance])}, readings=["log"])
    assert js.readings["log"].mean == pytest.approx(expected, abs=1e-9)


def test_wasserstein_against_scipy():
    found = blocks()
    found["padded"] = quadrature([[1.0, 5.0, 5.0]] * 3, np.array([[0.5, 0.5, 0.0]] * 3))
    axis = symlog_axis(found.values())
    pooled = [(axis.position(q.pooled[0]), q.pooled[1]) for q in found.values()]
    expected = [[wasserstein_distance(p, q, u, v) for q, v in pooled] for p, u in pooled]
    matrix = wasserstein_distances(list(found.values()), axis)
    assert np.allclose(matrix, expected, atol=1e-12) and np.all(np.diag(matrix) == 0)
    reading = js_heterogeneity(found).readings["wasserstein"]
    assert np.array_equal(reading.matrix, matrix) and reading.unit == "decades"
    assert reading.mean == pytest.approx(
        np.mean([matrix[i, j] for i in range(5) for j in range(i)])
    )


def test_wasserstein_in_slabs_is_the_same(monkeypatch):
    found = list(blocks().values())
    whole = wasserstein_distances(found, Axis("linear"))
    monkeypatch.setattr("hessian_tools.heterogeneity.log_axis._SLAB", 40)
    assert np.allclose(wasserstein_distances(found, Axis("linear")), whole, rtol=1e-12)


def literature(found, num_points=50_000, variance=1e-5):
    """The recipe written out, in log space, all grid points against all nodes: (bounded matrix,
    dx)."""
    low = min(np.mean([min(row) for row in q.nodes]) for q in found.values()) - 1
    high = max(np.mean([max(row) for row in q.nodes]) for q in found.values()) + 1
    grid = np.linspace(low, high, num_points)
    rows = []
    for q in found.values():
        with np.errstate(divide="ignore"):
            logs = np.log(q.weights / len(q.nodes)).ravel() - (
                grid[:, None] - q.nodes.ravel()
            ) ** 2 / (2 * variance)
        log_density = logsumexp(logs, axis=1)
        row = np.exp(log_density - logsumexp(log_density))
        rows.append(
            np.where(row > 1e-200, row, 0)
        )  # half a denormal number is 0, which makes scipy's divergence inf
    matrix = [[jensenshannon(p, q) ** 2 for q in rows] for p in rows]
    return np.array(matrix), grid[1] - grid[0]


@pytest.mark.parametrize(
    "spread", [0.0, 1.0, 2.5], ids=["fine grid", "dx near the kernel", "underflow"]
)
def test_unnormalised_is_the_literature_s_recipe(spread):
    found = blocks(spread=spread)
    expected, dx = literature(found)
    js = js_heterogeneity(found)
    assert js.spacing == pytest.approx(dx)
    assert np.allclose(js.readings["bounded"].matrix, expected, atol=1e-9)
    assert np.allclose(js.matrix, expected / dx, rtol=1e-6, atol=1e-9 / dx)
    assert (
        js.js0 == pytest.approx(js.readings["bounded"].mean / js.spacing)
        and js.js0 == js.readings["unnormalised"].mean
    )
    assert (spread > 2) == any("underflow" in note for note in js.notes)
    assert (dx > np.sqrt(1e-5)) == any("exceeds its kernel width" in note for note in js.notes)
    if spread > 2:  # the case is what it claims to be: at some block, every term underflows
        grid = literature_grid(list(found.values())).points
        gaps = [np.abs(grid - x).min() for x in found["layer.0"].nodes.ravel()]
        assert min(gaps) > 39 * np.sqrt(1e-5)


def test_identical_and_disjoint_blocks():
    q = exact([0.1, 0.5, 2.0])
    same = js_heterogeneity({"a": q, "b": q, "c": q})
    for reading in same.readings.values():
        assert reading.mean == pytest.approx(0, abs=1e-12) and reading.standard_error == 0
    assert same.scale_spread.value == 0 and same.num_probes == 0
    far = js_heterogeneity({"a": exact([1e-3]), "b": exact([3.0])})
    assert far.readings["bounded"].mean == pytest.approx(np.log(2)) == far.readings["log"].mean
    assert far.js0 == pytest.approx(np.log(2) / (4.999 / 49_999))  # from 1e-3 - 1 to 3 + 1


def test_absolute_width_cannot_tell_case_3_from_case_4_and_the_scale_free_readings_can():
    """Zhang et al. 2024: GD beats Adam on case 4, Adam beats GD on case 3; kappa = 2000."""
    three, four = js_heterogeneity(CASE3), js_heterogeneity(CASE4)
    for js in (three, four):
        assert js.readings["bounded"].mean == pytest.approx(np.log(2), abs=1e-12)
        assert all(reading.standard_error == 0 for reading in js.readings.values())
    for name, digits in (("wasserstein", 0.005), ("log", 0.0006)):
        low, high = READINGS[name].reference_cases
        assert four.readings[name].mean == pytest.approx(low, abs=digits)
        assert three.readings[name].mean == pytest.approx(high, abs=digits)
    plain = [
        np.mean(np.abs(np.log10(a.nodes) - np.log10(b.nodes)))
        for a, b in ((CASE3["a"], CASE3["b"]),)
    ]
    assert three.readings["wasserstein"].matrix[0, 1] == pytest.approx(plain[0], abs=1e-4)
    assert three.scale_spread.value > 1 > 0.01 > four.scale_spread.value


def test_multiplying_the_loss_by_a_thousand():
    """Readings that say that they are scale-free stay, the others move."""
    here, there = js_heterogeneity(blocks()), js_heterogeneity(blocks(factor=1000.0))
    below = js_heterogeneity(blocks(factor=0.001))  # above, "bounded" is at its bound everywhere
    for name, measure in READINGS.items():
        a, b, c = (js.every_reading[name] for js in (here, there, below))
        assert (c.mean == pytest.approx(a.mean, rel=1e-9)) == measure.scale_free
        if measure.scale_free:
            assert b.mean == pytest.approx(a.mean, rel=1e-9)
            assert b.standard_error == pytest.approx(a.standard_error, rel=1e-6)
    for name in ("log", "wasserstein"):
        assert np.allclose(here.readings[name].matrix, there.readings[name].matrix, rtol=1e-8)
    assert there.js0 < here.js0 / 100  # the literature's reading moves by much


def test_scale_spread():
    js = js_heterogeneity(blocks(num_blocks=5), readings=["wasserstein"])
    rms = [
        np.sqrt(np.mean([w @ x**2 for x, w in zip(q.nodes, q.weights, strict=True)]))
        for q in blocks(num_blocks=5).values()
    ]
    assert np.allclose(js.scale_spread.log10_rms, np.log10(rms))
    assert js.scale_spread.value == js.scale_spread.mean == pytest.approx(np.std(np.log10(rms)))


def means(found, **options):
    """The means that the jackknife varies, from a whole new computation."""
    js = js_heterogeneity(found, num_points=5_000, **options)
    return {name: reading.mean for name, reading in js.every_reading.items()}


@pytest.mark.parametrize("readings", [None, ["log"], ["wasserstein"], ["bounded"]])
@pytest.mark.parametrize("probes", [(4, 4, 4, 4), (2, 5, 3, 4)], ids=["equal", "unequal"])
def test_jackknife_leaves_one_probe_of_one_block_out(probes, readings):
    """Strata (Jones 1974), everything computed again, also where the grid and the axis move."""
    found = {f"layer.{b}": list(blocks(k=k).values())[b] for b, k in enumerate(probes)}
    found["exact"] = exact([0.3, 0.7, 1.1])
    js = js_heterogeneity(found, num_points=5_000, readings=readings)
    whole = means(found, readings=readings)
    assert js.num_probes == min(probes)
    variance, bias = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0.0)
    for name, k in zip(found, probes, strict=False):
        q = found[name]
        kept = [[j for j in range(k) if j != i] for i in range(k)]
        replicates = [
            means({**found, name: quadrature(q.nodes[rest], q.weights[rest])}, readings=readings)
            for rest in kept
        ]
        for reading in whole:
            theta = np.array([replicate[reading] for replicate in replicates])
            variance[reading] += (k - 1) / k * np.sum((theta - theta.mean()) ** 2)
            bias[reading] += (k - 1) * (theta.mean() - whole[reading])
    assert list(whole) == [*(readings or pair_readings()), "scale"]
    for name, reading in js.every_reading.items():
        assert reading.standard_error == pytest.approx(np.sqrt(variance[name]), rel=1e-8)
        assert reading.bias == pytest.approx(bias[name], rel=1e-6)
        assert variance[name] > 0


@pytest.mark.parametrize("readings", [list(READINGS), *([name] for name in READINGS)])
def test_replacing_a_block_is_computing_all_again(readings):
    """Also by one that widens or narrows the grid, or is zero; by each reading alone as well."""
    settings = GridSettings(num_points=3_000)
    found = list(blocks().values())
    comparison = Comparison(found, readings, settings)
    wide, narrow = quadrature([[-1e5, 1e5]] * 2), quadrature([[0.1, 0.2]] * 2)
    for index in range(4):
        for block in (
            found[(index + 1) % 4],
            found[index].without_probe(0),
            wide,
            narrow,
            exact([0.0]),
        ):
            changed = [*found[:index], block, *found[index + 1 :]]
            expected = Comparison(changed, readings, settings).means
            assert comparison.replacing(index, block) == pytest.approx(expected, rel=1e-10)


def test_a_log_grid_that_reaches_not_far_enough_is_made_again():
    """On the same axis: all eigenvalues are positive, and then some are not."""
    positive = [exact([1.0]), exact([2.0, 5.0]), exact([10.0])]
    settings = GridSettings()
    changed = [exact([-9.0]), *positive[1:]]
    expected = Comparison(changed, ["log"], settings).means
    assert Comparison(positive, ["log"], settings).replacing(0, changed[0]) == expected


def test_jackknife_error_is_the_spread_over_seeds():
    """Blocks drawn 300 times with unequal numbers of probes: mean SE^2 against the variance of the
    reading."""
    rng, values, squares = np.random.default_rng(0), [], []
    for _ in range(300):
        found = {}
        for b, k in enumerate((3, 6, 10)):
            nodes = np.sort(10.0**b * (1 + 0.2 * rng.standard_normal((k, 5))), axis=1)
            found[str(b)] = quadrature(nodes, rng.dirichlet(np.ones(5), size=k))
        reading = js_heterogeneity(found, readings=["wasserstein"]).readings["wasserstein"]
        values.append(reading.mean)
        squares.append(reading.standard_error**2)
    assert np.mean(squares) == pytest.approx(np.var(values), rel=0.25)


def test_one_probe_knows_no_error():
    js = js_heterogeneity(blocks(k=1), num_points=2_000)
    assert all(np.isnan(reading.standard_error) for reading in js.readings.values())
    assert np.isnan(js.scale_spread.standard_error) and np.isfinite(js.js0)
    assert (
        js.verdict.decision == "undecided"
        and "one probe" in js.verdict.reason
        and "one probe" in js.notes[0]
    )


def test_zero_blocks_are_named_not_hidden():
    found = {
        **blocks(num_blocks=3),
        "dead": quadrature(np.zeros((3, 2)), np.array([[1.0, 0.0]] * 3)),
    }
    js = js_heterogeneity(found, num_points=2_000)
    assert np.isneginf(js.scale_spread.log10_rms[3]) and np.isfinite(js.scale_spread.value)
    assert js.scale_spread.value == pytest.approx(
        js_heterogeneity(blocks(num_blocks=3), num_points=2_000).scale_spread.value
    )
    assert any("dead" in note for note in js.notes) and all(
        np.isfinite(r.mean) for r in js.readings.values()
    )
    assert "dead" in js.verdict.reason and "the latter is exactly zero" in js.verdict.reason
    nothing = js_heterogeneity({"a": exact([0.0]), "b": exact([0.0])})
    assert (
        nothing.js0 == pytest.approx(0, abs=1e-15)
        and np.isnan(nothing.scale_spread.value)
        and "both" in nothing.verdict.reason
    )


def test_only_the_readings_asked_for():
    js = js_heterogeneity(CASE3, readings=["wasserstein", "log"])
    assert list(js.readings) == ["wasserstein", "log"]
    assert js.verdict.decision == "undecided" and "not computed" in js.verdict.reason


def test_eigenvalues_below_a_millionth_of_the_largest_count_as_zero():
    """The axis' linear part ends at 1e-6 of the largest |node|, ten times float32's rounding."""
    small = 1e-5
    js = js_heterogeneity({"a": exact([-2.0]), "b": exact([2 * small])}, readings=["wasserstein"])
    assert js.linthresh == 2e-6 and js.settings["linear_fraction"] == 1e-6
    expected = (np.arcsinh(0.5e6) + np.arcsinh(0.5e6 * small)) / np.log(10)
    assert js.readings["wasserstein"].mean == pytest.approx(expected, rel=1e-12)


def test_costs_and_names():
    found = blocks()
    js = js_heterogeneity(found, num_points=2_000)
    assert js.names == tuple(found) and js.num_matvecs == sum(q.num_matvecs for q in found.values())
    assert (
        js.settings["num_points"] == 2_000 and js.linthresh == symlog_axis(found.values()).linthresh
    )


@pytest.mark.parametrize(
    ("spectra", "options", "message"),
    [
        ({"a": exact([1.0])}, {}, "holds 1 block"),
        (CASE3, {"readings": ["js"]}, "readings is"),
        (CASE3, {"readings": []}, "readings is"),
        (CASE3, {"variance": 0.0}, "variance is 0"),
        (CASE3, {"log_width": float("nan")}, "log_width is nan"),
    ],
)
def test_bad_arguments(spectra, options, message):
    with pytest.raises(ValueError, match=message):
        js_heterogeneity(spectra, **options)


# ---- verdict


PAIR = Contrast("head", "wq", 120.0, 0.4)


def test_boundaries_come_from_the_published_table():
    """A third and two thirds of the way from 0.10 to 34.90 on a logarithmic scale."""
    started = {row.model: row.js0 for row in PUBLISHED_JS0 if row.at_initialisation}
    assert (
        max(started["VGG16"], started["ResNet18"]),
        min(v for v in started.values() if v > 1),
    ) == (0.10, 34.90)
    lower, upper = published_boundaries()
    assert (lower, upper) == (
        pytest.approx(np.exp((2 * np.log(0.1) + np.log(34.9)) / 3)),
        pytest.approx(4.95, abs=0.01),
    )
    for row in PUBLISHED_JS0:
        assert decide(row.js0, 0.0, PAIR, {}).decision == (
            "Adam" if row.transformer_like else "SGD"
        )


@pytest.mark.parametrize(
    ("js0", "error", "decision"),
    [(0.5, 0.09, "SGD"), (0.5, 0.11, "undecided"), (6.0, 0.5, "Adam"), (6.0, 0.55, "undecided"),
     (2.0, 0.0, "undecided"), (0.1, float("nan"), "undecided"), (float("nan"), float("nan"), "undecided")],
)  # fmt: skip
def test_decision_needs_the_whole_interval(js0, error, decision):
    assert decide(js0, error, PAIR, {}).decision == decision


def test_words():
    verdict = decide(20.9, 1.2, PAIR, {"wasserstein": 1.05, "log": 0.6})
    assert verdict.reason.startswith("JS0 is 20.9, above 4.96") and "head and wq" in verdict.reason
    assert "factor of 120" in verdict.reason and "0.4 decades" in verdict.reason
    assert "1.2" in verdict.uncertainty and "18.5 to 23.3" in verdict.uncertainty
    assert "without any published calibration" in verdict.scale_free
    assert "2402.16788" in verdict.calibration and "own evidence" in verdict.calibration
    assert str(verdict).startswith("Adam. JS0 is 20.9") and str(verdict).endswith(
        verdict.calibration
    )


def test_contradicting_readings_leave_it_undecided():
    verdict = decide(20.9, 1.2, PAIR, {"wasserstein": 0.05, "log": 0.6})
    assert verdict.decision == "undecided"
    assert "would say Adam; contradicted by wasserstein, it decides nothing" in verdict.reason
    assert decide(0.1, 0.0, PAIR, {"log": 0.6}).decision == "undecided"
    assert decide(0.1, 0.0, PAIR, {"log": 0.1, "wasserstein": 0.5}).decision == "SGD"


def test_bias_widens_the_interval():
    assert decide(5.5, 0.0, PAIR, {}, bias=0.0).decision == "Adam"
    assert decide(5.5, 0.0, PAIR, {}, bias=1.0).decision == "undecided"
    assert "4.5 to 5.5" in decide(5.5, 0.0, PAIR, {}, bias=1.0).uncertainty
    assert decide(0.6, 0.0, PAIR, {}, bias=-0.2).decision == "undecided"


def test_contrast_names_scale_and_shape():
    """Same shape and 1000 times the scale; a third block in between."""
    base = np.array([1.0, 2.0, 10.0, -4.0])
    js = js_heterogeneity(
        {"small": exact(base), "mid": exact(30 * base), "large": exact(1000 * base)}
    )
    assert "large and small" in js.verdict.reason and "factor of 1e+03" in js.verdict.reason
    assert float(js.verdict.reason.split("own scale) by ")[1].split()[0]) < 1e-12
    other = js_heterogeneity(
        {"flat": exact([1.0, 1.0, 1.0, 1.0]), "peaked": exact([2.0, 1e-3, 1e-3, 1e-3])}
    )
    assert "flat and peaked" in other.verdict.reason or "peaked and flat" in other.verdict.reason
    shape = np.mean(np.abs(np.sort(np.log10([1e-3, 1e-3, 1e-3, 2.0]))))  # both have rms 1
    assert f"by {shape:.2g} decades" in other.verdict.reason
