"""Products by differences of gradients: the experiment's own arithmetic, and its formats."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import hessian_tools as ht

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("finite_differences")


@pytest.fixture
def quadratic() -> ht.Problem:
    """Its gradient is linear, so that differences have no error but rounding."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    return ht.Problem(model, ht.mse, [batch])


def test_of_a_quadratic_differences_are_exact_at_any_step(quadratic):
    before = [p.detach().clone() for p in quadratic.model.parameters()]
    for direction in experiment.directions(quadratic, ["weight", "bias"]):
        truth = experiment.exact(quadratic, direction)
        for step in (1e-3, 1e-1):
            found = experiment.difference(quadratic, direction, step)
            assert max(experiment.errors(found, truth)) < 1e-12
    assert all(p.equal(q) for p, q in zip(quadratic.model.parameters(), before, strict=True))


def test_the_exact_product_is_the_dense_hessians(quadratic):
    dense = ht.HessianOperator(quadratic).to_dense()
    (direction,) = experiment.directions(quadratic, ["weight", "bias"])[:1]
    truth = experiment.exact(quadratic, direction)
    flat = torch.cat([direction[name].flatten() for name in ("weight", "bias")])
    wanted = torch.as_tensor(dense) @ flat
    torch.testing.assert_close(torch.cat([t.flatten() for t in truth.values()]), wanted)


def test_lengths_are_told_apart_from_products():
    truth = {"a": torch.tensor([3.0, 4.0])}
    turned = {"a": torch.tensor([4.0, -3.0])}
    assert experiment.errors(turned, truth) == pytest.approx((2**0.5, 0.0))


def test_both_see_the_batch_statistics():
    torch.manual_seed(0)
    parts = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(*parts).double()
    batch = 3 + torch.randn(8, 3).double(), torch.randn(8, 2).double()
    problem = ht.Problem(model, ht.mse, [batch], batch_stats=True)
    (direction,) = experiment.directions(problem, ["0.weight"])[:1]
    truth = experiment.exact(problem, direction)
    assert experiment.errors(experiment.difference(problem, direction, 1e-5), truth)[0] < 1e-6
