"""What remains uncertain about a reading, and which blocks grow for it, against written-out
rules."""

import dataclasses

import numpy as np
import pytest
from problems.planted import blocks as spectra
from problems.planted import quadrature
from scipy.stats import norm
from scipy.stats import t as student

from hessian_tools.heterogeneity.allocation import Limits, next_growth
from hessian_tools.heterogeneity.comparison import Comparison
from hessian_tools.heterogeneity.measure import GridSettings, Workspace
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.heterogeneity.uncertainty import Shares, Uncertainty, shares_of
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.growing import Growth
from hessian_tools.spectra.quadrature import Quadrature

ZEROS = np.zeros(3)
FOURS = np.array([4, 4, 4])
TENS = np.array([10, 10, 10])
FREE = Limits(max_matvecs=10_000, max_steps=100, exact=False)


def block(k, m, size=100_000, **changes):
    """k probes of m steps; what their nodes are does not matter here."""
    steps = np.full(k, m)
    numbers = np.zeros((k, m))
    fields = (numbers, numbers, numbers, steps, size, k * m, "complete", "rademacher", "full")
    return dataclasses.replace(Quadrature(*fields), **changes)


def three(probes=FOURS, steps=TENS, size=100_000):
    return {name: block(k, m, size) for name, k, m in zip("abc", probes, steps, strict=True)}


def shares_from(probes, variances, biases, steps, together):
    """With the degrees of freedom of the jackknife."""
    return Shares(variances, np.maximum(probes - 1.0, 0.5), biases, steps, together)


# ---- uncertainty


def test_the_total_is_the_sum_of_three_parts():
    """Probes and steps in squares."""
    error = np.hypot(0.02, 0.005)
    assert Uncertainty(0.01, 2.0, -0.3, 0.005).total == pytest.approx(error + 0.09)


def test_changes_of_steps_that_cancel_are_no_convergence():
    changes = np.array([0.3, -0.3, 0.1])
    assert shares_from(FOURS, ZEROS, ZEROS, changes, 0.0).uncertainty.steps == pytest.approx(
        0.19**0.5
    )
    assert shares_from(FOURS, ZEROS, ZEROS, changes, -0.6).uncertainty.steps == pytest.approx(0.6)


def test_standard_error_and_bias_add_up_over_blocks():
    variances, biases = np.array([4e-4, 5e-4, 0.0]), np.array([0.2, -0.05, 0.0])
    found = shares_from(FOURS, variances, biases, ZEROS, 0.0).uncertainty
    assert (found.standard_error, found.bias) == (pytest.approx(0.03), pytest.approx(0.15))


def test_doubt_has_satterthwaite_s_degrees_of_freedom():
    """Twice of them, as the tails are light (docs/evidence/coverage.md)."""
    probes, variances = np.array([3, 9]), np.array([2e-4, 5e-4])
    freedom = 7e-4**2 / (2e-4**2 / 2 + 5e-4**2 / 8)
    found = shares_from(probes, variances, np.zeros(2), np.zeros(2), 0.0).uncertainty
    assert found.doubt == pytest.approx(student.ppf(0.975, 2 * freedom) / norm.ppf(0.975))
    assert shares_from(FOURS, ZEROS, ZEROS, ZEROS, 0.0).uncertainty.doubt == 1


def comparison(found):
    settings = GridSettings()
    return Comparison(Workspace(found, settings), {"unnormalised": READINGS["unnormalised"]})


def test_shares_are_fractions_of_the_mean_and_compare_with_a_third_fewer_steps():
    found = list(spectra(k=3, m=9, spread=0.3).values())
    shares, means = shares_of(found, ["unnormalised"])
    share, mean = shares["unnormalised"], means["unnormalised"]
    fewer = [truncated(q, 6) for q in found]
    halves = [truncated(q, 5) for q in found]
    together = [comparison(less).means["unnormalised"] - mean for less in (fewer, halves)]
    assert share.together == pytest.approx(max(map(abs, together)) / mean)
    for index in range(len(found)):
        alone = [fewer[i] if i == index else q for i, q in enumerate(found)]
        change = comparison(alone).means["unnormalised"] - mean
        assert share.steps[index] == pytest.approx(change / mean, rel=1e-6)
        replicates = [
            comparison(
                [q.without_probe(probe) if i == index else q for i, q in enumerate(found)]
            ).means["unnormalised"]
            for probe in range(3)
        ]
        variance = 2 / 3 * np.sum((replicates - np.mean(replicates)) ** 2) / mean**2
        assert share.variances[index] == pytest.approx(variance, rel=1e-6)
        assert share.biases[index] == pytest.approx(2 * (np.mean(replicates) - mean) / mean)


