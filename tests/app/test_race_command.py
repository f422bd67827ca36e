"""The command line's races: tables, JSON, pictures, resumed runs, bad input."""

import json
import sys

import pytest
import torch
from problems.command_line import run

from hessian_tools.app import race_command
from hessian_tools.plots import training as plotting
from hessian_tools.training.runs import Runs

OWN = """
import torch
from torch import nn
import hessian_tools as ht

print("a model's noise")

def net():
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, ht.cross_entropy, [(torch.randn(20, 6), torch.randint(3, (20,))) for _ in range(3)]

def physics():
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def residual(model, batch):
        x = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - torch.cos(x)).square().mean()

    return model, residual, [torch.linspace(0, 3, 16)[:, None]]

def ragged():
    model = nn.Linear(2, 1)
    loss = lambda model, batch: model(batch["x"]).square().mean() + 0 * batch["y"].sum()
    batches = [{"x": torch.randn(n, 2), "y": torch.randn(3)} for n in (4, 5, 6)]
    return ht.Problem(model, loss, batches, num_examples=lambda batch: len(batch["x"]))
"""
SHORT = ("--optimizers", "sgd", "adam", "--budget", "64steps")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A folder with own.py, to work in."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def said(capsys):
    def command(*arguments):
        code = run("race", *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_a_race_on_ones_own_model(said, tmp_path):
    code, out, err = said("--model", "own.py:net", *SHORT, "--out", tmp_path / "out")
    assert code == 0 and "noise" not in out and "noise" in err
    lines = out.splitlines()
    assert lines[0].startswith("own.py:net (123 parameters, 54 examples of its own); runs took ")
    assert {line.split()[0] for line in lines[3:5]} == {"sgd", "adam"}
    assert "a longer run, with other rates, may turn" in out and "--seeds 3" in out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"curves.png", "rates.png"}
    assert files == pictures | {
        "commands.json",
        "config.json",
        "result.json",
        "result.npz",
        "table.txt",
    }


def test_json_has_the_numbers_and_a_finished_race_is_only_read(said, tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "draw", lambda *_: [])
    command = ("--model", "own.py:net", *SHORT, "--batch-sizes", "4", "20", "--seeds", "2")
    command += ("--out", tmp_path / "out", "--json")
    code, out, _ = said(*command)
    numbers = json.loads(out)
    assert code == 0 and numbers["seeds"] == [0, 1] and len(numbers["entries"]) == 4
    assert [entry["batch_size"] for entry in numbers["entries"]] == [4, 4, 20, 20]
    assert all(len(entry["losses"]) == 2 and entry["steps"] == 64 for entry in numbers["entries"])
    monkeypatch.setattr(race_command, "race", None)
    code, again, err = said(*command)
    assert code == 0 and again == out and "finished before" in err


def test_seeds_are_of_initialisation_too(said):
    command = ("--model", "own.py:net", "--optimizers", "sgd", "--budget", "64steps", "--json")
    entries = {}
    for seed, seeds in ((0, 2), (1, 1)):
        _, out, _ = said(*command, "--seed", seed, "--seeds", seeds)
        (entries[seed],) = json.loads(out)["entries"]
    assert entries[0]["losses"][0] != entries[0]["losses"][1]


def test_an_interrupted_race_goes_on(said, tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "draw", lambda *_: [])
    command = ("--model", "own.py:net", *SHORT, "--json")
    trained = Runs._trained
    names = []

    def interrupted(self, setting, *rest):
        names.append(setting.name)
        if len(names) == 15:
            raise KeyboardInterrupt
        return trained(self, setting, *rest)

    _, whole, _ = said(*command)
    monkeypatch.setattr(Runs, "_trained", interrupted)
    code, out, err = said(*command, "--out", tmp_path / "out")
    assert code == 130 and not out and "the same command goes on" in err
    code, resumed, _ = said(*command, "--out", tmp_path / "out")
    assert code == 0 and len(names) == len(set(names)) + 1
    one, other = (
        [(entry["rate"], entry["loss"]) for entry in json.loads(text)["entries"]]
        for text in (whole, resumed)
    )
    assert one == other


def test_a_problem_without_outputs_and_one_that_cannot_be_cut(said):
    code, out, _ = said("--model", "own.py:physics", *SHORT)
    assert code == 0 and "15 examples of its own" in out
    code, out, _ = said("--model", "own.py:ragged", *SHORT)
    assert code == 0 and "3 batches of its own, taken as they are" in out and "as given" in out


def test_a_model_of_the_zoo_on_the_whole_corpus(said):
    code, out, _ = said("--model", "mlp", "--optimizers", "sgd", "--budget", "64steps")
    assert code == 0
    assert "mlp (335,114 parameters, 3600 images of the packaged Fashion-MNIST)" in out


def test_z_loss_and_schedule_are_passed_on(said, monkeypatch):
    asked = {}

    def race(*arguments, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(race_command, "race", race)
    said("--model", "own.py:net", "--z-loss", "1e-4", "--schedule", "linear", "--clip", "0.5")
    assert asked["z_loss"] == 1e-4 and asked["clip"] == 0.5
    assert asked["schedule"](63, 64) == 0 and asked["seeds"] == range(1)
    assert str(asked["budget"]) == "300 seconds"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt3"], "model 'gpt3' is not in the zoo; did you mean"),
        (
            ["--model", "mlp", "--budget", "5"],
            "a budget is steps or time, such as 500steps, 90s or 5min, got '5'",
        ),
        (
            ["--model", "own.py:net", "--budget", "9steps"],
            "a budget of 9 steps makes runs of 9 steps, and 64 are needed",
        ),
        (["--model", "own.py:net", "--context", "9"], "--context does not apply to own.py:net"),
        (["--model", "own.py:net", "--optimizers", "adem"], "invalid choice: 'adem'"),
        (["--model", "own.py:net", "--optimizers", "sgd", "sgd"], "optimizers has sgd twice"),
        (["--model", "own.py:ragged", "--batch-sizes", "2"], "batch_size 2 cannot be had"),
        (
            ["--model", "own.py:physics", "--z-loss", "1e-4"],
            "z-loss needs the logits of a classifier, and residual",
        ),
        (["--model", "own.py:net", "--clip", "0"], "'0' is not a positive number"),
        (["--optimizers", "sgd"], "the following arguments are required: --model"),
    ],
)
def test_bad_input_is_one_line(said, options, words):
    code, out, err = said(*options)
    lines = [line for line in err.splitlines() if "noise" not in line]
    assert code == 2 and not out and len(lines) == 1 and words in lines[0]
