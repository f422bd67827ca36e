"""Adafactor, Shampoo, SGD with measured rates, Muon, and the registry: step by step against the
rules in numpy, identities, and what a torch optimizer must do."""

import copy

import numpy as np
import pytest
import torch
from problems import gpt, relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers import (
    OPTIMIZERS,
    Adafactor,
    BlockwiseSGD,
    MuonWithAdamW,
    Shampoo,
    make,
)

STEPS = 25


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def gradients(model, seed=1):
    """Gradients at the model's present weights on fresh data, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), y)
        yield torch.autograd.grad(loss, list(model.parameters()))


def trained(model, optimizer, steps=STEPS, seed=1):
    for _, found in zip(range(steps), gradients(model, seed), strict=False):
        for p, g in zip(model.parameters(), found, strict=True):
            p.grad = g
        optimizer.step()
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_rule(model, update):
    """``update(state, p, g, t)`` in numpy on every tensor, in place."""
    states = [{} for _ in model.parameters()]
    for t, found in zip(range(1, STEPS + 1), gradients(model), strict=False):
        for p, g, state in zip(model.parameters(), found, states, strict=True):
            update(state, p.data.numpy(), g.numpy(), t)
    return flat(model)


def test_adafactor_is_the_rule():
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.95, 1e-15, 0.1

    def update(state, p, g, t):
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        squares = g**2
        if g.ndim < 2:
            state["v"] = b2 * state.get("v", 0) + (1 - b2) * squares.mean()
            v = state["v"]
        else:
            state["r"] = b2 * state.get("r", 0) + (1 - b2) * squares.mean(1)
            state["c"] = b2 * state.get("c", 0) + (1 - b2) * squares.mean(0)
            v = np.outer(state["r"], state["c"]) / state["r"].mean()
        p *= 1 - lr * decay
        p -= lr * (state["m"] / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)

    model, other = net(), net()
    optimizer = Adafactor(model.parameters(), lr, (b1, b2), eps, decay)
    assert relative_error(trained(model, optimizer), by_rule(other, update)) < 1e-12


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_shampoo_is_the_rule(b1, power, sums, trace):
    lr, b2, damping, eps, decay = 1e-2, 0.95, 1e-3, 1e-8, 0.1

    def root(factor):
        values, vectors = np.linalg.eigh(factor)
        values = np.maximum(values, 0) + damping * values.max()
        return vectors @ np.diag(values**-power) @ vectors.T

    def gathered(old, new):
        return old + new if sums else b2 * old + (1 - b2) * new

    def update(state, p, g, t):
        correction = 1 if sums else 1 - b2**t
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        mean = state["m"] / (1 - b1**t)
        if g.ndim < 2:
            state["v"] = gathered(state.get("v", 0), g**2)
            step = mean / (np.sqrt(state["v"] / correction) + eps)
        else:
            state["l"] = gathered(state.get("l", 0), g @ g.T)
            state["r"] = gathered(state.get("r", 0), g.T @ g)
            left = state["l"] / correction
            left = left / np.trace(left) if trace else left
            if (t - 1) % 3 == 0:
                state["roots"] = root(left), root(state["r"] / correction)
            one, other = state["roots"]
            step = one @ mean @ other
        p *= 1 - lr * decay
        p -= lr * step

    options = {"power": power, "sums": sums, "trace": trace, "damping": damping, "frequency": 3}
    model, other = net(), net()
    optimizer = Shampoo(model.parameters(), lr, (b1, b2), eps=eps, weight_decay=decay, **options)
    assert relative_error(trained(model, optimizer), by_rule(other, update)) < 1e-10


def test_idealised_shampoo_is_idealised_adafactor_in_its_eigenbasis():
    """Without running averages: one step on the sum of many gradients' factors (2409.11321)."""
    torch.manual_seed(2)
    several = torch.randn(40, 5, 7, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, 7, dtype=torch.float64)
    )
    left = torch.einsum("kij,kmj->im", several, several) / len(several)
    right = torch.einsum("kij,kim->jm", several, several) / len(several)
    lam, u = torch.linalg.eigh(left)
    mu, w = torch.linalg.eigh(right)
    g = several[0]
    rotated = torch.einsum("ia,kij,jb->kab", u, several, w)
    squares = rotated.square().mean(0)
    v = torch.outer(squares.mean(1), squares.mean(0)) / squares.mean()
    adafactor = u @ ((u.T @ g @ w) / v.sqrt()) @ w.T
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = Shampoo([p], 1.0, (0.0, 0.5), power=0.5, trace=True, damping=0.0)
    p.grad = g
    optimizer.step()
    state = optimizer.state[p]
    state["left"].copy_(left * (1 - 0.5**2))
    state["right"].copy_(right * (1 - 0.5**2))
    factor_left, factor_right = optimizer.kronecker_factors()[p]
    assert torch.allclose(factor_left, left / left.trace() * (1 - 0.25) / (1 - 0.5) * 0.5 / 0.75)
    root = (u * (lam / lam.sum()).rsqrt()) @ u.T @ g @ (w * mu.rsqrt()) @ w.T
    assert relative_error(root, adafactor) < 1e-10
    assert factor_right.shape == (7, 7)


