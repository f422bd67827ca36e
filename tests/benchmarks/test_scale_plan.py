"""The plan on paper: what is extended from two and three layers is what all layers have."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
plan = importlib.import_module("scale_plan")

SMALL = plan.Shape("small", "none", 6, 32, 88, 4, 2, 64, True, 16)
RATES = plan.Rates(1e12, 300e9, 40e9, 80e9)


@pytest.fixture(scope="module", params=[True, False], ids=["gated", "plain"])
def shape(request):
    return SMALL._replace(gated=request.param, key_heads=2 if request.param else 4)


@pytest.fixture(scope="module")
def counts(shape):
    return plan.counts_of(shape)


@pytest.fixture(scope="module")
def counted(shape):
    """All six layers counted."""
    return plan._plan(shape, 6)


def test_parameters_and_operations_are_those_of_the_whole_network(counts, counted):
    assert counts.parameters == counted.parameters
    assert counts.forward == counted.forward_operations
    assert counts.products[0] == pytest.approx(plan._mean_product(counted, 0))
    assert counts.products[1] == pytest.approx(plan._mean_product(counted, 5))
    every = sum(c.operations * c.blocks for c in counted.costs)
    every /= sum(c.blocks for c in counted.costs)
    assert counts.mean_product == pytest.approx(every)


def test_a_graph_of_all_layers_takes_three_forward_passes(counted):
    # attention's backward pass is a little dearer
    assert counted.gradient_operations / counted.forward_operations == pytest.approx(3, rel=0.05)


def test_more_devices_hold_less_each_and_take_no_longer(counts):
    asked = plan.ASKED[0]
    memory = [counts.memory(asked, plan.Layout(group, 1)) for group in (1, 2, 4)]
    assert memory[0] > memory[1] > memory[2]
    hours = [counts.hours(asked, RATES, devices, 16) for devices in (1, 8, 64)]
    assert hours[0] == pytest.approx(8 * hours[1]) == pytest.approx(64 * hours[2])


def test_a_network_that_does_not_fit_is_shared_and_too_few_devices_are_told(counts):
    asked = plan.ASKED[0]
    alone = counts.memory(asked, plan.Layout(1, 1))
    layout = counts.layout(asked, 0.95 * alone / plan.USABLE)
    assert layout.group > 1
    small = RATES._replace(memory=0.95 * alone / plan.USABLE)
    assert counts.hours(asked, small, layout.group // 2, 16) is None
    assert counts.hours(asked, small, layout.group, 16) > 0
    with pytest.raises(ValueError, match="one layer does not fit"):
        counts.layout(asked, 100)


def test_the_duration_is_in_the_largest_unit_of_which_there_is_one():
    told = [plan.duration(hours) for hours in (None, 1 / 7200, 0.5, 3, 50, 24 * 800)]
    assert told == ["-", "0.5 s", "30 min", "3 h", "2.1 d", "2.2 y"]
