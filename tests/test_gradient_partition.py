"""The experiment on blocks from squared gradients: planted structure is found."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hessian_tools.blocks.presets import alternatives

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("gradient_partition")


@pytest.mark.parametrize("planted", ["whole", "rows", "columns"])
def test_the_cut_along_which_squares_differ_has_the_lowest_bic(planted):
    torch.manual_seed(0)
    shapes = {"whole": (1, 1), "rows": (20, 1), "columns": (1, 30)}
    squares = torch.randn(20, 30).square() * (10 * torch.rand(shapes[planted])).exp()
    squares[3, :10] = 0  # entries without gradient
    cuts = alternatives(nn.Sequential(nn.Linear(30, 20)), "0.weight")
    found = {name: experiment.bic(cut, {"0.weight": squares}) for name, cut in cuts.items()}
    assert min(found, key=found.get) == planted
    assert found["elements"] == float("inf")


def test_gradients_are_means_over_batches():
    pair = experiment.SUITE["mlp/tanh-deep"]
    two = experiment.squared_gradients(pair, 2)
    model, stream = pair.make_model(0), pair.stream()
    expected = 0.0
    for step in range(2):
        loss = stream.loss_fn(model, stream.batch(step))
        (gradient,) = torch.autograd.grad(loss, [next(iter(model.parameters()))])
        expected = expected + gradient.square() / 2
    name = next(iter(two))
    torch.testing.assert_close(two[name], expected)
