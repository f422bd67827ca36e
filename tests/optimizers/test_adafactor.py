"""Adafactor as studied: step by step against the rule in numpy, and what a torch optimizer must do.

What every optimizer of :mod:`hessian_tools.optimizers.stepping` does is tested here too.
"""

import copy

import numpy as np
import pytest
import torch
from problems import relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers.adafactor import Adafactor

STEPS = 25


class Net(nn.Module):
    """Tensors of one, two and four axes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.conv(x)).mean((2, 3)))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def data(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (8,), generator=generator)


def trained(model, optimizer, seeds=range(STEPS), scheduler=None):
    for seed in seeds:
        x, y = data(seed, model.last.weight.dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_rule(model, lr=1e-2, b1=0.9, b2=0.95, eps=1e-15, wd=0.1):
    """The rule, written out in numpy; rates by step where ``lr`` is a list."""
    rates = lr if isinstance(lr, list) else [lr] * STEPS
    parameters = list(model.parameters())
    m = [np.zeros(tuple(p.shape)) for p in parameters]
    row, column = [0.0] * len(m), [0.0] * len(m)
    for t in range(1, STEPS + 1):
        x, y = data(t - 1)
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = [g.numpy() for g in torch.autograd.grad(loss, parameters)]
        for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            m[i] = b1 * m[i] + (1 - b1) * g
            g2 = (g * g).reshape(len(g), -1) if g.ndim > 1 else g * g
            if g.ndim > 1:
                row[i] = b2 * row[i] + (1 - b2) * g2.mean(axis=1)
                column[i] = b2 * column[i] + (1 - b2) * g2.mean(axis=0)
                v = (row[i][:, None] * column[i][None, :] / row[i].mean()).reshape(g.shape)
            else:
                row[i] = b2 * row[i] + (1 - b2) * g2.mean()
                v = row[i]
            step = (m[i] / (1 - b1**t)) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
            w = p.detach().numpy()
            w *= 1 - rates[t - 1] * wd
            w -= rates[t - 1] * step
    return flat(model)


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.99)])
def test_it_is_the_rule(betas, wd):
    model, other = net(), net()
    optimizer = Adafactor(model.parameters(), 1e-2, betas, weight_decay=wd)
    expected = by_rule(other, 1e-2, *betas, wd=wd)
    assert relative_error(trained(model, optimizer), expected) < 1e-12


def test_eps_stands_outside_of_the_root():
    model, other = net(), net()
    optimizer = Adafactor(model.parameters(), 1e-2, eps=0.3)
    assert relative_error(trained(model, optimizer), by_rule(other, eps=0.3, wd=0)) < 1e-12


def test_defaults_are_the_published_ones():
    (group,) = Adafactor(net().parameters()).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3.16e-3, (0.9, 0.95), 1e-15)
    assert group["weight_decay"] == 0


def test_gradients_of_rank_one_make_it_adam():
    """Their squares have rank one as well, so that nothing is lost by factors."""
    one, other = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    adafactor = Adafactor([one], 1e-2)
    adam = torch.optim.Adam([other], 1e-2, (0.9, 0.95), 1e-15)
    g = torch.outer(torch.arange(1.0, 5), torch.tensor([1.0, -2, 3])).double()
    for t in range(STEPS):
        one.grad = other.grad = g * np.cos(t)
        adafactor.step()
        adam.step()
    assert relative_error(one.detach(), other.detach()) < 1e-12


def test_groups_have_their_own_rates_and_schedulers_act():
    model, other = net(), net()
    optimizer = Adafactor(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    found = trained(model, optimizer, scheduler=scheduler)
    rates = [1e-2 * 0.9**t for t in range(STEPS)]
    assert relative_error(found, by_rule(other, rates, wd=0)) < 1e-12
    still = net()
    groups = [{"params": still.conv.parameters(), "lr": 0.0}, {"params": still.last.parameters()}]
    before = flat(still)
    trained(still, Adafactor(groups, 1e-2), range(1))
    moved = flat(still) != before
    assert not moved[:95].any() and moved[95:].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_bit_for_bit(dtype, tmp_path):
    model = net(dtype)
    optimizer = Adafactor(model.parameters(), 1e-2, weight_decay=0.1)
    trained(model, optimizer, range(5))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again = net(dtype)
    again.load_state_dict(model.state_dict())
    other = Adafactor(again.parameters(), lr=9.0)
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(trained(again, other, range(5, 12)), trained(model, optimizer, range(5, 12)))


def test_loaded_state_is_a_copy_in_its_own_dtype():
    model = net(torch.bfloat16)
    optimizer = Adafactor(model.parameters())
    trained(model, optimizer, range(2))
    other = Adafactor(net(torch.bfloat16).parameters())
    other.load_state_dict(optimizer.state_dict())
    pairs = zip(optimizer.state.values(), other.state.values(), strict=True)
    for mine, theirs in pairs:
        for key in mine:
            assert mine[key].dtype == theirs[key].dtype == torch.float32
            assert mine[key].data_ptr() != theirs[key].data_ptr()


def test_closures_and_tensors_without_gradient():
    model = net()
    optimizer = Adafactor(model.parameters())
    model.conv.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        x, y = data(0)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(model.conv.weight, before["conv.weight"])
    assert not torch.equal(model.last.weight, before["last.weight"])
    assert model.conv.weight not in optimizer.state


def test_a_gradient_of_zero_moves_nothing():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Adafactor([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))


def test_the_package_reads_its_denominators():
    model = net()
    problem = ht.Problem(model, ht.cross_entropy, [data(0)])
    optimizer = Adafactor(model.parameters(), 1e-2, (0.0, 0.95))
    with pytest.raises(ValueError, match="take a step first"):
        ht.preconditioner_of(optimizer, problem)
    before = flat(model)
    trained(model, optimizer, range(1))
    p = ht.preconditioner_of(optimizer, problem)
    gradients = {name: q.grad for name, q in model.named_parameters()}
    moved = torch.cat([p.inverse(name, g[None]).flatten() for name, g in gradients.items()])
    assert relative_error(before - flat(model), 1e-2 * moved) < 1e-10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1.0}, r"lr is -1.0; a number from 0 is needed"),
        ({"lr": float("nan")}, r"lr is nan; a number from 0"),
        ({"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\); from 0 to below 1"),
        ({"eps": -1e-8}, r"eps is -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1"),
    ],
)
def test_numbers_out_of_range_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        Adafactor(net().parameters(), **options)
    optimizer = Adafactor(net().last.parameters())
    with pytest.raises(ValueError, match=told):
        optimizer.add_param_group({"params": list(net().conv.parameters()), **options})


def test_sparse_and_complex_gradients_are_refused_before_anything_moves():
    layer = nn.Embedding(5, 3, sparse=True)
    first = nn.Parameter(torch.ones(2, 2))
    first.grad = torch.ones(2, 2)
    optimizer = Adafactor([first, layer.weight])
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\) is sparse; Adafactor takes real dense"):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(2, 2))
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"shape \(2,\) is complex"):
        Adafactor([p]).step()
