"""Weights that change between products, in ways that autograd's counter sees and does not see."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import hessian_tools as ht
from hessian_tools.problem import mean_gradient
from hessian_tools.problem.weights import Watch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def problem_of(model, batch=None):
    batch = batch or (torch.randn(16, 4), torch.arange(16) % 3)
    return ht.Problem(model, ht.cross_entropy, [batch], batch_stats=False)


def by_operation(model):
    with torch.no_grad():
        model[0].weight.mul_(2.0)


def by_data(model):
    model[0].weight.data.add_(0.5)


def by_one_entry_of_data(model):
    model[0].weight.data[3, 2] += 0.25


def by_order_of_data(model):
    model[0].weight.data.copy_(model[0].weight.data.flip(0))


def by_memory(model):
    model[0].weight.data = model[0].weight.data + 0.5


def by_vector(model):
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector + 0.5, model.parameters())


def by_copy(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def by_assignment(model):
    changed = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(changed, assign=True)


def by_new_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def by_buffer(model):
    model[1].running_mean.add_(0.5)


CHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("route", ["double backward", "tangent program"])
def test_products_are_those_of_the_present_weights(change, route):
    model = network()
    batch = (torch.randn(16, 4), torch.arange(16) % 3)
    hessian = ht.HessianOperator(problem_of(model, batch), route=route)
    v = torch.randn(hessian.size)
    before = hessian @ v
    change(model)
    expected = ht.HessianOperator(problem_of(model, batch), route="double backward") @ v
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_follows_swapped_tensors():
    model = network()
    problem = problem_of(model)
    by_assignment(model)
    expected = mean_gradient(problem_of(model, problem.batches[0]))
    found = mean_gradient(problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(gradient.any() for gradient in found.values())


def test_data_that_is_written_into_is_seen():
    model = network()
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    hessian = ht.HessianOperator(problem_of(model, (x, y)))
    v = torch.randn(hessian.size)
    hessian @ v
    hessian.problem.batches[0][0].mul_(3.0)
    expected = ht.HessianOperator(problem_of(model, (x, y))) @ v
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-4, atol=1e-6)


def frozen(model):
    model[0].bias.requires_grad_(False)


def pruned(model):
    prune.random_unstructured(model[0], "weight", 0.5)


def widened(model):
    model[0].extra = nn.Parameter(torch.zeros(2))


def in_float64(model):
    model.double()


def reshaped(model):
    model[3].bias.data = torch.zeros(5)


@pytest.mark.parametrize(
    "change, named",
    [
        (frozen, "0.bias does not require grad any more"),
        (pruned, "0.weight is no parameter of the model any more"),
        (widened, "0.extra did not require grad, or was no parameter"),
        (in_float64, "torch.float64"),
        (reshaped, "they had 83 entries and have 85"),
    ],
)
def test_a_model_that_is_another_one_is_refused(change, named):
    model = network()
    hessian = ht.HessianOperator(problem_of(model))
    hessian @ torch.randn(hessian.size)
    change(model)
    with pytest.raises(ValueError, match=named) as refusal:
        hessian @ torch.randn(hessian.size)
    assert "make a new Problem" in str(refusal.value)


def test_a_watch_sees_each_change_once():
    model = network()
    watch = Watch(problem_of(model))
    assert watch.change() == ""
    assert watch.change() == ""
    by_data(model)
    assert watch.change() == "values"
    assert watch.change() == ""
    by_assignment(model)
    assert watch.change() == "tensors"
    assert watch.change() == ""


def test_not_a_number_is_like_itself():
    model = network()
    watch = Watch(problem_of(model))
    model[0].weight.data[0, 0] = torch.nan
    assert [watch.change() for _ in range(3)] == ["", "", ""]  # the first look of all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_odd_lengths_and_offsets(dtype):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            storage = torch.arange(1, 9).to(dtype)
            self.w = nn.Parameter(storage[1:6])

        def forward(self, x):
            return x * self.w.square().sum()

    problem = ht.Problem(Own(), lambda m, x: m(x).mean(), [torch.ones(2, 1, dtype=dtype)])
    watch = Watch(problem)
    watch.change()
    problem.model.w.data[4] += 1
    assert watch.change() == "values"


def test_lanczos_looks_once(monkeypatch):
    looks = []
    change = Watch.change
    monkeypatch.setattr(Watch, "change", lambda self: looks.append(1) or change(self))
    problem = problem_of(network())
    hessian = ht.HessianOperator(problem)
    ht.slq(hessian, num_probes=2, num_steps=6, seed=0)
    assert len(looks) == 1
