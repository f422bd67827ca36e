"""SGD with a measured rate a block: step by step against the rule in numpy with dense eigenvalues,
what is measured when, and what a torch optimizer must do."""

import numpy as np
import pytest
import torch
from problems import dense_hessian, gpt, relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers.blockwise_sgd import BlockwiseSGD

STEPS = 25


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def problem_of(model, loss=ht.cross_entropy):
    return ht.Problem(model, loss, [batch()])


def trained(model, optimizer, seeds=range(STEPS)):
    for seed in seeds:
        optimizer.zero_grad()
        x, y = batch(seed)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def places(partition, model):
    """By block name, where its entries lie in the flat vector of parameters."""
    numbers, start = {}, 0
    for name, p in model.named_parameters():
        numbers[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return {block.name: block.as_cut().rows(numbers).flatten().numpy() for block in partition}


def by_rule(model, partition, refresh=None, lr=0.02, b=0.9, heavy_ball=False, wd=0.0):
    """The rule on one flat vector, with the dense Hessian's eigenvalues."""
    parameters = list(model.parameters())
    blocks = places(partition, model)
    w = flat(model).numpy().copy()
    m = np.zeros_like(w)
    rate = np.zeros_like(w)
    for t in range(1, STEPS + 1):
        if t == 1 or (refresh and (t - 1) % refresh == 0):
            dense = dense_hessian(problem_of(model)).numpy()
            for at in blocks.values():
                rate[at] = lr / np.abs(np.linalg.eigvalsh(dense[np.ix_(at, at)])).max()
        x, y = batch(t - 1)
        loss = nn.functional.cross_entropy(model(x), y)
        g = torch.cat([q.flatten() for q in torch.autograd.grad(loss, parameters)]).numpy()
        m = b * m + g if heavy_ball else b * m + (1 - b) * g
        move = m if heavy_ball else m / (1 - b**t)
        w = w * (1 - rate * wd) - rate * move
        nn.utils.vector_to_parameters(torch.from_numpy(w.copy()), parameters)
    return torch.from_numpy(w)


@pytest.mark.parametrize("preset", ["tensor", "neuron"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"b": 0.0, "wd": 0.1},
        {"heavy_ball": True, "lr": 0.002, "wd": 0.1},
        {"refresh": 7},
    ],
)
def test_it_is_the_rule(preset, options):
    model, other = net(), net()
    partition = ht.partition(model, preset)
    given = {"lr": 0.02, "momentum": options.get("b", 0.9), "weight_decay": options.get("wd", 0)}
    given |= {name: options[name] for name in ("lr", "heavy_ball", "refresh") if name in options}
    # as many products as a block has entries: exact eigenvalues
    optimizer = BlockwiseSGD(problem_of(model), partition, num_steps=30, **given)
    expected = by_rule(other, partition, **options)
    assert relative_error(trained(model, optimizer), expected) < 1e-12


