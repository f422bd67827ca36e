"""Theorems never violated, violations that are seen, limit cycles."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hessian_tools import quadratic
from hessian_tools.quadratic import practice


def many_problems(count: int, seed: int) -> quadratic.Quadratic:
    return quadratic.random_problems(
        count,
        block_sizes=(2, 3, 1),
        scale_decades=3,
        inner_decades=3,
        seed=seed,
    )


def test_the_gd_bound_holds_on_thousands_of_draws_and_the_slides_form_where_it_does():
    thesis, slides, broken = quadratic.check_gd_bound(many_problems(60, 1), num_steps=20)
    assert thesis.steps > 45_000
    assert thesis.violations == 0
    assert thesis.margin == pytest.approx(0, abs=1e-12)  # 2 / (mu + L) meets it exactly
    assert slides.steps > 30_000
    assert slides.violations == 0
    assert slides.margin > 0
    assert broken.violations == broken.steps == 60 * 20


def test_the_adam_bounds_hold_on_every_step_of_thousands_of_runs():
    checks = quadratic.check_adam_bound(many_problems(200, 2), num_starts=20, num_steps=60)
    for check in checks:
        assert check.violations == 0
        assert check.steps == 200 * 20 * 60
    assert checks[0].margin > checks[2].margin > 0  # each form is sharper than the last


def test_an_adam_bound_that_is_false_is_seen_violated():
    """A problem that claims better conditioned blocks than it has: its bounds promise too much."""
    q = quadratic.case(4)
    means = [e.mean(1, keepdim=True) for e in q.eigenvalues]
    flattering = replace(q, eigenvalues=tuple(e.expand(-1, 3).contiguous() for e in means))
    for check in quadratic.check_adam_bound(flattering, num_starts=20, num_steps=200):
        assert check.violations > 100, check
        assert check.margin < -1e-5, check


def test_a_gd_bound_for_a_smaller_kappa_is_only_looser():
    q = quadratic.case(4)
    hidden = replace(q, eigenvalues=tuple(e.clamp(max=100) for e in q.eigenvalues))
    thesis = quadratic.check_gd_bound(hidden, num_steps=5, relative_steps=[0.04])[0]
    assert thesis.violations == 0


def test_a_check_counts_what_was_judged():
    margins = torch.tensor([0.5, -1e-3, float("nan"), -1e-14])
    check = practice._check("x", margins)
    assert (check.steps, check.violations) == (3, 1)
    assert check.margin == pytest.approx(-1e-3)


def test_adam_with_memory_ends_in_a_cycle_of_period_two_and_half_a_step():
    """Once v has forgotten, |step| = eta in every coordinate: w_i alternates in sign at eta / 2."""
    cycle = quadratic.limit_cycle(
        quadratic.case(3),
        beta2=0.9,
        steps=[1e-3, 1e-2],
        num_starts=4,
        num_steps=12_000,
    )
    assert (cycle.period == 2).all()
    assert cycle.radius == pytest.approx(np.full((2, 4), 0.5), rel=1e-6)
    assert cycle.exponent == pytest.approx(2, abs=1e-3)
    assert cycle.lowest == pytest.approx(cycle.highest, rel=1e-6)


def test_without_forgetting_there_is_no_cycle():
    with pytest.raises(ValueError, match="below 1"):
        quadratic.limit_cycle(quadratic.case(3), beta2=1.0)
