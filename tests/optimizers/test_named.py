"""The registry: what each name makes, step by step against the rules in numpy, and its errors."""

import copy
import sys

import numpy as np
import pytest
import torch
from problems import gpt, hf_gpt2, relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.optimizers.adam_family import PRESETS
from hessian_tools.optimizers.muon import muon_with_adamw
from hessian_tools.optimizers.named import OPTIMIZERS, make

STEPS = 25


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def losses(model):
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        yield nn.functional.cross_entropy(model(x), y)


def trained(model, optimizer, steps=STEPS):
    for _, loss in zip(range(steps), losses(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_rule(model, update):
    """``update(state, w, g, t)`` in numpy, in place, for every tensor."""
    parameters = list(model.parameters())
    states = [{} for _ in parameters]
    for t, loss in zip(range(1, STEPS + 1), losses(model), strict=False):
        found = torch.autograd.grad(loss, parameters)
        for p, g, state in zip(parameters, found, states, strict=True):
            update(state, p.detach().numpy(), g.numpy(), t)
    return flat(model)


# --------------------------------------------------------------------------------------- the rules


def heavy_ball(s, w, g, t):
    s["m"] = 0.8 * s.get("m", 0) + g + 0.1 * w
    w -= 1e-2 * s["m"]


def nesterov(s, w, g, t):
    s["m"] = 0.8 * s.get("m", 0) + g
    w -= 1e-2 * (g + 0.8 * s["m"])


def adam(s, w, g, t):
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    s["v"] = 0.95 * s.get("v", 0) + 0.05 * g**2
    w -= 1e-2 * s["m"] / (1 - 0.8**t) / (np.sqrt(s["v"] / (1 - 0.95**t)) + 1e-15)


def adamw(s, w, g, t):
    w *= 1 - 1e-2 * 0.1
    adam(s, w, g, t)


def adagrad(s, w, g, t):
    s["v"] = s.get("v", 0) + g**2
    w -= 1e-2 * g / (np.sqrt(s["v"]) + 1e-10)


def signum(s, w, g, t):
    w *= 1 - 1e-2 * 0.1
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    w -= 1e-2 * np.sign(s["m"])


def lion(s, w, g, t):
    w *= 1 - 1e-2 * 0.1
    m = s.get("m", np.zeros_like(g))
    w -= 1e-2 * np.sign(0.8 * m + 0.2 * g)
    s["m"] = 0.95 * m + 0.05 * g


RULES = {
    "sgd": (heavy_ball, {"weight_decay": 0.1}),
    "sgd_nesterov": (nesterov, {}),
    "adam": (adam, {}),
    "adamw": (adamw, {"weight_decay": 0.1}),
    "adagrad": (adagrad, {}),
    "signum": (signum, {"weight_decay": 0.1}),
    "lion": (lion, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_name_is_its_rule(name):
    need_library(name)
    rule, options = RULES[name]
    if OPTIMIZERS[name].betas:
        options = options | {"momentum": 0.8}
    model, other = net(), net()
    found = trained(model, make(name, model, 1e-2, **options))
    assert relative_error(found, by_rule(other, rule)) < 1e-12


def soap(s, w, g, t):
    """Algorithm 3 of arXiv 2409.11321 with f = 3; the first step only sets L, R and bases up."""
    lr, b1, b2, eps, f = 1e-2, 0.95, 0.95, 1e-8, 3
    matrix = g.ndim > 1
    if t == 1:
        s["m"], s["v"] = np.zeros_like(g), np.zeros_like(g)
        if matrix:
            s["L"], s["R"] = 0.05 * g @ g.T, 0.05 * g.T @ g
            s["Q"] = [np.linalg.eigh(a)[1][:, ::-1] for a in (s["L"], s["R"])]
        return
    left, right = s["Q"] if matrix else (None, None)
    s["m"] = b1 * s["m"] + (1 - b1) * g
    turned, mean = (left.T @ x @ right if matrix else x for x in (g, s["m"]))
    s["v"] = b2 * s["v"] + (1 - b2) * turned**2
    step = mean / (np.sqrt(s["v"]) + eps)
    rate = lr * np.sqrt(1 - b2 ** (t - 1)) / (1 - b1 ** (t - 1))
    w -= rate * (left @ step @ right.T if matrix else step)
    if not matrix:
        return
    s["L"] = b2 * s["L"] + (1 - b2) * g @ g.T
    s["R"] = b2 * s["R"] + (1 - b2) * g.T @ g
    if (t - 1) % f == 0:
        s["Q"], s["v"] = refreshed(s)


def refreshed(s):
    """One power iteration and QR, in float32 as the authors do, columns in order of eigenvalues."""
    bases, v = [], s["v"]
    for axis, (factor, q) in enumerate(zip((s["L"], s["R"]), s["Q"], strict=True)):
        order = np.argsort(-np.diag(q.T @ factor @ q), kind="stable")
        v = np.take(v, order, axis=axis)
        turned, _ = np.linalg.qr((factor @ q[:, order]).astype(np.float32))
        bases.append(turned.astype(np.float64))
    return bases, v


def soap_by_both(shape, turn=None):
    """Steps on random gradients by the library and by the rule; ``turn`` its bases after step 1."""
    need_library("soap")
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0]).double()
    weights = [p.detach().numpy().copy() for p in model.parameters()]
    optimizer = make("soap", model, 1e-2, precondition_frequency=3)
    states = [{}, {}]
    generator = torch.Generator().manual_seed(2)
    for t in range(1, STEPS + 1):
        for p, w, state in zip(model.parameters(), weights, states, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            soap(state, w, p.grad.numpy(), t)
        if turn and t == 1:
            turn(states[0])
        optimizer.step()
    return flat(model), torch.from_numpy(np.concatenate([w.ravel() for w in weights]))


def test_soap_is_the_rule():
    """Of full rank, where eigenvectors are what they are; to float32, which its bases are of."""
    found, expected = soap_by_both((6, 6))
    assert relative_error(found, expected) < 1e-7


def test_soap_is_not_determined_where_the_first_gradient_has_a_null_space():
    """Any basis of it has the eigenvalue zero, and Adam in it differs; libraries take LAPACK's."""

    def turned(state):
        null = slice(3, 6)  # of R, whose rank is 3
        mixing, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
        state["Q"][1] = np.hstack([state["Q"][1][:, :3], state["Q"][1][:, null] @ mixing])

    _, expected = soap_by_both((3, 6))
    _, other = soap_by_both((3, 6), turned)
    assert 1e-3 < relative_error(other, expected) < 0.1


def test_signum_and_lion_are_lion_pytorchs():
    need_library("lion")
    lion_pytorch = pytest.importorskip("lion_pytorch")
    for name, betas in (("signum", (0.9, 0.9)), ("lion", (0.9, 0.95))):
        model, other = net(), net()
        found = trained(model, make(name, model, 1e-3, weight_decay=0.1))
        theirs = lion_pytorch.Lion(other.parameters(), 1e-3, betas, weight_decay=0.1)
        assert relative_error(found, trained(other, theirs)) < 1e-12


def test_shampoo_and_shampoo2_differ_in_power():
    for name, power in (("shampoo", 0.25), ("shampoo2", 0.5)):
        (group,) = make(name, net(), frequency=7).param_groups
        assert (group["power"], group["frequency"], group["betas"]) == (power, 7, (0.9, 0.95))


@pytest.mark.parametrize("name", ["adam_mini", "adalayer", "adalayer_star", "sgd_adalayer"])
def test_the_family_is_that_of_blockwise_adam(name):
    models = [gpt(tied=False).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    betas = (0.8, OPTIMIZERS[name].betas[1])
    pair = (make(name, models[0], 1e-2, momentum=0.8), PRESETS[name](models[1], 1e-2, betas=betas))
    tokens = torch.randint(11, (4, 7))
    for model, optimizer in zip(models, pair, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            ht.cross_entropy(model, (tokens[:, :-1], tokens[:, 1:])).backward()
            optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


# -------------------------------------------------------------------------------------------- Muon


def test_muon_and_adamw_are_torchs_on_their_own_parts():
    model = gpt(tied=False).double()
    other = copy.deepcopy(model)
    optimizer = make("muon", model, 1e-2, weight_decay=0.1)
    inside = [p for n, p in other.named_parameters() if is_inside(n) and p.ndim == 2]
    outside = [p for n, p in other.named_parameters() if not (is_inside(n) and p.ndim == 2)]
    pair = (
        torch.optim.Muon(inside, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, 1e-2, (0.9, 0.95), weight_decay=0.1),
    )
    tokens = torch.randint(11, (4, 7))
    for _ in range(STEPS):
        for one in (model, other):
            one.zero_grad()
            ht.cross_entropy(one, (tokens[:, :-1], tokens[:, 1:])).backward()
        optimizer.step()
        for part in pair:
            part.step()
    assert torch.equal(flat(model), flat(other))


def is_inside(name):
    return name.startswith("blocks.")


def test_muon_knows_layers_by_what_they_do():
    model = hf_gpt2()
    optimizer = make("muon", model)
    names = {p: name for name, p in model.named_parameters()}
    by_part = {g["optimizer"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}
    expected = {name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    assert by_part["muon"] == expected
    assert by_part["adamw"] == set(names.values()) - expected


def test_muons_rates_go_by_one_schedule_and_one_state():
    model = gpt(tied=False)
    optimizer = muon_with_adamw(model, 1e-2, adam_lr=1e-3)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 1))
    tokens = torch.randint(11, (4, 7))

    def step():
        ht.cross_entropy(model, (tokens[:, :-1], tokens[:, 1:])).backward()
        optimizer.step()
        scheduler.step()
        return flat(model)

    first = step()
    assert set(optimizer.state) == set(model.parameters())
    assert torch.equal(step(), first)
    with pytest.raises(ValueError, match="optimizer is None; one of muon, adamw is needed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    with pytest.raises(ValueError, match="no trainable matrix for Muon"):
        make("muon", nn.Linear(3, 2))


# -------------------------------------------------------------------------------------- every name


def need_library(name):
    if OPTIMIZERS[name].extra:
        pytest.importorskip("pytorch_optimizer", reason="pip install 'hessian_tools[training]'")


# rates published for larger models, or for none, are too high for this one
RATES = {"sgd": 0.03, "sgd_nesterov": 0.03, "sgd_adalayer": 0.1}


def started(name):
    """A model, its loss, and its optimizer."""
    torch.manual_seed(6)
    model = gpt(d=16, tied=False)
    tokens = torch.randint(11, (4, 7))
    batch = tokens[:, :-1], tokens[:, 1:]
    problem = ht.Problem(model, ht.cross_entropy, [batch])
    options = {"frozen_after": 2} if name == "frozen_adalayer" else {}
    if name.startswith("blockwise"):
        options["partition"] = ht.partition(model, "tensor")
    return model, batch, make(name, problem, RATES.get(name), **options)


def stepped(model, batch, optimizer, count, scheduler=None):
    found = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_trains_and_a_saved_run_goes_on_bit_for_bit(name, tmp_path):
    need_library(name)
    model, batch, optimizer = started(name)
    assert optimizer.param_groups[0]["lr"] == RATES.get(name, OPTIMIZERS[name].lr)
    first = stepped(model, batch, optimizer, 12)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again, _, other = started(name)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state"))
    last = stepped(model, batch, optimizer, 6)
    assert last == stepped(again, batch, other, 6)
    assert torch.equal(flat(model), flat(again))
    assert last[-1] < first[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_acts_on_every_group(name):
    need_library(name)
    model, batch, optimizer = started(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 4))
    stepped(model, batch, optimizer, 4, scheduler)
    assert all(group["lr"] == 0 for group in optimizer.param_groups)
    before = flat(model)
    stepped(model, batch, optimizer, 2)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_entries_say_what_a_sweep_needs(name):
    entry = OPTIMIZERS[name]
    assert entry.name == name and entry.line and entry.source
    assert entry.grid[0] < entry.lr <= entry.grid[-1]
    steps = np.diff(np.log10(entry.grid))
    assert np.allclose(steps, 0.5)
    assert bool(entry.extra) == (name in {"signum", "lion", "soap"})


def test_frozen_parameters_are_left_out():
    for name in ("sgd", "adafactor", "shampoo", "adalayer"):
        model = net()
        model[0].requires_grad_(False)
        held = [p for group in make(name, model).param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model[2].parameters()}


# ------------------------------------------------------------------------------------------ errors


def test_an_unknown_name_lists_all():
    with pytest.raises(ValueError, match="no optimizer is named 'adamm'") as caught:
        make("adamm", net())
    assert all(name in str(caught.value) for name in OPTIMIZERS)


@pytest.mark.parametrize("name", ["signum", "lion", "soap"])
def test_a_missing_library_is_told(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=rf"{name} is .*pip install 'hessian_tools\[training\]'"):
        make(name, net())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "blockwise_sgd"])
def test_options_that_it_has_not_are_told(name):
    need_library(name)
    model = gpt(tied=False)
    options = {"partition": ht.partition(model, "tensor")} if "blockwise" in name else {}
    with pytest.raises(TypeError, match="momentun"):
        make(name, model, momentun=0.9, **options)


def test_what_does_not_go_together_is_told():
    model = net()
    partition = ht.partition(model, "tensor")
    takers = "blockwise_sgd, blockwise_adam, adam_mini have"
    with pytest.raises(ValueError, match=f"sgd has no blocks to take from partition; {takers}"):
        make("sgd", model, partition=partition)
    with pytest.raises(ValueError, match=r"momentum is 0.9, and adagrad has none"):
        make("adagrad", model, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum is 0.9 and betas \(0.8, 0.9\)"):
        make("adamw", model, momentum=0.9, betas=(0.8, 0.9))
    with pytest.raises(ValueError, match="pass a Problem in place of the model"):
        make("blockwise_sgd", model, partition=partition)
    with pytest.raises(ValueError, match="blockwise_adam needs partition="):
        make("blockwise_adam", model)
    with pytest.raises(TypeError, match="model_or_problem is a list"):
        make("sgd", list(model.parameters()))