def test_without_interaction_a_rate_of_one_solves_the_stiffest_direction_of_every_block():
    """Two blocks of one entry each, of a quadratic: one step is Newton's."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[3.0, 0], [0, 0.01]], dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    problem = ht.Problem(model, ht.mse, [(x, y)])
    partition = ht.partition(model, "element")
    optimizer = BlockwiseSGD(problem, partition, 1.0, momentum=0.0)
    ht.mse(model, (x, y)).backward()
    optimizer.step()
    solved = torch.tensor([[1 / 3, 200.0]], dtype=torch.float64)
    assert torch.allclose(model.weight, solved, rtol=1e-10)


def test_the_gauss_newton_matrix_on_request():
    model = net()
    problem = problem_of(model)
    partition = ht.partition(model, "tensor")
    optimizer = BlockwiseSGD(problem, partition, 1.0, matrix="gauss_newton", num_steps=30)
    found = optimizer.measure()
    assert found.curvature == "Gauss-Newton matrix"
    dense = ht.dense_block(ht.GaussNewtonOperator(problem), partition)
    for name, rate in optimizer.rates().items():
        assert rate == pytest.approx(1 / np.linalg.eigvalsh(dense.block(name)).max(), rel=1e-10)


def test_rates_follow_lr_and_groups_have_their_own():
    model = net()
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.0},
        {"params": list(model[2].parameters())},
    ]
    optimizer = BlockwiseSGD(
        problem_of(model), ht.partition(model, "tensor"), 0.1, params=groups, num_steps=30
    )
    with pytest.raises(ValueError, match="take a step first"):
        optimizer.rates()
    before = flat(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    trained(model, optimizer, range(1))
    rates = optimizer.rates()
    scheduler.step()
    halved = optimizer.rates()
    assert rates["0.weight"] == 0 and (flat(model) != before).tolist() == [False] * 30 + [True] * 21
    assert halved["2.weight"] == rates["2.weight"] / 2


def test_a_saved_run_goes_on_bit_for_bit_and_measures_when_it_is_due(tmp_path):
    def made(model, lr):
        partition = ht.partition(model, "neuron")
        return BlockwiseSGD(problem_of(model), partition, lr, refresh=4, num_steps=3)

    model = net()
    optimizer = made(model, 0.02)
    trained(model, optimizer, range(6))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again = net()
    again.load_state_dict(model.state_dict())
    other = made(again, 9.0)
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert other.rates() == optimizer.rates()
    found = trained(again, other, range(6, 8))
    assert other.measured is None
    assert torch.equal(found, trained(model, optimizer, range(6, 8)))
    assert torch.equal(trained(again, other, range(8, 15)), trained(model, optimizer, range(8, 15)))
    assert other.measured is not None


def test_float32_state_holds_float64_curvature_when_it_comes_back():
    model = net().float()
    x, y = batch()
    problem = ht.Problem(model, ht.cross_entropy, [(x.float(), y)])
    optimizer = BlockwiseSGD(problem, ht.partition(model, "tensor"))
    optimizer.measure()
    other = BlockwiseSGD(problem, ht.partition(model, "tensor"))
    other.load_state_dict(optimizer.state_dict())
    assert other.rates() == optimizer.rates()


def test_measuring_leaves_gradients_and_weights_alone():
    model = net()
    optimizer = BlockwiseSGD(problem_of(model), ht.partition(model, "tensor"))
    x, y = batch(3)
    nn.functional.cross_entropy(model(x), y).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    optimizer.measure()
    for p, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, gradient)


def test_blocks_without_curvature_get_the_largest_rate_of_the_others_and_are_named():
    torch.manual_seed(5)
    model = gpt(d=8, tied=False).double()  # softmax cancels the key's bias
    tokens = torch.randint(11, (4, 7))
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    optimizer = BlockwiseSGD(problem, ht.partition(model, "tensor"))
    optimizer.measure()
    rates = optimizer.rates()
    unmeasured = "blocks.0.attention.key.bias"
    assert optimizer.param_groups[0]["unmeasured"] == (unmeasured,)
    others = {name: rate for name, rate in rates.items() if name != unmeasured}
    assert rates[unmeasured] == max(others.values())
    assert optimizer.state_dict()["param_groups"][0]["unmeasured"] == (unmeasured,)


def test_a_model_without_curvature_is_told():
    model = nn.Linear(3, 1).double()
    x = torch.ones(2, 3).double()
    loss = ht.Loss(outputs=lambda m, b: m(b), loss=lambda z, b: z.mean())
    problem = ht.Problem(model, loss, [x])
    optimizer = BlockwiseSGD(problem, ht.partition(model, "tensor"))
    with pytest.raises(ValueError, match="the Hessian of every one of 2 blocks is zero"):
        optimizer.measure()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"matrix": "fisher"}, "matrix is 'fisher'; one of hessian, gauss_newton is needed"),
        ({"refresh": 0}, "refresh is 0; a number of steps from 1, or None, is needed"),
        ({"momentum": 1.0}, "momentum is 1.0; from 0 to below 1"),
        ({"lr": -0.1}, "lr is -0.1; a number from 0"),
    ],
)
def test_numbers_out_of_range_are_told(options, told):
    model = net()
    with pytest.raises(ValueError, match=told):
        BlockwiseSGD(problem_of(model), ht.partition(model, "tensor"), **options)


def test_partitions_and_parameters_that_do_not_fit_are_told():
    model = net()
    problem = problem_of(model)
    with pytest.raises(ValueError, match=r"partition has 0 of the 6 entries of 0.bias in blocks"):
        BlockwiseSGD(problem, ht.partition(model, "weights"))
    whole = ht.partition(model, "tensor")
    with pytest.raises(ValueError, match=r"params holds 2 tensors, of which 0 are none"):
        BlockwiseSGD(problem, whole, params=model[0].parameters())
    foreign = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="lies in no trainable parameter of this model"):
        BlockwiseSGD(problem, ht.partition(foreign, "tensor"))
