"""``--matrix``: which matrix js0, spectrum and partition are of, in words, pictures and files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from problems import dense_gauss_newton
from problems.command_line import run

import hessian_tools as ht
from hessian_tools.app.models import user_model

OWN = """
import torch
from torch import nn
import hessian_tools as ht

def problem():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return ht.Problem(model, ht.cross_entropy, [(torch.randn(9, 4).double(), torch.arange(9) % 3)])

def one_function():
    given = problem()
    return given.model, lambda model, batch: ht.cross_entropy(model, batch), given.batches
"""
TITLES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
}
SMALL = ("--blocks", "tensor", "--probes", "1", "--steps", "2", "--exact", "100")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def test_spectra_are_those_of_the_matrix(capsys):
    command = ("js0", "--model", "own.py:problem", "--matrix", "ggn", "--json", *SMALL)
    assert run(*command) == 0
    out, err = capsys.readouterr()
    assert "finite difference of the outputs" in err
    assert "Gauss-Newton matrix-vector products for 4 block(s)" in err
    found = json.loads(out)["own.py:problem"]
    assert found["matrix"] == "Gauss-Newton matrix"
    assert any("readings of the Gauss-Newton matrix" in note for note in found["notes"])
    problem, _ = user_model.problem_from("own.py:problem")
    dense = dense_gauss_newton(problem)
    first = 0
    for block in found["blocks"]:
        rows = slice(first, first + block["size"])
        largest = float(torch.linalg.eigvalsh(dense[rows, rows])[-1])
        assert block["largest"] == pytest.approx(largest, rel=1e-10)
        first += block["size"]


@pytest.mark.parametrize("matrix", TITLES)
def test_results_and_pictures_say_which_matrix(matrix, capsys):
    arguments = ("spectrum", "--model", "own.py:problem", "--matrix", matrix, *SMALL[:6])
    assert run(*arguments, "--out", "out") == 0
    assert ht.load("out/result")["spectra"].curvature == TITLES[matrix]
    config = json.loads(Path("out/config.json").read_text())
    # runs of the Hessian are resumed by what they were begun with
    assert config.get("matrix", "hessian") == matrix
    with Image.open("out/block_spectra.png") as picture:
        assert f"{TITLES[matrix]} spectra by block" in picture.info["Title"]


@pytest.mark.parametrize(
    ("first", "second"), [("hessian", "ggn"), ("ggn", "fisher"), ("ggn", "hessian")]
)
def test_a_result_is_never_resumed_as_anothers(first, second, capsys):
    command = ("spectrum", "--model", "own.py:problem", *SMALL[:6], "--out", "out", "--matrix")
    assert run(*command, first) == 0
    assert run(*command, first) == 0
    capsys.readouterr()
    assert run(*command, second) == 2
    assert "holds a run with another matrix" in capsys.readouterr().err


@pytest.mark.parametrize("matrix", TITLES)
def test_partitions_are_checked_against_the_matrix(matrix, capsys):
    command = ("partition", "--model", "own.py:problem", "--preset", "neuron", "--matrix", matrix)
    assert run(*command, "--out", "out") in (0, 1)
    out, _ = capsys.readouterr()
    assert f"{TITLES[matrix]}-vector products" in out
    found = ht.load("out/result")
    assert found["report"].curvature == found["drawn"].curvature == TITLES[matrix]
    with Image.open("out/hessian.png") as picture:
        assert f"dense {TITLES[matrix]} over the blocks" in picture.info["Title"]


def test_a_loss_of_one_function_is_one_line(capsys):
    command = ("spectrum", "--model", "own.py:one_function", *SMALL)
    assert run(*command) == 0
    capsys.readouterr()
    assert run(*command, "--matrix", "ggn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hessian-tools: --matrix ggn: the Gauss-Newton and Fisher matrices need")
    assert "pass ht.Loss(outputs=..., loss=...)" in line


def test_what_one_matrix_has_passed_is_not_taken_for_another(capsys):
    for matrix in ("hessian", "ggn"):
        assert run("spectrum", "--model", "own.py:problem", "--matrix", matrix, *SMALL) == 0
        assert "verified (quick set" in capsys.readouterr().err
    assert run("spectrum", "--model", "own.py:problem", "--matrix", "ggn", *SMALL) == 0
    assert "verified before" in capsys.readouterr().err
