"""Readings of heterogeneity against scipy, quad, the literature's recipe written out, and closed
forms."""

import dataclasses

import numpy as np
import pytest
from problems.planted import blocks, exact, quadrature
from scipy.integrate import quad
from scipy.spatial.distance import jensenshannon
from scipy.special import logsumexp
from scipy.stats import norm, wasserstein_distance

from hessian_tools.heterogeneity.block_heterogeneity import js_heterogeneity
from hessian_tools.heterogeneity.calibration import Calibration, TrainedPair
from hessian_tools.heterogeneity.comparison import Comparison
from hessian_tools.heterogeneity.divergence import js_divergences
from hessian_tools.heterogeneity.literature import literature_grid
from hessian_tools.heterogeneity.measure import GridSettings, Workspace
from hessian_tools.heterogeneity.readings import READINGS, pair_readings
from hessian_tools.heterogeneity.verdict import Contrast, Evidence, decide
from hessian_tools.spectra.density import symlog_axis

LITERATURE = ["bounded", "unnormalised"]

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


def as_exact(found):
    """The pooled nodes and weights as if they were all there is."""
    pooled = {name: map(np.atleast_2d, block.pooled) for name, block in found.items()}
    return {name: quadrature(*parts, status="exact") for name, parts in pooled.items()}


def test_wasserstein_against_scipy():
    found = blocks()
    found["padded"] = quadrature([[1.0, 5.0, 5.0]] * 3, np.array([[0.5, 0.5, 0.0]] * 3))
    found = as_exact(found)
    axis = symlog_axis(found.values())
    pooled = [(axis.position(q.pooled[0]), q.pooled[1]) for q in found.values()]
    expected = [[wasserstein_distance(p, q, u, v) for q, v in pooled] for p, u in pooled]
    reading = js_heterogeneity(found, readings=["wasserstein"]).readings["wasserstein"]
    assert np.allclose(reading.matrix, expected, atol=1e-12) and reading.unit == "decades"
    assert np.all(np.diag(reading.matrix) == 0)
    pairs = [reading.matrix[i, j] for i in range(5) for j in range(i)]
    assert reading.mean == pytest.approx(np.mean(pairs))
    assert reading.low == reading.mean == reading.high


def test_curvature_against_scipy():
    """Weights times squared eigenvalues at log10 of their sizes, whatever their signs."""
    found = as_exact(blocks())
    masses = [(np.log10(np.abs(x)), w * x**2) for x, w in (q.pooled for q in found.values())]
    expected = [[wasserstein_distance(p, q, u, v) for q, v in masses] for p, u in masses]
    reading = js_heterogeneity(found).readings["curvature"]
    assert np.allclose(reading.matrix, expected, atol=1e-12)
    negative = {"plus": exact([1.0, 5.0]), "minus": exact([-5.0, -1.0]), "both": exact([-1.0, 5.0])}
    assert js_heterogeneity(negative).readings["curvature"].mean == 0


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
    js = js_heterogeneity(found, readings=LITERATURE)
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
    same = js_heterogeneity({"a": q, "b": q, "c": q}, readings=pair_readings())
    for reading in same.readings.values():
        assert reading.mean == pytest.approx(0, abs=1e-12) and reading.standard_error == 0
    assert same.scale_spread.value == 0 and same.num_probes == 0
    far = js_heterogeneity({"a": exact([1e-3]), "b": exact([3.0])}, readings=pair_readings())
    assert far.readings["bounded"].mean == pytest.approx(np.log(2)) == far.readings["log"].mean
    assert far.js0 == pytest.approx(np.log(2) / (4.999 / 49_999))  # from 1e-3 - 1 to 3 + 1


