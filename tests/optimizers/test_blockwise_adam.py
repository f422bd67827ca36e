"""Adam over a partition: identities with torch's optimizers, the rule step by step, and what a
torch optimizer must do."""

import copy

import numpy as np
import pytest
import torch
from problems import gpt, hf_gpt2, hf_llama, relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers import PRESETS, BlockwiseAdam, state_bytes
from hessian_tools.optimizers import adam_family as family


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def losses_of(model, seed=1):
    """Losses on fresh data, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        yield nn.functional.cross_entropy(model(x), y)


def trained(model, optimizer, steps=25, losses=None):
    for _, loss in zip(range(steps), losses or losses_of(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
def test_single_entries_are_adamw(betas, decay):
    options = {"lr": 3e-3, "betas": betas, "eps": 1e-8, "weight_decay": decay}
    one, other = net(), net()
    found = trained(one, BlockwiseAdam(one, ht.partition(one, "element"), **options))
    expected = trained(other, torch.optim.AdamW(other.parameters(), **options))
    assert relative_error(found, expected) < 1e-12


def test_entries_in_no_block_are_adams():
    one, other = net(), net()
    some = ht.partition(one, {"first": "0.weight"})
    found = BlockwiseAdam(one, some, lr=1e-2)
    trained(one, found, steps=1)
    trained(other, torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0), steps=1)
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    assert [name for (name, p), q in pairs if not torch.allclose(p, q, rtol=1e-12)] == ["0.weight"]


def test_without_second_moments_it_is_sgd_with_an_averaged_gradient():
    model, other = net(), net()
    groups = ht.param_groups(model, ht.partition(model, "tensor"))
    found = trained(model, BlockwiseAdam(groups, lr=0.1, adapt=False))
    means = [torch.zeros_like(p) for p in other.parameters()]
    for t, loss in zip(range(1, 26), losses_of(other), strict=False):
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for p, m, g in zip(other.parameters(), means, gradients, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                p.sub_(0.1 * m / (1 - 0.9**t))
    expected = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert relative_error(found, expected) < 1e-12


def by_rule(model, partition, losses, steps, lr, betas, eps, decay):
    """The rule in numpy, block by block."""
    b1, b2 = betas
    named = dict(model.named_parameters())
    m = {name: np.zeros(p.shape) for name, p in named.items()}
    v = {block.name: 0.0 for block in partition}
    for t, loss in zip(range(1, steps + 1), losses, strict=False):
        pieces = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients = dict(zip(named, pieces, strict=True))
        for name, p in named.items():
            if gradients[name] is None:
                continue
            m[name] = b1 * m[name] + (1 - b1) * gradients[name].numpy()
            p.data *= 1 - lr * decay
        for block in partition:
            cut = block.as_cut()
            g = cut.rows({n: gradients[n] for n in cut.parameters})[0]
            v[block.name] = b2 * v[block.name] + (1 - b2) * float((g**2).mean())
            size = np.sqrt(v[block.name]) / np.sqrt(1 - b2**t) + eps
            for part in cut.parts:
                mean = part.rows(torch.from_numpy(m[part.parameter]))
                rows = part.rows(named[part.parameter].data)
                part.place(rows - lr * mean / (1 - b1**t) / size, named[part.parameter].data)
    return torch.cat([p.detach().flatten() for p in named.values()])


def tokens_of(model):
    generator = torch.Generator().manual_seed(2)
    while True:
        t = torch.randint(11, (2, 7), generator=generator)
        yield ht.cross_entropy(model, (t[:, :-1], t[:, 1:]))


NETS = {"gpt": gpt, "hf-gpt2": hf_gpt2, "hf-llama": hf_llama}


@pytest.mark.parametrize("preset", ["adam_mini", "adalayer", "adalayer_star", "head", "layer"])
@pytest.mark.parametrize("name", NETS)
def test_every_partition_follows_the_rule(name, preset):
    torch.manual_seed(3)
    model = NETS[name]().double()
    other = copy.deepcopy(model)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = BlockwiseAdam(model, ht.partition(model, preset), weight_decay=0.1, **options)
    found = trained(model, optimizer, 6, tokens_of(model))
    partition = ht.partition(other, preset)
    expected = by_rule(other, partition, tokens_of(other), 6, decay=0.1, **options)
    # a model of transformers computes parts in float32
    assert relative_error(found, expected) < (1e-6 if name == "hf-llama" else 1e-12)


def test_names_of_llama_are_the_published_adam_mini():
    adam_mini = pytest.importorskip("adam_mini")
    torch.manual_seed(4)
    model = hf_llama()
    other = copy.deepcopy(model)
    config = model.config
    shape = {"dim": config.hidden_size, "n_heads": config.num_attention_heads}
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    published = adam_mini.Adam_mini(other.named_parameters(), **shape, **options)
    partition = ht.partition(model, "adam_mini_names")
    found = trained(model, BlockwiseAdam(model, partition, **options), 5, tokens_of(model))
    expected = trained(other, published, 5, tokens_of(other))
    assert relative_error(found, expected) < 1e-5


# ----------------------------------------------------------------------------------------- presets


def test_sgd_adalayer_adapts_the_last_layer_and_the_norms():
    model = gpt(tied=False)
    optimizer = family.sgd_adalayer(model, lr=0.5, adaptive_lr=1e-3)
    adapted = {n for g in optimizer.param_groups if g["adapt"] for n in g["names"]}
    plain = {n for g in optimizer.param_groups if not g["adapt"] for n in g["names"]}
    assert {g["lr"] for g in optimizer.param_groups if g["adapt"]} == {1e-3}
    assert all("norm" in name or "head" in name or "output" in name for name in adapted)
    assert "blocks.0.fc.weight" in plain
    last = family.sgd_adalayer(model, lr=0.5, norms=False)
    assert sum(g["adapt"] for g in last.param_groups) < sum(
        g["adapt"] for g in optimizer.param_groups
    )
    trained(model, optimizer, 2, tokens_of(model))
    held = [set(optimizer.state[p]) for g in optimizer.param_groups for p in g["params"]]
    assert {"step", "exp_avg"} in held and {"step", "exp_avg", "exp_avg_sq"} in held


def test_frozen_moments_are_means_and_stay():
    model = net()
    optimizer = family.frozen_adalayer(model, lr=1e-2, frozen_after=4, eps=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    squares = []
    for _, loss in zip(range(4), losses_of(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        squares.append([float(p.grad.square().mean()) for p in model.parameters()])
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    first = next(model.parameters())
    frozen = optimizer.state[first]["exp_avg_sq"].clone()
    assert float(frozen) == pytest.approx(np.mean([row[0] for row in squares]), rel=1e-12)
    norm = dict(model.named_parameters())["1.weight"]
    moving = optimizer.state[norm]["exp_avg_sq"].clone()
    trained(model, optimizer, 1)
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], frozen)
    assert not torch.equal(optimizer.state[norm]["exp_avg_sq"], moving)
    m = optimizer.state[first]["exp_avg"]
    moved = first.detach() - before[0]
    assert torch.allclose(moved, -1e-2 * m / (1 - 0.9**5) / frozen.sqrt(), rtol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_lowers_the_loss(name):
    torch.manual_seed(5)
    model = gpt(d=16)
    options = {"frozen_after": 5} if name == "frozen_adalayer" else {}
    rate = 0.3 if name.startswith("sgd") else 3e-2
    optimizer = PRESETS[name](model, rate, **options)
    t = torch.randint(11, (4, 7))
    first = ht.cross_entropy(model, (t[:, :-1], t[:, 1:])).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, (t[:, :-1], t[:, 1:]))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


# ------------------------------------------------------------------------------- a torch optimizer


def test_a_saved_state_goes_on_bit_by_bit(tmp_path):
    model = net()
    losses = losses_of(model)
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    trained(model, optimizer, 3, losses)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt")
    again = net()
    again.load_state_dict(weights)
    other = BlockwiseAdam(again, ht.partition(again, "neuron"), lr=5.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 1e-2
    one = trained(model, optimizer, 3, losses_of(model, 7))
    assert torch.equal(one, trained(again, other, 3, losses_of(again, 7)))


def test_schedulers_closures_and_scalers():
    model = net().float()
    optimizer = BlockwiseAdam(model, ht.partition(model, "adam_mini"), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    scaler = torch.amp.GradScaler("cpu")
    before = next(model.parameters()).detach().clone()
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(next(model.parameters()), before)


def test_scaled_losses_make_the_same_steps_and_overflow_makes_none():
    model, other = net().float(), net().float()
    optimizers = [BlockwiseAdam(m, ht.partition(m, "adam_mini"), lr=1e-2) for m in (model, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # a power of two rounds nothing
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(x), y)
            if m is other:
                loss.backward()
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert all(map(torch.equal, model.parameters(), other.parameters()))

    before = copy.deepcopy((model.state_dict(), optimizers[0].state_dict()))
    scaler.scale(nn.functional.cross_entropy(model(x), y) * torch.inf).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before[0][name]) for name, p in model.state_dict().items())
    for number, state in optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(state[key], before[1]["state"][number][key]) for key in state)


SCHEDULERS = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
    # moves betas as well
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=9
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_it_as_they_move_adamw(name):
    trajectories = []
    for is_ours in (True, False):
        model = net()
        options = {"lr": 1e-2, "weight_decay": 0.1}
        if is_ours:
            optimizer = BlockwiseAdam(model, ht.partition(model, "element"), **options)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), **options)
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(8):
            weights = trained(model, optimizer, 1)
            scheduler.step()
        trajectories.append(weights)
    assert relative_error(*trajectories) < 1e-12


def test_a_rate_may_be_a_tensor():
    one, other = net(), net()
    rate = torch.tensor(1e-2, dtype=torch.float64)
    found = trained(one, BlockwiseAdam(one, ht.partition(one, "adam_mini"), lr=rate), 4)
    expected = trained(other, BlockwiseAdam(other, ht.partition(other, "adam_mini"), lr=1e-2), 4)
    assert torch.equal(found, expected)


def test_closures_are_called_once_with_gradients_on():
    model, other = net(), net()
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = next(losses_of(model))
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == calls[0] and len(calls) == 1
    trained(other, BlockwiseAdam(other, ht.partition(other, "neuron"), lr=1e-2), 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_copy_goes_on_by_itself():
    model = net()
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    trained(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    one = trained(model, optimizer, 2, losses_of(model, 7))
    assert torch.equal(one, trained(other, copied, 2, losses_of(other, 7)))


def test_groups_that_come_later_say_their_blocks():
    model, head = net(), nn.Linear(3, 2).double()
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        optimizer.add_param_group({"params": list(head.parameters())})
    (weight, bias) = ht.param_groups(head, ht.partition(head, "neuron"))
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        optimizer.add_param_group({**bias, "lr": -1.0})
    optimizer.add_param_group(weight)
    optimizer.add_param_group({**bias, "lr": 0.0})
    before = copy.deepcopy(head)
    head(model(torch.randn(8, 4).double())).square().sum().backward()
    optimizer.step()
    assert optimizer.state[head.weight]["exp_avg_sq"].shape == (2,)
    assert not torch.equal(head.weight, before.weight)
    assert torch.equal(head.bias, before.bias)


def test_parameters_without_gradient_stay_and_others_go_on():
    model = net()
    optimizer = BlockwiseAdam(model, ht.partition(model, "tensor"), lr=1e-2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, *[False] * 5]
    trained(model, optimizer, 2)
    assert int(optimizer.state[model[0].weight]["step"]) == 3
    assert int(optimizer.state[model[3].weight]["step"]) == 2


def test_half_precision_keeps_moments_in_float32():
    model = net().to(torch.bfloat16)
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    nn.functional.cross_entropy(model(torch.randn(8, 4).bfloat16()), torch.arange(8) % 3).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].dtype == torch.float32
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    again = BlockwiseAdam(model, ht.partition(model, "neuron"))
    again.load_state_dict(optimizer.state_dict())  # torch would round it to bfloat16
    assert torch.equal(again.state[model[0].weight]["exp_avg_sq"], state["exp_avg_sq"])


def test_state_takes_what_the_partition_says():
    model = gpt(d=32)
    optimizer = BlockwiseAdam(model, ht.partition(model, "adam_mini"), lr=1e-3)
    assert state_bytes(optimizer).held == 0
    trained(model, optimizer, 1, tokens_of(model))
    adam = BlockwiseAdam(model, ht.partition(model, "element"), lr=1e-3)
    trained(model, adam, 1, tokens_of(model))
    assert 50 < state_bytes(optimizer).percent < 56
    assert state_bytes(adam).percent == pytest.approx(100, abs=1)
    assert "% of Adam's" in str(state_bytes(optimizer))


def test_denominators_are_what_steps_are_divided_by():
    model = net()
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2, betas=(0.0, 0.9))
    with pytest.raises(ValueError, match="take a step first"):
        optimizer.denominators()
    before = [p.detach().clone() for p in model.parameters()]
    trained(model, optimizer, 1)
    for p, old in zip(model.parameters(), before, strict=True):
        step = -1e-2 * p.grad / optimizer.denominators()[p]
        assert torch.allclose(p.detach() - old, step, atol=1e-15)


def test_curvature_can_be_seen_through_it():
    model = net()
    batch = torch.randn(8, 4).double(), torch.arange(8) % 3
    problem = ht.Problem(model, ht.cross_entropy, [batch])
    optimizer = BlockwiseAdam(model, ht.partition(model, "neuron"), lr=1e-2)
    trained(model, optimizer, 3)
    seen = ht.PreconditionedOperator(
        ht.GaussNewtonOperator(problem), ht.preconditioner_of(optimizer, problem)
    )
    p = torch.cat([optimizer.denominators()[p].flatten() for p in model.parameters()])
    root = p.rsqrt()
    expected = root[:, None] * ht.GaussNewtonOperator(problem).to_dense() * root
    assert relative_error(seen.to_dense(), expected) < 1e-13


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"eps": -1e-8}, "eps -1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); both must lie in \[0, 1\)"),
        ({"frozen_after": 0}, "frozen_after is 0"),
    ],
)
def test_numbers_out_of_range_are_told(options, told):
    model = net()
    with pytest.raises(ValueError, match=told):
        BlockwiseAdam(model, ht.partition(model, "tensor"), **options)


def test_other_misuses_are_told():
    model = net()
    with pytest.raises(ValueError, match="comes with the partition"):
        BlockwiseAdam(model)
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        BlockwiseAdam(model.parameters())
    with pytest.raises(ValueError, match="is that of a model"):
        BlockwiseAdam(ht.param_groups(model, ht.partition(model, "tensor")), ht.partition(model))
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = BlockwiseAdam(embedding, ht.partition(embedding, "tensor"))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="is sparse; BlockwiseAdam takes real dense"):
        optimizer.step()
    strided = nn.Linear(3, 4)
    strided.weight = nn.Parameter(torch.randn(3, 4).T)
    with pytest.raises(ValueError, match="not contiguous"):
        BlockwiseAdam(strided, ht.partition(strided, "neuron"))
