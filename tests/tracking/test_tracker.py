"""The tracker: its readings against dense Hessians, and that training does not notice it."""

import math

import numpy as np
import pytest
import torch
from problems import dense_hessian
from torch import nn

import hessian_tools as ht
from hessian_tools.tracking import MEASURES, Moment, Track
from hessian_tools.tracking.measures import rising_factor

EVERY_READING = tuple(MEASURES)
OF_SGD = tuple(name for name in MEASURES if name != "preconditioned_scale")


class Net(nn.Module):
    """With what a careless measurement would disturb: dropout, BatchNorm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def batches(count=3, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(10, 5, generator=generator, dtype=dtype),
            torch.randint(3, (10,), generator=generator),
        )
        for _ in range(count)
    ]


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return model, ht.Problem(model, ht.cross_entropy, batches(2, dtype=dtype))


def stepped(model, problem, optimizer):
    optimizer.zero_grad()
    loss = sum(
        weight * ht.cross_entropy(model, batch)
        for weight, batch in zip(problem.weights, problem.batches, strict=True)
    )
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def trained(tracked: bool, tmp_path=None):
    """Weights, buffers, losses and random numbers after a few steps with dropout."""
    torch.manual_seed(0)
    model = Net()
    model.eval()
    problem = ht.Problem(model, ht.cross_entropy, batches(1), batch_stats=False)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if tracked:
        tracker = ht.Tracker(problem, every=2, readings=EVERY_READING).attach(optimizer)
    torch.manual_seed(5)
    losses = []
    for batch in batches(6, seed=2):
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert model.training and model.drop.training
    if tracked:
        assert tracker.track.steps.tolist() == [0, 2, 4, 6]
    grads = [p.grad.clone() for p in model.parameters()]
    return [*model.state_dict().values(), *grads], losses, torch.rand(3)


def test_training_does_not_notice_it():
    (alone, losses, after), (watched, same, random) = trained(False), trained(True)
    assert losses == same and torch.equal(after, random)
    for one, other in zip(alone, watched, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------- the readings are right


@pytest.fixture
def followed():
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    tracker = ht.Tracker(problem, every=1, readings=OF_SGD, num_probes=64)
    tracker.attach(optimizer)
    for _ in range(3):
        stepped(model, problem, optimizer)
    return model, problem, tracker


def test_extremes_and_trace_are_those_of_the_dense_hessian(followed):
    _, problem, tracker = followed
    values = torch.linalg.eigvalsh(dense_hessian(problem))
    readings = {name: found[-1] for name, found in tracker.track.readings.items()}
    for name, exact in (("largest", values[-1]), ("smallest", values[0])):
        residual = readings[f"{name}_residual"]
        assert residual < 0.1 * values.abs().max()
        assert (values - readings[name]).abs().min() <= residual + 1e-9
        assert readings[name] == pytest.approx(float(exact), abs=residual + 1e-9)
    assert abs(readings["trace"] - float(values.sum())) < 4 * readings["trace_error"] + 1e-9


def test_the_loss_is_the_problems_own_after_every_step(followed):
    model, problem, tracker = followed
    losses = tracker.track.readings["loss"]
    assert losses[-1] == pytest.approx(ht.Problem(model, ht.cross_entropy, problem.batches).loss)
    assert len(losses) == 4 and len(set(losses)) == 4


def spread(model, hessian):
    """Of the weights' blocks of a dense matrix."""
    logs, start = [], 0
    for p in model.parameters():
        block = hessian[start : start + p.numel(), start : start + p.numel()]
        if p.ndim > 1:
            logs.append(0.5 * math.log10(float(block.square().sum()) / p.numel()))
        start += p.numel()
    return float(np.std(logs))


def test_the_spread_of_scales_is_that_of_the_dense_blocks(followed):
    model, problem, tracker = followed
    found = {name: values[-1] for name, values in tracker.track.readings.items()}
    # with so many probes small blocks are exact
    assert found["scale"] == pytest.approx(spread(model, dense_hessian(problem)), rel=1e-9)