@pytest.mark.parametrize("reading", ["curvature", "wasserstein", "log"])
def test_the_effect_of_one_block_is_the_derivative(reading):
    """Weights tilted a little in one block, against the reading computed again."""
    drawn = spectra(k=3, m=9, spread=0.3).values()
    pooled = [map(np.atleast_2d, block.pooled) for block in drawn]
    found = [quadrature(*parts, status="exact") for parts in pooled]
    settings = GridSettings()
    whole = Workspace(found, settings)
    sample = READINGS[reading].sample(whole)
    for index, block in enumerate(found):
        tilted = block.weights * (1 + 1e-6 * np.cos(np.arange(block.weights.size)))
        tilted = dataclasses.replace(block, weights=tilted / tilted.sum())
        changed = [tilted if i == index else q for i, q in enumerate(found)]
        again = READINGS[reading].sample(Workspace(changed, settings, whole.axis)).mean
        change = sample.effect(index, tilted)
        assert abs(change) > 1e-10
        assert again - sample.mean == pytest.approx(change, rel=1e-3)


# ---- allocation


def test_neyman_s_allocation():
    """With steps and bias settled, probes go as sqrt(V / m) and meet the tolerance."""
    variances, done = np.array([4e-3, 1e-3, 0.0]), np.array([10, 40, 10])
    shares = shares_from(FOURS, variances, ZEROS, ZEROS, 0.0)
    growths = next_growth(three(steps=done), {"log": shares}, 0.06, FREE)
    total = np.sqrt(variances * FOURS) @ np.sqrt(done)
    doubt = shares.uncertainty.doubt
    wanted = np.ceil(np.sqrt(variances * FOURS / done) * total * (doubt / 0.06) ** 2)
    limited = np.minimum(np.maximum(wanted, 4), 8)
    expected = {n: Growth(k, m) for n, k, m in zip("abc", limited, done, strict=True) if k > 4}
    assert growths == expected != {}
    reached = np.sum(variances * FOURS / np.maximum(wanted, FOURS))
    assert reached <= (0.06 / doubt) ** 2


def test_what_meets_the_tolerance_does_not_grow():
    shares = shares_from(FOURS, np.array([1e-4, 0, 0]), ZEROS, ZEROS, 0.0)
    assert next_growth(three(), {"log": shares}, 0.1, FREE) == {}


def test_steps_go_first_to_the_blocks_that_change_the_mean_most():
    """Half as many again, until the rest adds less than 0.3 of the tolerance; no probes."""
    shares = shares_from(FOURS, np.array([0.0, 0.0, 1.0]), ZEROS, np.array([0.2, -0.1, 0.01]), 0.11)
    growths = next_growth(three(), {"log": shares}, 0.1, FREE)
    assert growths == {"a": Growth(4, 15), "b": Growth(4, 15)}
    limits = dataclasses.replace(FREE, max_steps=12)
    assert next_growth(three(), {"log": shares}, 0.1, limits)["a"] == Growth(4, 12)


def test_blocks_that_change_the_mean_only_together_grow():
    shares = shares_from(FOURS, ZEROS, ZEROS, np.array([0.01, 0.004, 0.001]), 0.2)
    assert next_growth(three(), {"log": shares}, 0.1, FREE) == {"a": Growth(4, 15)}


@pytest.mark.parametrize(("change", "grows"), [(0.031, True), (0.029, False)])
def test_three_tenths_of_the_tolerance_are_left_alone(change, grows):
    shares = shares_from(FOURS, ZEROS, ZEROS, np.array([0.2, change, 0.0]), 0.0)
    assert ("b" in next_growth(three(), {"log": shares}, 0.1, FREE)) == grows


@pytest.mark.parametrize(("change", "growth"), [(0.061, Growth(4, 15)), (0.059, Growth(8, 10))])
def test_steps_are_worked_on_above_six_tenths_of_the_tolerance(change, growth):
    """Below, the standard error is."""
    shares = shares_from(FOURS, np.array([1.0, 0, 0]), ZEROS, np.array([change, 0, 0]), 0.0)
    assert next_growth(three(), {"log": shares}, 0.1, FREE) == {"a": growth}