def test_absolute_width_cannot_tell_case_3_from_case_4_and_the_scale_free_readings_can():
    """Zhang et al. 2024: GD beats Adam on case 4, Adam beats GD on case 3; kappa = 2000."""
    three, four = (js_heterogeneity(case, readings=pair_readings()) for case in (CASE3, CASE4))
    for js in (three, four):
        assert js.readings["bounded"].mean == pytest.approx(np.log(2), abs=1e-12)
        assert all(reading.standard_error == 0 for reading in js.readings.values())
    stated = {"wasserstein": (0.11, 2.03, 0.005), "log": (0.081, 0.693, 0.0006)}
    for name, (low, high, digits) in stated.items():
        assert four.readings[name].mean == pytest.approx(low, abs=digits)
        assert three.readings[name].mean == pytest.approx(high, abs=digits)
    plain = np.mean(np.abs(np.log10(CASE3["a"].nodes) - np.log10(CASE3["b"].nodes)))
    assert three.readings["wasserstein"].matrix[0, 1] == pytest.approx(plain, abs=1e-4)
    assert three.scale_spread.value > 1 > 0.01 > four.scale_spread.value
    assert three.readings["curvature"].mean > 1 > 0.01 > four.readings["curvature"].mean


def test_multiplying_the_loss_by_a_thousand():
    """Readings that say that they are scale-free stay, the others move; the verdict stays."""
    here, there, below = (
        js_heterogeneity(blocks(factor=factor), readings=pair_readings())
        for factor in (1.0, 1000.0, 0.001)  # above, "bounded" is at its bound everywhere
    )
    for name, measure in READINGS.items():
        a, b, c = (js.every_reading[name] for js in (here, there, below))
        assert (c.mean == pytest.approx(a.mean, rel=1e-9)) == measure.scale_free
        if measure.scale_free:
            assert b.mean == pytest.approx(a.mean, rel=1e-9)
            assert b.standard_error == pytest.approx(a.standard_error, rel=1e-6)
            assert b.low == pytest.approx(a.low, rel=1e-6, nan_ok=True)
    for name in ("log", "wasserstein", "curvature"):
        assert np.allclose(here.readings[name].matrix, there.readings[name].matrix, rtol=1e-8)
    assert there.js0 < here.js0 / 100  # the literature's reading moves by much
    assert here.verdict.decision == there.verdict.decision == below.verdict.decision
    assert here.verdict.uncertainty == there.verdict.uncertainty == below.verdict.uncertainty


def test_scale_spread():
    found = blocks(num_blocks=5)
    js = js_heterogeneity(found)
    rms = [
        np.sqrt(np.mean([w @ x**2 for x, w in zip(q.nodes, q.weights, strict=True)]))
        for q in found.values()
    ]
    assert np.allclose(js.scale_spread.log10_rms, np.log10(rms))
    sure = js_heterogeneity(as_exact(found)).scale_spread
    assert sure.value == sure.low == sure.high == pytest.approx(np.std(np.log10(rms)))
    assert js.scale_spread.low < sure.value < js.scale_spread.high
    assert js.scale_spread.value == js.scale_spread.mean != sure.value


def means(found, **options):
    """The means that the jackknife varies, from a whole new computation."""
    js = js_heterogeneity(found, num_points=5_000, **options)
    return {name: reading.mean for name, reading in js.readings.items()}


@pytest.mark.parametrize("readings", [LITERATURE, ["bounded"]])
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
    assert list(whole) == readings
    for name, reading in js.readings.items():
        assert reading.standard_error == pytest.approx(np.sqrt(variance[name]), rel=1e-8)
        assert reading.bias == pytest.approx(bias[name], rel=1e-6)
        assert variance[name] > 0


def comparison_of(found, settings, readings=LITERATURE):
    return Comparison(Workspace(found, settings), {name: READINGS[name] for name in readings})


@pytest.mark.parametrize("readings", [LITERATURE, *([name] for name in LITERATURE)])
def test_replacing_a_block_is_computing_all_again(readings):
    """Also by one that widens or narrows the grid, or is zero; by each reading alone as well."""
    settings = GridSettings(num_points=3_000)
    found = list(blocks().values())
    comparison = comparison_of(found, settings, readings)
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
            expected = comparison_of(changed, settings, readings).means
            assert comparison.replacing(index, block) == pytest.approx(expected, rel=1e-10)