def test_few_probes_give_an_interval():
    model, problem = plain()
    found = ht.Tracker(problem, readings=["scale"], num_probes=4).measure(0)
    assert found["scale_low"] < spread(model, dense_hessian(problem)) < found["scale_high"]


def test_sharpness_along_the_update():
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    tracker = ht.Tracker(problem, every=1, readings=["update_sharpness"]).attach(optimizer)
    assert len(tracker.track) == 1 and not tracker.track.readings
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    stepped(model, problem, optimizer)
    u = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    expected = float(u @ dense_hessian(problem) @ u / (u @ u))
    assert tracker.track.readings["update_sharpness"][-1] == pytest.approx(expected, rel=1e-9)


class Bowl(nn.Module):
    """L = w' diag(d) w / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        self.d = torch.tensor([3.0, 0.5], dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.d * self.w**2).sum() / 2


@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.9, 50.0])
def test_critical_sharpness_of_a_bowl_is_known(rate):
    """Of gradient descent, 2 / rate where L rises: g'Hg / g'g, from the weights before the step."""
    model = Bowl()
    problem = ht.Problem(
        model, lambda net, batch: net(batch[0]).mean(), [(torch.ones(2, dtype=torch.float64),)]
    )
    optimizer = torch.optim.SGD(model.parameters(), rate)
    tracker = ht.Tracker(problem, every=1, readings=["critical_sharpness"]).attach(optimizer)
    g = (model.d * model.w).detach()
    expected = float((g * model.d * g).sum() / (g * g).sum())
    optimizer.zero_grad()
    model(torch.ones(2, dtype=torch.float64)).mean().backward()
    optimizer.step()
    found = tracker.track.readings["critical_sharpness"][-1]
    assert found == pytest.approx(expected, rel=0.05)
    assert torch.equal(model.w.detach(), torch.tensor([[1.0, 2.0]]).double() - rate * g)


def test_a_loss_that_never_rises_or_does_at_once_has_no_critical_sharpness():
    class Falling:
        def loss(self, factor):
            return -factor

    class Rising:
        def loss(self, factor):
            return factor

    assert math.isnan(rising_factor(Falling())) and math.isnan(rising_factor(Rising()))


def test_readings_come_in_any_order():
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    names = ["largest", "critical_sharpness", "update_sharpness", "trace"]
    tracker = ht.Tracker(problem, every=1, readings=names).attach(optimizer)
    for _ in range(2):
        stepped(model, problem, optimizer)
    values = torch.linalg.eigvalsh(dense_hessian(problem))
    found = {name: row[-1] for name, row in tracker.track.readings.items()}
    assert abs(found["largest"] - float(values[-1])) <= found["largest_residual"] + 1e-9
    assert all(map(math.isfinite, found.values()))


def test_preconditioned_spread_is_that_of_the_scaled_hessian():
    model, problem = plain()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tracker = ht.Tracker(problem, every=2, readings=["preconditioned_scale"], num_probes=64)
    tracker.attach(optimizer)
    for _ in range(2):
        stepped(model, problem, optimizer)
    hessian = dense_hessian(problem)
    diagonal = ht.preconditioner_of(optimizer, problem).diagonal
    roots = torch.cat([d.reshape(-1).rsqrt() for d in diagonal.values()])
    scaled = roots[:, None] * hessian * roots
    found = {name: values[-1] for name, values in tracker.track.readings.items()}
    assert found["preconditioned_scale"] == pytest.approx(spread(model, scaled), rel=1e-9)


# ------------------------------------------------------------------------ when, and what is kept


def test_a_run_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "curvature.jsonl"
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = ht.Tracker(problem, every=2, journal=path).attach(optimizer)
    for _ in range(3):
        stepped(model, problem, optimizer)
    state = tracker.state_dict()
    assert tracker.steps == state["steps"] == 3
    tracker.detach()
    stepped(model, problem, optimizer)
    assert tracker.steps == 3

    again = ht.Tracker(problem, every=2, journal=path)
    again.load_state_dict(state)
    again.attach(optimizer)
    stepped(model, problem, optimizer)
    assert again.track.steps.tolist() == [0, 2, 4]
    read = Track.read(path)
    assert read.steps.tolist() == [0, 2, 4] and set(read.readings) == set(again.track.readings)
    np.testing.assert_array_equal(read.readings["scale"], again.track.readings["scale"])
    assert again.measure(2)["scale"] == read.readings["scale"][1]  # known, not taken again
    loaded = ht.load(ht.save(read, tmp_path / "track"))
    np.testing.assert_array_equal(loaded.steps, read.steps)
    assert str(loaded) == str(read) and str(read).splitlines()[2].split()[0] == "0"


def test_what_would_cost_too_much_is_left_out():
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = ht.Tracker(problem, every=1, budget=1e-6).attach(optimizer)
    for _ in range(4):
        stepped(model, problem, optimizer)
    assert tracker.track.steps.tolist() == [0] and tracker.skipped == 4
    free = ht.Tracker(problem, every=1, budget=1.0).attach(optimizer)
    stepped(model, problem, optimizer)
    assert free.skipped <= 1


def test_a_measurement_that_fails_stops_no_training():
    model, problem = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tracker = ht.Tracker(problem, every=1, readings=OF_SGD).attach(optimizer)
    stepped(model, problem, optimizer)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.warns(UserWarning, match="step 2 was not measured"):
        stepped(model, problem, optimizer)
    stepped(model, problem, optimizer)  # once is enough
    assert tracker.steps == 3 and len(tracker.notes) == 2
    assert tracker.track.steps.tolist() == [0, 1]
    with pytest.raises(Exception, match="NaN"):
        tracker.measure(9)  # asked for by hand, it is told


def test_an_own_reading_is_one_entry(monkeypatch):
    def twice(moment: Moment) -> dict[str, float]:
        return {"twice": 2 * moment.loss()}

    entry = type(MEASURES["scale"])("twice the loss", twice, "1")
    monkeypatch.setitem(MEASURES, "twice", entry)
    _, problem = plain()
    found = ht.Tracker(problem, readings=["twice"]).measure(0)
    assert found["twice"] == pytest.approx(2 * problem.loss)


def test_gradients_need_not_be_enabled():
    _, problem = plain()
    with torch.no_grad():
        assert ht.Tracker(problem).measure(0)["largest"] > 0
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"num_probes": 1}, "at least 2"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"readings": ["sharp"]}, "'sharp'; choose one or more of loss, largest"),
        ({"readings": []}, "empty; choose"),
    ],
)
def test_bad_arguments(options, words):
    _, problem = plain()
    with pytest.raises(ValueError, match=words):
        ht.Tracker(problem, **options)


def test_an_optimizer_of_another_model_is_refused():
    _, problem = plain()
    with pytest.raises(ValueError, match="none of the Problem's parameters"):
        ht.Tracker(problem).attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    with pytest.raises(TypeError, match="curvature is a Linear"):
        ht.Tracker(nn.Linear(2, 2))
    model, problem = plain()
    tracker = ht.Tracker(problem).attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="is attached"):
        tracker.attach(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match="optimizer is a SGD, whose preconditioner is not known"):
        ht.Tracker(problem, readings=["preconditioned_scale"]).attach(
            torch.optim.SGD(model.parameters(), 0.1)
        )
    with pytest.raises(ValueError, match="compares blocks, and there are 1"):
        ht.Tracker(problem, blocks=ht.partition(model, "model"))
    with pytest.raises(FileNotFoundError, match="no journal"):
        Track.read("nowhere.jsonl")