def test_a_side_without_a_factor_is_left_as_it_is():
    p = nn.Parameter(torch.randn(3, 9, dtype=torch.float64))
    optimizer = Shampoo([p], 0.1, (0.0, 0.9), power=0.5, damping=0.0, largest=4)
    p.grad = torch.randn(3, 9, dtype=torch.float64)
    before = p.detach().clone()
    optimizer.step()
    g = p.grad
    values, vectors = torch.linalg.eigh(g @ g.T)
    expected = -0.1 * (vectors * values.rsqrt()) @ vectors.T @ g
    assert torch.allclose(p.detach() - before, expected, atol=1e-8)
    assert not optimizer.kronecker_factors()


# ---------------------------------------------------------------------------------- measured rates


def test_blockwise_sgd_is_the_rule_with_the_blocks_curvature():
    torch.manual_seed(3)
    model = net()
    batch = torch.randn(16, 4).double(), torch.randint(3, (16,))
    problem = ht.Problem(model, ht.cross_entropy, [batch])
    partition = ht.partition(model, "neuron")
    ggn = ht.GaussNewtonOperator(problem)
    optimizer = BlockwiseSGD(ggn, partition, lr=0.7, momentum=0.8, num_steps=50, weight_decay=0.1)
    other = copy.deepcopy(model)
    dense = ht.dense_block(ggn, partition)
    largest = {b: np.linalg.eigvalsh(dense.block(b)).max() for b in partition.names}
    found = trained(model, optimizer, 5)
    assert optimizer.measurements == 1 and optimizer.unmeasured == ()
    means = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    for t, pieces in zip(range(1, 6), gradients(other), strict=False):
        for name, g in zip(means, pieces, strict=True):
            means[name].mul_(0.8).add_(g, alpha=0.2)
        for block in partition:
            (part,) = block.as_cut().parts
            p = dict(other.named_parameters())[part.parameter].data
            rate = 0.7 / largest[block.name]
            mean = part.rows(means[part.parameter]) / (1 - 0.8**t)
            part.place(part.rows(p) * (1 - rate * 0.1) - rate * mean, p)
    assert relative_error(found, flat(other)) < 1e-9