def test_one_probe_has_an_error_too():
    """The law of the probes gives it; the jackknife, of the literature's readings, does not."""
    js = js_heterogeneity(blocks(k=1), num_points=2_000, readings=["bounded", "curvature"])
    assert np.isnan(js.readings["bounded"].standard_error)
    assert js.readings["curvature"].standard_error > 0 and js.scale_spread.standard_error > 0


def test_one_probe_of_one_step_tells_nothing():
    found = {name: quadrature([[level]]) for name, level in (("a", 1.0), ("b", 5.0))}
    js = js_heterogeneity(found)
    assert js.told("scale") == js.told("curvature") == "not resolved at 1 x 1"
    assert js.verdict.decision == "undecided"


def zero(k=3):
    """What SLQ leaves of a zero block."""
    return quadrature(np.zeros((k, 2)), np.array([[1.0, 0.0]] * k))


def test_zero_blocks_are_named_not_hidden():
    found = {**blocks(num_blocks=3), "dead": zero()}
    js = js_heterogeneity(found, num_points=2_000, readings=pair_readings())
    alive = js_heterogeneity(blocks(num_blocks=3))
    assert np.isneginf(js.scale_spread.log10_rms[3])
    assert js.scale_spread.value == pytest.approx(alive.scale_spread.value)
    assert js.readings["curvature"].mean == pytest.approx(alive.readings["curvature"].mean)
    assert np.isnan(js.readings["curvature"].matrix[3]).all()
    assert any("dead" in note for note in js.notes)
    assert all(np.isfinite(reading.mean) for reading in js.readings.values())
    assert js.verdict.decision == alive.verdict.decision


def test_a_block_of_rounding_is_a_zero_block():
    """A key's bias under softmax has a Hessian of 1e-10 in float32, where it is exactly zero."""
    found = {**blocks(num_blocks=3), "bias": quadrature(1e-10 * blocks(1)["layer.0"].nodes)}
    js = js_heterogeneity(found)
    assert js.scale_spread.value < 1.1 and any("bias" in note for note in js.notes)


@pytest.mark.parametrize(
    "dead", [{"a": exact([0.0]), "b": exact([0.0])}, {"a": zero(), "b": zero()}]
)
def test_nothing_to_compare(dead):
    for found in (dead, {**dead, "alive": exact([1.0, 2.0])}):
        js = js_heterogeneity(found, readings=pair_readings())
        assert js.verdict.decision == "nothing to compare"
        assert np.isnan(js.scale_spread.value) and np.isnan(js.readings["curvature"].mean)
        assert js.told("scale") == js.told("curvature") == "nothing to compare"
    assert js_heterogeneity(dead, readings=["unnormalised"]).js0 == pytest.approx(0, abs=1e-15)


def test_only_the_readings_asked_for():
    js = js_heterogeneity(CASE3, readings=["wasserstein", "log"])
    assert list(js.readings) == ["wasserstein", "log"]
    assert list(js_heterogeneity(CASE3).readings) == ["curvature"]
    assert np.isnan(js.spacing)


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


def evidence(scale, curvature):
    return {"scale": Evidence(*scale), "curvature": Evidence(*curvature)}


HIGH = (1.5, 1.4, 1.6)
NAN = float("nan")


@pytest.mark.parametrize(
    ("scale", "curvature", "decision"),
    [
        (HIGH, HIGH, "undecided"),
        ((0.3, 0.2, 0.4), (0.3, 0.2, 0.4), "undecided"),
        ((0.01, -0.1, 0.1), (0.0, -0.2, 0.2), "no heterogeneity found"),
        ((0.01, 0.0, 0.1), (0.2, 0.1, 0.3), "undecided"),
        (HIGH, (1.5, NAN, NAN), "undecided"),
        ((0.0, -0.1, 0.1), (0.0, NAN, NAN), "undecided"),
    ],
)
def test_the_decision_is_about_both_intervals(scale, curvature, decision):
    assert decide(evidence(scale, curvature), PAIR).decision == decision


