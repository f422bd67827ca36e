"""Schedules against their closed forms; budgets in words; the z-loss against its formula."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.training import Budget, ZLoss, constant, cosine, linear, schedule_of
from hessian_tools.training.budget import budget_of


def test_cosine_warms_up_over_a_tenth_and_ends_at_a_tenth():
    factors = [cosine(step, 100) for step in range(100)]
    np.testing.assert_allclose(factors[:10], 0.1 + 0.9 * np.arange(10) / 10)
    shares = np.arange(90) / 89
    np.testing.assert_allclose(factors[10:], 0.1 + 0.45 * (1 + np.cos(math.pi * shares)))
    assert factors[10] == 1 and factors[99] == pytest.approx(0.1)


def test_linear_falls_in_a_straight_line():
    factors = [linear(step, 50, warm_up=0.2, end=0.5) for step in range(50)]
    np.testing.assert_allclose(factors[10:], 1 - 0.5 * np.arange(40) / 39)
    assert factors[0] == pytest.approx(0.1) and factors[-1] == 0.5


def test_constant_is_one():
    assert {constant(step, 10) for step in range(10)} == {1.0}
    assert constant(0, 10, warm_up=0.5, start=0.0) == 0.0


@pytest.mark.parametrize("schedule", [cosine, linear, constant])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_have_factors_too(schedule, num_steps):
    assert all(0 <= schedule(step, num_steps) <= 1 for step in range(num_steps))


def test_options_are_set_by_name():
    assert schedule_of("cosine", end=0.0)(99, 100) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="must be one of cosine, linear, constant, got 'step'"):
        schedule_of("step")
    with pytest.raises(ValueError, match="warm_up is a share of 1, from 0 to 1, got 3"):
        schedule_of("cosine", warm_up=3)


@pytest.mark.parametrize(
    ("given", "amount", "unit"),
    [
        (500, 500, "steps"),
        ("500steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("5min", 300, "seconds"),
        ("1.5h", 5400, "seconds"),
        ("30s", 30, "seconds"),
        (Budget(7), 7, "steps"),
    ],
)
def test_budgets_in_words(given, amount, unit):
    assert budget_of(given) == Budget(amount, unit)


@pytest.mark.parametrize("given", ["5", "min", "5 apples", "0s", "1.5steps", True, -3, ""])
def test_what_is_no_budget(given):
    with pytest.raises(ValueError, match="budget"):
        budget_of(given)


def test_z_loss_is_its_formula_over_the_targets_that_count():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5))
    targets[0, :3] = -100
    model = nn.Identity()
    loss, penalty = ZLoss(ht.cross_entropy, 0.01).parts(model, (logits, targets))
    normaliser = logits.exp().sum(-1).log()[targets != -100]
    torch.testing.assert_close(penalty, 0.01 * (normaliser**2).mean())
    torch.testing.assert_close(loss, ht.cross_entropy(model, (logits, targets)))
    torch.testing.assert_close(
        ZLoss(ht.cross_entropy, 0.01)(model, (logits, targets)), loss + penalty
    )


def test_z_loss_needs_a_classifier():
    with pytest.raises(ValueError, match="z-loss needs the logits of a classifier, and Mean"):
        ZLoss(ht.mse)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        ZLoss(ht.cross_entropy, -1)
