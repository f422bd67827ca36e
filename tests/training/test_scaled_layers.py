"""The experiment on scaled layers: one function at the start, blocks times c^2, its judgement."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from problems import dense_hessian

import hessian_tools as ht

ROOT = Path(__file__).parents[2]
SIZES = (3, 4, 4, 4, 2)


@pytest.fixture
def experiment(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    path = ROOT / "experiments/scaled_layers.py"
    spec = importlib.util.spec_from_file_location("scaled_layers", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaled_layers", module)
    spec.loader.exec_module(module)
    return module


def network(experiment: ModuleType, scales: list[float]) -> torch.nn.Module:
    torch.manual_seed(5)
    return experiment.scaled_mlp(scales, SIZES).double()


def hessian(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (7,), generator=generator)
    return dense_hessian(ht.Problem(model, ht.cross_entropy, [(inputs, labels)]))


@pytest.mark.parametrize("pattern", ["ramp", "head", "first", "alternating"])
def test_the_outputs_at_the_start_are_those_without_factors(experiment, pattern):
    inputs = torch.randn(9, 3, dtype=torch.float64)
    plain = network(experiment, [1.0] * 4)(inputs)
    scaled = network(experiment, experiment.factors(pattern, 6))(inputs)
    # the parameters are divided in float32, whose rounding is what is left
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_the_spread_of_squared_factors_is_that_of_the_dial(experiment):
    for pattern in experiment.PATTERNS:
        scales = experiment.factors(pattern, 4)
        assert (max(scales) / min(scales)) ** 2 == pytest.approx(1e4)


@pytest.mark.parametrize("pattern", ["ramp", "head", "first", "alternating"])
def test_blocks_of_the_hessian_are_times_the_squared_factors(experiment, pattern):
    scales = experiment.factors(pattern, 3)
    counts = [n * m + m for n, m in pairwise(SIZES)]
    factor = torch.cat([torch.full((count,), c) for count, c in zip(counts, scales, strict=True)])
    plain = hessian(network(experiment, [1.0] * 4))
    found = hessian(network(experiment, scales))
    expected = factor[:, None] * plain * factor
    ends = np.cumsum([0, *counts])
    for first, last in pairwise(ends):
        block = slice(first, last)
        size = expected[block, block].norm()
        assert size > 0
        assert (found[block, block] - expected[block, block]).norm() < 1e-5 * size


def test_an_accuracy_that_falls_beyond_its_limits_is_said_to_fall(experiment):
    interval = experiment.Interval
    falls, stays = interval(-0.1, -0.15, -0.05), interval(0.0, -0.005, 0.005)
    unknown = interval(-0.02, -0.05, 0.01)
    assert experiment.example_2(falls, stays) == "holds here"
    assert experiment.example_2(stays, stays) == "does not hold here"
    assert experiment.example_2(falls, falls) == "does not hold here"
    assert experiment.example_2(unknown, stays).startswith("not decidable")
    assert experiment.example_2(falls, unknown).startswith("not decidable")


def test_limits_take_seeds_and_images_into_account(experiment):
    same_seeds = np.tile([1.0, 0.0, 0.0, -1.0], (3, 1))
    found = experiment.over_seeds_and_images(same_seeds)
    error = math.sqrt(np.var([1, 0, 0, -1], ddof=1) / 4)
    assert found.mean == 0
    assert found.high == pytest.approx(4.302653 * error)  # Student's t, 2 degrees
    same_images = np.repeat([[1.0], [0.0], [2.0]], 5, axis=1)
    assert experiment.over_seeds_and_images(same_images).high == pytest.approx(
        1 + 4.302653 / math.sqrt(3)
    )


def test_rank_correlations(experiment):
    ascending = np.arange(6.0)
    assert experiment.rank_correlation(ascending, ascending**3) == pytest.approx(1)
    assert math.isnan(experiment.rank_correlation(np.ones(6), ascending))
    found = experiment.bootstrapped(ascending, np.array([0.0, 2, 1, 3, 5, 4]), 200)
    assert found.low < found.mean < found.high <= 1


def test_a_sweep_begins_where_a_step_moves_the_function_as_far(experiment):
    position = experiment.Position("x", lambda: None, None, scales=(1.0, 100.0))
    plain = experiment.Position("x", lambda: None, None)
    for optimizer, power in (("sgd", 2), ("adam", 1)):
        ratios = np.divide(plain.rates(optimizer), position.rates(optimizer))
        assert ratios == pytest.approx(100.0**power)