def test_words():
    verdict = decide(evidence(HIGH, HIGH), PAIR, literature=(20.9, 13.1))
    assert "head and wq" in verdict.scale_free and "factor of 120" in verdict.scale_free
    assert "0.4 decades" in verdict.scale_free and "JS0 is 20.9" in verdict.scale_free
    assert "13.1" in verdict.scale_free and "decides nothing" in verdict.scale_free
    assert "scale 1.5 decades (1.4 to 1.6)" in verdict.uncertainty
    assert str(verdict).startswith("undecided. A race") and str(verdict).endswith(
        verdict.calibration
    )
    assert "JS0" not in str(decide(evidence(HIGH, HIGH), PAIR))
    unresolved = decide(evidence(HIGH, (1.0, NAN, NAN)), PAIR)
    assert "Not resolved at these probes and steps: curvature" in unresolved.reason


def test_the_verdict_tells_what_was_lost_on_networks_that_were_trained():
    pairs = [
        TrainedPair(f"family/{number}", scale, 1.0, gap)
        for number, (scale, gap) in enumerate(
            [(0.1, 0.1), (1.5, 0.3), (1.4, -0.004), (1.6, 0.02), (1.0, -0.2), (3.0, 0.5)]
        )
    ]
    known = Calibration(tuple(pairs), 32, 1000, 0.02, "Nothing told which.")
    verdict = decide(evidence(HIGH, (1.0, 0.9, 1.1)), PAIR, calibration=known)
    words = " ".join(verdict.calibration.split())
    assert "Of 6 small networks" in words and "batches of 32, 1,000 steps" in words
    assert "Adam ended ahead of SGD with momentum on 4, behind on 1, and on 1 within 2%" in words
    assert "6% in the middle, -10% to 40% for 8 in 10. Nothing told which." in words
    assert words.endswith("there: family/1 30%, family/2 0%, family/3 2%, family/4 -20%.")
    unresolved = decide(evidence(HIGH, (1.0, NAN, NAN)), PAIR, calibration=known)
    assert "Nearest" not in unresolved.calibration and "Of 6" in unresolved.calibration


def test_the_packaged_calibration_is_read():
    found = Calibration.packaged()
    assert found.pairs and found.tie == 0.02 and found.finding.endswith(".")
    assert all(np.isfinite([pair.scale, pair.curvature, pair.gap]).all() for pair in found.pairs)


def test_contrast_names_scale_and_shape():
    """Same shape and 1000 times the scale; a third block in between."""
    base = np.array([1.0, 2.0, 10.0, -4.0])
    js = js_heterogeneity(
        {"small": exact(base), "mid": exact(30 * base), "large": exact(1000 * base)}
    )
    told = js.verdict.scale_free
    assert "large and small" in told and "factor of 1e+03" in told
    assert float(told.split("own scale) by ")[1].split()[0]) < 1e-12
    other = js_heterogeneity(
        {"flat": exact([1.0, 1.0, 1.0, 1.0]), "peaked": exact([2.0, 1e-9, 1e-9, 1e-9])}
    )
    told = other.verdict.scale_free
    assert "flat and peaked" in told or "peaked and flat" in told
    assert f"by {np.log10(2):.2g} decades" in told  # both have rms 1, one all of it at 2


def test_spectra_without_residual_bounds_are_compared():
    """Those of other libraries; of one step not even the scale is known then."""
    for steps, told in ((3, "("), (1, "not resolved at 1 x 1")):
        drawn = blocks(2, k=1, m=steps)
        unknown = np.full((1, steps), np.nan)
        found = {name: dataclasses.replace(q, residuals=unknown) for name, q in drawn.items()}
        assert told in js_heterogeneity(found).told("scale")