@pytest.mark.parametrize(("bias", "probes"), [(0.159, 8), (0.157, 4)])
def test_bias_is_worked_on_above_a_quarter_of_the_tolerance(bias, probes):
    """Its square: 0.158^2 is 0.025. The change over the last steps, at the limit, misses the
    rest."""
    shares = shares_from(FOURS, ZEROS, np.array([bias, 0, 0]), np.array([0.2, 0, 0]), 0.0)
    limits = dataclasses.replace(FREE, max_steps=10)
    growths = next_growth(three(), {"log": shares}, 0.1, limits)
    assert growths == ({"a": Growth(probes, 10)} if probes > 4 else {})


@pytest.mark.parametrize(
    ("steps", "bias", "max_steps", "room"),
    [
        (0.02, 0.1, 100, np.sqrt(0.09**2 - 0.02**2)),
        (0.2, 0.1, 10, 0.09),  # steps that no block can add are not held against the probes
        (0.02, 0.25, 100, 0.05),  # half the tolerance is the least
    ],
)
def test_probes_are_for_what_steps_and_bias_leave_of_the_tolerance(steps, bias, max_steps, room):
    forties = 4 * TENS
    doubt = shares_from(forties, np.array([1.0, 0, 0]), ZEROS, ZEROS, 0.0).uncertainty.doubt
    error = 1.2 * room / doubt  # 1.44 times the probes are needed, 58
    shares = shares_from(
        forties, np.array([error**2, 0, 0]), np.array([0, bias, 0]), np.array([steps, 0, 0]), 0.0
    )
    limits = dataclasses.replace(FREE, max_steps=max_steps)
    growths = next_growth(three(forties), {"log": shares}, 0.1, limits)
    assert growths["a"] == Growth(58, 10)


def test_blocks_that_can_have_no_more_steps_get_probes():
    """At the limit, or where all probes have met invariant subspaces; steps then leave no more
    room."""
    shares = shares_from(FOURS, np.array([1e-2, 0.0, 0.0]), ZEROS, np.array([0.2, 0.0, 0.0]), 0.2)
    at_limit = dataclasses.replace(FREE, max_steps=10)
    ended = three() | {"a": block(4, 10, steps=np.full(4, 7), status="breakdown")}
    for blocks, limits in ((three(), at_limit), (ended, FREE)):
        assert next_growth(blocks, {"log": shares}, 0.1, limits) == {"a": Growth(7, 10)}


def test_the_largest_biases_are_halved_by_twice_the_probes():
    shares = shares_from(FOURS, ZEROS, np.array([0.4, 0.2, 0.05]), ZEROS, 0.0)
    growths = next_growth(three(), {"log": shares}, 0.1, FREE)
    assert growths == {"a": Growth(8, 10), "b": Growth(8, 10)}


def test_two_readings_grow_what_either_needs():
    steps = shares_from(FOURS, ZEROS, ZEROS, np.array([0.2, 0.0, 0.0]), 0.0)
    probes = shares_from(FOURS, np.array([0.0, 1.0, 0.0]), ZEROS, ZEROS, 0.0)
    growths = next_growth(three(), {"log": steps, "scale": probes}, 0.1, FREE)
    assert growths == {"a": Growth(4, 15), "b": Growth(8, 10)}


@pytest.mark.parametrize(
    ("size", "exact", "growth"),
    [(40, True, Growth(exact=True)), (41, True, Growth(8, 10)), (40, False, Growth(8, 10))],
)
def test_a_block_is_exact_where_that_costs_no_more_products(size, exact, growth):
    """Four more probes of ten steps, against one product a row."""
    shares = shares_from(FOURS, ZEROS, np.array([0.4, 0.0, 0.0]), ZEROS, 0.0)
    limits = dataclasses.replace(FREE, exact=exact)
    assert next_growth(three(size=size), {"log": shares}, 0.1, limits) == {"a": growth}


def test_a_block_that_would_exceed_its_products_is_exact_or_stays():
    shares = shares_from(FOURS, ZEROS, np.array([0.4, 0.0, 0.0]), ZEROS, 0.0)
    for exact, growths in ((True, {"a": Growth(exact=True)}), (False, {})):
        limits = Limits(max_matvecs=49, max_steps=100, exact=exact)
        assert next_growth(three(size=45), {"log": shares}, 0.1, limits) == growths
    limits = Limits(max_matvecs=65, max_steps=100, exact=False)
    assert next_growth(three(), {"log": shares}, 0.1, limits) == {"a": Growth(6, 10)}
