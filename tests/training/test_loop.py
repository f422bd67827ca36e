"""Training runs: determinism, resumption bit by bit, divergence, what is recorded."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from problems.trained import Bowl, bowl_stream, classifier, points

import hessian_tools as ht
from hessian_tools.optimizers.named import make
from hessian_tools.optimizers.state import held_bytes
from hessian_tools.problem import zoo
from hessian_tools.training import Stream, constant, cosine, train, zoo_stream
from hessian_tools.training.loop import FAR_ABOVE_STEPS
from hessian_tools.training.sources import Examples

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stream(batch_size=8, loss_fn=ht.cross_entropy):
    return Stream(Examples(points()), batch_size, loss_fn)


def trained(stream, steps=40, **options):
    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    return train(model, stream, optimizer, budget=steps, **options)


def same(one, other):
    names = ("losses", "learning_rates", "gradient_norms", "validation_steps", "validation_losses")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


class Killed(Exception):
    pass


class Deadly(Stream):
    """A stream that ends the process, so to speak, at step 23."""

    def batch(self, step):
        if step == 23:
            raise Killed
        return super().batch(step)


def test_a_run_is_deterministic_and_recorded():
    run = trained(stream())
    assert same(run, trained(stream())) and not same(run, trained(stream().with_seed(1)))
    assert run.steps == run.num_steps == 40 and not run.diverged and not run.stopped
    assert run.validation_steps.tolist() == [8, 16, 24, 32, 40]
    np.testing.assert_allclose(run.learning_rates, [0.02 * cosine(s, 40) for s in range(40)])
    assert run.final == run.losses[-4:].mean() < run.losses[0] / 2
    assert run.final_validation == run.validation_losses[-1]
    assert run.seconds > 0 and run.seconds_a_step == run.seconds / 40


@pytest.mark.parametrize("save_every", [0.0, 1e-4])
def test_a_killed_run_goes_on_bit_by_bit(save_every, tmp_path):
    """With dropout, whose random numbers have to go on as well."""
    whole = trained(stream())
    state = tmp_path / "state.pt"
    deadly = Deadly(Examples(points()), 8, ht.cross_entropy)
    with pytest.raises(Killed):
        trained(deadly, checkpoint=state, key="a", save_every=save_every)
    assert state.exists()
    torch.rand(100)
    resumed = trained(stream(), checkpoint=state, key="a")
    assert same(whole, resumed) and not state.exists()


def test_the_state_of_another_run_is_passed_over(tmp_path):
    state = tmp_path / "state.pt"
    deadly = Deadly(Examples(points()), 8, ht.cross_entropy)
    with pytest.raises(Killed):
        trained(deadly, checkpoint=state, key="a", save_every=0)
    assert same(trained(stream(), checkpoint=state, key="b"), trained(stream()))


def test_a_state_that_does_not_fit_or_is_damaged(tmp_path):
    state = tmp_path / "state.pt"
    deadly = Deadly(Examples(points()), 8, ht.cross_entropy)
    with pytest.raises(Killed):
        trained(deadly, checkpoint=state, save_every=0)
    model = Bowl()
    with pytest.raises(ValueError, match="holds the state of another model or optimizer"):
        train(model, bowl_stream(), torch.optim.SGD(model.parameters(), 1), checkpoint=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no state of a training run, or is damaged; delete it"):
        trained(stream(), checkpoint=state)


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np, torch
from hessian_tools.optimizers.named import make
from hessian_tools.problem import zoo
from hessian_tools.training import Stream, train, zoo_stream

class Slow(Stream):
    def batch(self, step):
        time.sleep(0.03)
        return super().batch(step)

torch.set_num_threads(1)
model = zoo.load("mlp").model
stream = zoo_stream("mlp", batch_size=8)
slow = Slow(stream.source, 8, stream.loss_fn)
run = train(model, slow, make("adam", model, 1e-3), budget=60, checkpoint=Path(sys.argv[1]), save_every=0.1)
np.save(sys.argv[2], run.losses)
"""


