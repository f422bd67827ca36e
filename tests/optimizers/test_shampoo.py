"""Shampoo: step by step against the rule in numpy, against a library, the identity with Adafactor,
its factors in the hands of the package, and what a torch optimizer must do."""

import numpy as np
import pytest
import torch
from problems import relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers.shampoo import Shampoo

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


def gradients(model, seed):
    loss = nn.functional.cross_entropy(model(data(seed)[0]), data(seed)[1])
    return [g.numpy() for g in torch.autograd.grad(loss, list(model.parameters()))]


def trained(model, optimizer, seeds=range(STEPS)):
    for seed in seeds:
        x, y = data(seed, model.last.weight.dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def root(factor, q, damping):
    """(A + damping lambda_max I)^-q by the singular values of a symmetric matrix."""
    u, s, _ = np.linalg.svd((factor + factor.T) / 2)
    return u @ np.diag((s + damping * s[0]) ** -q) @ u.T


def by_rule(model, rule):
    """The rule, written out in numpy, of a dict of settings."""
    b1, b2 = rule["betas"]
    lr, wd, q = 1e-2, rule["weight_decay"], rule["power"]
    states = [{} for _ in model.parameters()]
    for t in range(1, STEPS + 1):
        keep, new = (1, 1) if rule["sums"] else (b2, 1 - b2)
        found = gradients(model, t - 1)
        for p, g, s in zip(model.parameters(), found, states, strict=True):
            correction = 1 if rule["sums"] else 1 - b2**t
            s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
            mean = s["m"] / (1 - b1**t)
            if g.ndim < 2:
                s["v"] = keep * s.get("v", 0) + new * g**2
                step = mean / (np.sqrt(s["v"] / correction) + rule["eps"])
            else:
                matrix = g.reshape(len(g), -1)
                s["L"] = keep * s.get("L", 0) + new * matrix @ matrix.T
                s["R"] = keep * s.get("R", 0) + new * matrix.T @ matrix
                left, right = s["L"] / correction, s["R"] / correction
                if rule["trace"]:
                    left = left / np.trace(left)
                if (t - 1) % rule["frequency"] == 0:
                    s["roots"] = [root(f, q, rule["damping"]) for f in (left, right)]
                step = s["roots"][0] @ mean.reshape(len(g), -1) @ s["roots"][1]
            w = p.detach().numpy()
            w *= 1 - lr * wd
            w -= lr * step.reshape(g.shape)
    return flat(model)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_it_is_the_rule(b1, power, sums, trace):
    rule = {
        "betas": (b1, 0.95),
        "power": power,
        "sums": sums,
        "trace": trace,
        "damping": 1e-2,
        "eps": 1e-8,
        "frequency": 3,
        "weight_decay": 0.1,
    }
    model, other = net(), net()
    found = trained(model, Shampoo(model.parameters(), 1e-2, **rule))
    assert relative_error(found, by_rule(other, rule)) < 1e-12


def test_without_momentum_no_average_is_kept():
    model = net()
    optimizer = Shampoo(model.parameters(), betas=(0.0, 0.95))
    trained(model, optimizer, range(1))
    assert not any("exp_avg" in state for state in optimizer.state.values())


def test_published_shampoo_is_the_librarys_without_momentum():
    """Square matrices, whose factors have full rank from the first step on: no ridge is needed."""
    library = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(1)
    one = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    other = nn.Parameter(one.detach().clone())
    ours = Shampoo([one], 1e-2, (0.0, 0.0), sums=True, damping=0.0)
    theirs = library.Shampoo([other], 1e-2, momentum=0.0, matrix_eps=1e-300)
    for _ in range(STEPS):
        one.grad = other.grad = torch.randn(5, 5, dtype=torch.float64)
        ours.step()
        theirs.step()
    assert relative_error(one.detach(), other.detach()) < 1e-9


def test_a_gradient_alone_is_orthogonalised():
    """At q = 1/4 the first step of U S V' is U V'."""
    torch.manual_seed(3)
    p = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    p.grad = torch.randn(4, 6, dtype=torch.float64)
    Shampoo([p], 1.0, damping=1e-14).step()
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    assert relative_error(-p.detach(), u @ v) < 1e-10


def test_a_gradient_of_rank_one_has_a_step_of_length_one_over_its_norm():
    """At q = 1/2, s u v' becomes u v' / s; with the trace u v'; the ridge makes it shorter."""
    u = torch.tensor([0.6, 0.8], dtype=torch.float64)
    v = torch.tensor([2, 1, 2], dtype=torch.float64) / 3
    for trace, length in ((False, 1 / 7), (True, 1.0)):
        p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        p.grad = 7 * torch.outer(u, v)
        Shampoo([p], 1.0, power=0.5, trace=trace, damping=1e-3).step()
        assert relative_error(-p.detach(), length / 1.001 * torch.outer(u, v)) < 1e-12


@pytest.mark.parametrize("rows, columns", [(3, 3), (3, 9), (9, 3)])
def test_with_the_trace_factors_have_the_size_of_the_second_moments(rows, columns):
    """tr(L x R) = tr(L) tr(R) is the gradient's squared norm, whichever side has no factor."""
    torch.manual_seed(6)
    p = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    p.grad = torch.randn_like(p)
    optimizer = Shampoo([p], 1.0, power=0.5, trace=True, damping=0.0, largest=4)
    optimizer.step()
    left, right = optimizer.kronecker_factors()[p]
    torch.testing.assert_close(left.trace() * right.trace(), p.grad.square().sum())
    if rows != columns:  # one factor of full rank: the step has orthonormal rows, times a length
        length = max(rows, columns) ** 0.5
        step = -p.detach() if rows < columns else -p.detach().T
        torch.testing.assert_close(step @ step.T, length**2 * torch.eye(3, dtype=torch.float64))


def many_gradients(seed=4, count=40):
    torch.manual_seed(seed)
    shape = torch.logspace(0, -2, 7, dtype=torch.float64)
    return torch.randn(count, 5, 7, dtype=torch.float64) * shape


def test_idealised_shampoo_2_is_idealised_adafactor_in_its_eigenbasis():
    """arXiv 2409.11321: both divide coordinate (i, j) by (lambda_i mu_j / sum lambda)^(1/2)."""
    several = many_gradients()
    left = (several @ several.mT).sum(0)
    right = (several.mT @ several).sum(0)
    _, u = torch.linalg.eigh(left)
    _, w = torch.linalg.eigh(right)
    rotated = (u.T @ several @ w).square().sum(0)
    v = torch.outer(rotated.sum(1), rotated.sum(0)) / rotated.sum()
    adafactor = u @ ((u.T @ several[-1] @ w) / v.sqrt()) @ w.T
    p = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    # by Shampoo's own steps: sums over all gradients, and the last of them preconditioned
    optimizer = Shampoo([p], 1.0, (0.0, 0.0), power=0.5, sums=True, trace=True, damping=0.0)
    for g in several:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
    assert relative_error(before - p.detach(), adafactor) < 1e-11


def test_a_side_that_is_too_long_has_the_identity():
    torch.manual_seed(5)
    g = torch.randn(3, 9, dtype=torch.float64)
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = Shampoo([p], 1.0, power=0.5, damping=0.0, largest=4)
    p.grad = g
    optimizer.step()
    expected = torch.tensor(root((g @ g.T).numpy(), 0.5, 0.0)) @ g
    assert relative_error(-p.detach(), expected) < 1e-11
    left, right = optimizer.kronecker_factors()[p]
    assert relative_error(left, g @ g.T) < 1e-12 and torch.equal(right, torch.eye(9).double())
    both = nn.Parameter(torch.zeros_like(g))
    both.grad = g
    optimizer = Shampoo([both], 1.0, largest=2, eps=0.0)
    optimizer.step()
    assert relative_error(-both.detach(), g.sign()) < 1e-12
    assert not optimizer.kronecker_factors()


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_preconditioner_is_what_the_step_multiplies_by(dtype, trace, power):
    model = net(dtype)
    problem = ht.Problem(model, ht.cross_entropy, [data(0, dtype)])
    optimizer = Shampoo(model.parameters(), 1e-3, (0.0, 0.95), power=power, trace=trace)
    with pytest.raises(ValueError, match="take a step first"):
        ht.preconditioner_of(optimizer, problem)
    trained(model, optimizer, range(4))
    before = flat(model)
    trained(model, optimizer, [4])
    p = ht.preconditioner_of(optimizer, problem)
    gradients = {name: q.grad for name, q in model.named_parameters()}
    moved = torch.cat([p.inverse(name, g[None]).flatten() for name, g in gradients.items()])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert relative_error((before - flat(model)).double(), 1e-3 * moved.double()) < tolerance
    operator = ht.PreconditionedOperator(ht.HessianOperator(problem), p)
    assert operator.shape == (problem.num_parameters,) * 2


def test_groups_of_several_powers_have_no_one_preconditioner():
    model = net()
    groups = [
        {"params": list(model.conv.parameters()), "power": 0.5},
        {"params": list(model.last.parameters())},
    ]
    optimizer = Shampoo(groups)
    trained(model, optimizer, range(1))
    problem = ht.Problem(model, ht.cross_entropy, [data(0)])
    with pytest.raises(ValueError, match=r"groups have powers \[0.25, 0.5\]"):
        ht.preconditioner_of(optimizer, problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_bit_for_bit(dtype):
    options = {"frequency": 4, "weight_decay": 0.1, "damping": 1e-2}
    model = net(dtype)
    optimizer = Shampoo(model.parameters(), 1e-3, **options)
    trained(model, optimizer, range(6))  # between two pairs of roots
    again = net(dtype)
    again.load_state_dict(model.state_dict())
    other = Shampoo(again.parameters(), 9.0)
    other.load_state_dict(optimizer.state_dict())
    found = trained(again, other, range(6, 14))
    assert torch.equal(found, trained(model, optimizer, range(6, 14)))
    assert found.isfinite().all()


def test_schedulers_act():
    model = net()
    optimizer = Shampoo(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 1))
    first = trained(model, optimizer, range(1))
    scheduler.step()
    assert torch.equal(trained(model, optimizer, range(1, 3)), first)


def test_gradients_of_zero_and_without_a_number():
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([p], frequency=5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(
        ht.NumericalError, match="left factor of 3 rows holds NaN or inf after step"
    ):
        for _ in range(5):
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"power": 0.3}, r"power is 0.3; 0.25 \(Shampoo\) or 0.5 \(Shampoo\^2\) is needed"),
        ({"frequency": 0}, "frequency is 0; a whole number from 1"),
        ({"largest": 1.5}, "largest is 1.5; a whole number from 1"),
        ({"damping": -1.0}, "damping is -1.0; a number from 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
    ],
)
def test_numbers_out_of_range_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        Shampoo(net().parameters(), **options)