def test_rates_are_measured_again_and_come_back_with_the_state():
    torch.manual_seed(4)
    model = net()
    batch = torch.randn(16, 4).double(), torch.randint(3, (16,))
    problem = ht.Problem(model, ht.cross_entropy, [batch])
    partition = ht.partition(model, "tensor")
    optimizer = BlockwiseSGD(problem, partition, lr=0.3, refresh=3)
    trained(model, optimizer, 4)
    assert optimizer.measurements == 2
    again = net()
    again.load_state_dict(model.state_dict())
    other = BlockwiseSGD(ht.Problem(again, ht.cross_entropy, [batch]), partition, lr=9.0, refresh=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(trained(model, optimizer, 4, 7), trained(again, other, 4, 7))
    assert other.measurements == 1


def test_blocks_without_curvature_get_a_rate_and_are_named():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.zero_()  # no gradient comes through it, nor curvature
    batch = torch.randn(16, 4).double(), torch.randint(2, (16,))
    problem = ht.Problem(model, ht.cross_entropy, [batch])
    optimizer = BlockwiseSGD(ht.GaussNewtonOperator(problem), ht.partition(model, "tensor"))
    optimizer.measure()
    assert optimizer.unmeasured == ("0.weight",)
    curvatures = [optimizer.state[p]["curvature"] for p in model.parameters()]
    assert torch.equal(curvatures[0], curvatures[1])


def test_a_partition_that_leaves_something_out_is_refused():
    model = net()
    problem = ht.Problem(
        model, ht.cross_entropy, [(torch.randn(4, 4).double(), torch.arange(4) % 3)]
    )
    with pytest.raises(ValueError, match=r"leaves 0.bias, 2.bias in no block"):
        BlockwiseSGD(problem, ht.partition(model, "weights"))
    with pytest.raises(ValueError, match="refresh is 0"):
        BlockwiseSGD(problem, ht.partition(model, "tensor"), refresh=0)


# ------------------------------------------------------------------------------------ the registry


def test_signum_is_the_sign_of_an_average():
    pytest.importorskip("pytorch_optimizer")

    def update(state, p, g, t):
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
        p -= 1e-3 * np.sign(state["m"])

    model, other = net(), net()
    found = trained(model, make("signum", model, 1e-3, momentum=0.9))
    assert relative_error(found, by_rule(other, update)) < 1e-12


def test_lion_is_the_rule():
    pytest.importorskip("pytorch_optimizer")

    def update(state, p, g, t):
        m = state.get("m", 0 * g)
        p *= 1 - 1e-3 * 0.1
        p -= 1e-3 * np.sign(0.9 * m + 0.1 * g)
        state["m"] = 0.98 * m + 0.02 * g

    model, other = net(), net()
    optimizer = make("lion", model, 1e-3, momentum=0.9, beta2=0.98, weight_decay=0.1)
    assert relative_error(trained(model, optimizer), by_rule(other, update)) < 1e-12


def test_lion_is_lucidrains():
    pytest.importorskip("pytorch_optimizer")
    lion_pytorch = pytest.importorskip("lion_pytorch")
    model, other = net(), net()
    found = trained(model, make("lion", model, 1e-3, momentum=0.9, beta2=0.99))
    expected = trained(other, lion_pytorch.Lion(other.parameters(), lr=1e-3, betas=(0.9, 0.99)))
    assert relative_error(found, expected) < 1e-12


def test_muon_takes_the_matrices_inside_layers_and_adamw_the_rest():
    model = gpt(tied=False)
    optimizer = MuonWithAdamW(model)
    by_name = dict(model.named_parameters())
    of_muon = {
        id(p) for g in optimizer.param_groups if g["optimizer"] == "muon" for p in g["params"]
    }
    chosen = {name for name, p in by_name.items() if id(p) in of_muon}
    assert "blocks.0.fc.weight" in chosen
    assert not any("token" in name or "position" in name or "norm" in name for name in chosen)
    every = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(every) == sorted(map(id, by_name.values()))
    with pytest.raises(ValueError, match="no matrix that Muon is for"):
        MuonWithAdamW(nn.Linear(3, 2))


def needed(name):
    if OPTIMIZERS[name].extra:
        pytest.importorskip("pytorch_optimizer")


def made(name, model, problem, **options):
    if name == "blockwise_sgd":
        options |= {"curvature": problem, "partition": ht.partition(model, "tensor")}
    if name == "shampoo2":
        # roots that are older than a gradient blow up what it has in their null space
        options |= {"frequency": 1}
    if name == "frozen_adalayer":
        options |= {"frozen_after": 2}
    return make(name, model, **options)


# where the published rate is for larger models
RATES = {
    "blockwise_sgd": 0.003,
    "sgd": 0.1,
    "sgd_nesterov": 0.1,
    "sgd_adalayer": 0.3,
    "shampoo2": 1e-3,
}


def language_problem():
    torch.manual_seed(6)
    model = gpt(d=16, tied=False)
    tokens = torch.randint(11, (4, 7))
    return model, ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_trains_and_goes_on_from_its_state(name):
    needed(name)
    model, problem = language_problem()
    entry = OPTIMIZERS[name]
    assert entry.line and entry.source and entry.grid[0] < entry.lr <= entry.grid[-1]
    rate = RATES.get(name)
    optimizer = made(name, model, problem, lr=rate)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            ht.cross_entropy(model, problem.batches[0]).backward()
            optimizer.step()

    steps(model, optimizer, 10)
    saved = copy.deepcopy(optimizer.state_dict())
    again, other_problem = language_problem()
    again.load_state_dict(model.state_dict())
    other = made(name, again, other_problem)
    other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    steps(model, optimizer, 4)
    steps(again, other, 4)
    assert relative_error(flat(again), flat(model)) < 1e-6
    with problem.evaluating():
        assert problem.batch_value(problem.batches[0]) < problem.loss


def test_unknown_names_and_missing_libraries_are_told(monkeypatch):
    with pytest.raises(ValueError, match="'adamm' is not known; there are sgd, "):
        make("adamm", net())
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r"pip install 'hessian_tools\[training\]'"):
        make("soap", net())


@pytest.mark.parametrize(
    ("make_one", "told"),
    [
        (lambda p: Adafactor(p, lr=-1.0), "lr is -1.0; it may not be negative"),
        (lambda p: Adafactor(p, betas=(1.0, 0.9)), r"betas is \(1.0, 0.9\)"),
        (lambda p: Shampoo(p, power=0.3), "power is 0.3; allowed are 0.25 and 0.5"),
        (lambda p: Shampoo(p, frequency=0), "frequency is 0"),
    ],
)
def test_numbers_out_of_range_are_told(make_one, told):
    with pytest.raises(ValueError, match=told):
        make_one(net().parameters())