def test_a_process_that_is_killed_goes_on_bit_by_bit(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(losses):
        command = [sys.executable, "run.py", "state.pt", losses]
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    killed = start("killed.npy")
    deadline = time.monotonic() + 60
    while not (tmp_path / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.npy").exists()
    assert start("resumed.npy").wait(60) == 0
    model = zoo.load("mlp").model
    optimizer = make("adam", model, 1e-3)
    whole = train(model, zoo_stream("mlp", batch_size=8), optimizer, budget=60)
    assert np.array_equal(whole.losses, np.load(tmp_path / "resumed.npy"))


def bowl(rate, steps=100, **options):
    model = Bowl()
    options = {"schedule": constant, "clip": None, **options}
    return train(
        model, bowl_stream(), torch.optim.SGD(model.parameters(), rate), budget=steps, **options
    )


def test_a_bowl_follows_its_closed_form():
    run = bowl(0.1)
    np.testing.assert_allclose(run.losses, 0.9 ** (2 * np.arange(100)))
    np.testing.assert_allclose(run.gradient_norms, math.sqrt(2) * 0.9 ** np.arange(100))
    assert len(run.validation_losses) == 0 and math.isnan(run.final_validation)
    smooth = run.smoothed()
    assert smooth[0] == run.losses[0] and smooth[50] == pytest.approx(run.losses[46:51].mean())
    assert run.steps_to(run.losses[30]) == 34 and run.steps_to(0) is None


def test_divergence_is_flagged():
    slowly = bowl(2.001, steps=2000)
    assert slowly.diverged and slowly.losses[-FAR_ABOVE_STEPS:].min() > 3 and slowly.steps < 2000
    assert slowly.final == math.inf == slowly.final_validation
    at_once = bowl(1e200)
    assert at_once.diverged and at_once.steps < 5
    assert not bowl(1.999).diverged
    nan = trained(stream(loss_fn=lambda model, batch: ht.cross_entropy(model, batch) * math.nan))
    assert nan.diverged and nan.steps == 1


def test_gradients_are_clipped_to_the_norm():
    run = bowl(0.1, steps=3, clip=0.5)
    step = 0.05 / math.sqrt(2)
    np.testing.assert_allclose(run.losses, [(1 - step * t) ** 2 for t in range(3)], rtol=1e-5)
    assert run.gradient_norms[0] == pytest.approx(math.sqrt(2))


def test_z_loss_is_minimised_and_not_recorded():
    model = classifier().eval()
    batch = stream().batch(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = train(model, stream(), optimizer, budget=1, z_loss=1.0)
    assert run.losses[0] == float(ht.cross_entropy(model, batch).detach())
    assert run.gradient_norms[0] != train(model, stream(), optimizer, budget=1).gradient_norms[0]


def test_a_run_can_be_given_up():
    run = bowl(0.1, give_up=lambda steps, losses: steps == 7)
    assert run.stopped and run.steps == 7 and run.num_steps == 100 and math.isfinite(run.final)


def test_a_budget_in_seconds_becomes_steps_and_changes_nothing_else():
    model = classifier()
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), 0.0)
    run = train(model, stream(), optimizer, budget="0.2s", validate_every=0)
    assert run.num_steps == run.steps > 10 and 0.02 < run.seconds < 2
    assert all(map(torch.equal, before, model.parameters()))


def test_bytes_of_state():
    model = classifier()
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    assert held_bytes(optimizer) == 0
    train(model, stream(), optimizer, budget=1)
    tensors = len(list(model.parameters()))
    assert held_bytes(optimizer) == 8 * count + 4 * tensors


def test_a_trajectory_is_saved_and_loaded(tmp_path):
    run = trained(stream(), 5)
    loaded = ht.load(ht.save(run, tmp_path / "run"))
    assert same(run, loaded) and loaded.seconds == run.seconds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0}, "clip must be a positive norm, or None"),
        ({"validate_every": -1}, "validate_every must be 0 .never. or more steps, got -1"),
        ({"save_every": -1}, "save_every must be 0 seconds or more"),
        ({"steps": "1 year"}, "a budget is steps or time, such as 500steps"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        trained(stream(), **options)
