"""Comparisons of several methods."""

import pytest

from hessian_tools import quadratic


def test_standings_are_in_order_and_compare_with_gradient_descent():
    q = quadratic.case(3)
    runs = quadratic.compare(q, ["gd", "adam_frozen"], num_starts=9, num_steps=8000, progress=False)
    fast, slow = quadratic.standings(runs)
    assert (fast.name, slow.name, slow.speedup) == ("adam_frozen", "gd", 1.0)
    assert fast.speedup == slow.quartiles[1] / fast.quartiles[1] > 10


def test_a_tuned_step_is_no_worse_than_the_theorys():
    q = quadratic.case(3)
    some = {"num_starts": 9, "progress": False}
    theory = quadratic.compare(q, ["gd"], num_steps=8000, **some)["gd"]
    tuned = quadratic.compare(q, ["gd"], tuned=True, num_steps=4000, **some)["gd"]
    assert tuned.step.startswith("best of a sweep")
    assert tuned.median_iterations(1e-6) <= theory.median_iterations(1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="choose among gd"):
        quadratic.compare(quadratic.case(3), ["adamw"])
