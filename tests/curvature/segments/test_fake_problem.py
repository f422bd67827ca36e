"""Passes on fake tensors: they must count what real ones hold, and leave the model as it was."""

import pytest
import torch
from problems import network
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.engine import trials
from hessian_tools.curvature.engine.precision import arithmetic
from hessian_tools.curvature.segments.fake_problem import FakeProblem, is_fake
from hessian_tools.curvature.segments.recompute import LAYERED, NONE


def footprint(monkeypatch, problem, kind, worth):
    """The bytes that a plan is made from, by trials on fake (worth=-1) or real tensors (1e30)."""
    monkeypatch.setattr(trials, "WORTH_FAKING", worth)
    return trials.Trials(problem, arithmetic(problem.model), 1 << 30)._trial(kind, 1 << 30)


@pytest.mark.parametrize("kind", [NONE, LAYERED], ids=["plain", "layered"])
@pytest.mark.parametrize("name", ["batchnorm-batch", "groupnorm", "lstm", "gpt", "hf-gpt2"])
def test_fake_trials_count_what_real_ones_hold(monkeypatch, name, kind):
    problem = network(name, torch.float32)
    calls = []
    hook = problem.model.register_forward_hook(
        lambda module, args, out: calls.append(is_fake(next(module.parameters())))
    )
    fake = footprint(monkeypatch, problem, kind, -1)
    trial, calls[:] = list(calls), []
    hook.remove()
    assert footprint(monkeypatch, problem, kind, 1e30) == fake
    assert any(trial) == (name != "lstm")  # whose kernel keeps what nobody sees


def test_the_model_is_put_back_also_after_an_error():
    problem = network("gpt")
    before = {name: (id(p), p.clone()) for name, p in problem.model.named_parameters()}
    fake = FakeProblem(problem)
    with pytest.raises(ZeroDivisionError), fake.installed():
        assert all(map(is_fake, problem.model.parameters()))
        raise ZeroDivisionError
    after = dict(problem.model.named_parameters())
    assert all(
        id(after[name]) == key and torch.equal(after[name], value)
        for name, (key, value) in before.items()
    )


def test_a_model_that_looks_at_values_is_tried_in_earnest(monkeypatch):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x) if float(self.linear.weight.detach().sum()) < 1e9 else x

    problem = ht.Problem(Looks(), ht.mse, [(torch.randn(4, 3), torch.randn(4, 2))])
    assert footprint(monkeypatch, problem, NONE, -1) == footprint(monkeypatch, problem, NONE, 1e30)
