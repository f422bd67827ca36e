"""The command line's quadratics: tables, JSON, saved runs, files, measured networks, bad input."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.app.cli import main
from hessian_tools.app.quadratic_text import winner

FAST = ["--starts", "6", "--steps", "400", "--methods", "gd", "adam_frozen", "nesterov"]


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Runs the command and returns what it said."""

    def command(*arguments: object) -> Said:
        code = main(["quadratic", *map(str, arguments)])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return command


def test_a_case_is_shown_in_tables(run):
    code, out, _ = run("3", *FAST)
    assert code == 0
    assert out.startswith("case 3: d = 9 in blocks 3 of 3, kappa 2000")
    for words in (
        "without momentum: adam_frozen beats gd",
        "max kappa_l",
        "GD lower bound: thesis",
        "Wasserstein [decades]",
        "spread of block scales",
        "JS0 (literature",
    ):
        assert words in out, words


def test_json_has_the_same_numbers(run):
    numbers = run("4", *FAST, "--json", "--kappa", "500").json
    assert numbers["problem"]["kappa"] == 500
    assert numbers["problem"]["block_kappas"]["block 1"] == 498
    assert numbers["bounds"][0]["violations"] == 0
    readings = {"bounded", "unnormalised", "log", "wasserstein", "scale_spread"}
    assert set(numbers["heterogeneity"]) == readings
    fastest = numbers["methods"][0]
    assert fastest["name"] == "nesterov"
    runs = quadratic.run(
        quadratic.case(4, kappa=500),
        "nesterov",
        step="optimal",
        num_starts=6,
        num_steps=400,
        progress=False,
    )
    assert fastest["quartiles"] == runs.quantiles(1e-6).tolist()


def test_out_saves_and_the_same_command_reads(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    code, first, _ = run("3", *FAST, "--out", folder)
    assert code == 0
    assert (folder / "quadratic.png").read_bytes().startswith(b"\x89PNG")
    saved = ht.load(folder / "result")
    assert isinstance(saved["runs"]["gd"], quadratic.Runs)
    assert isinstance(saved["constants"], quadratic.Constants)
    monkeypatch.setattr(
        "hessian_tools.app.quadratic_command.compare",
        lambda *_, **__: pytest.fail("computed again"),
    )
    assert run("3", *FAST, "--out", folder).out == first
    code, _, error = run("4", *FAST, "--out", folder)
    assert code == 2
    assert "another source" in error


def test_a_file_of_eigenvalues(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"small": [1, 2], "large": [50, 60, 70]}')
    numbers = run(path, *FAST, "--json").json
    assert list(numbers["problem"]["block_kappas"]) == ["small", "large"]


def test_a_single_block_has_no_heterogeneity(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[[1, 2, 3]]")
    code, out, _ = run(path, *FAST)
    assert code == 0
    assert "mine: d = 3 in blocks 1 of 3" in out
    assert "JS0" not in out


@pytest.fixture
def network():
    """A small problem and its two weights as blocks."""
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(first, torch.nn.Tanh(), second).double()
    batch = (torch.randn(9, 3).double(), torch.randn(9, 2).double())
    return ht.Problem(model, ht.mse, [batch]), ht.partition(model, "weights")


def test_a_measured_network(run, network, tmp_path):
    spectra = ht.blockwise_slq(*network, progress=False)
    ht.save({"spectra": spectra, "heterogeneity": None}, tmp_path / "result")
    for path in (tmp_path, tmp_path / "result.json"):
        made = run("--from", path, *FAST, "--json", "--per-block", "5").json["problem"]
        assert made["size"] == 10
        assert made["kappa"] == pytest.approx(5000)
    numbers = run("--from", tmp_path, *FAST, "--json", "--blocks", "2.*").json
    assert list(numbers["problem"]["block_kappas"]) == ["2.weight"]
    code, _, error = run("--from", tmp_path, "--blocks", "nothing")
    assert code == 2
    assert "matches none of 0.weight, 2.weight" in error


def test_dense_blocks_give_the_same_quadratic(network):
    """These blocks are small enough for both to be exact."""
    spectra = ht.blockwise_slq(*network, progress=False)
    dense = ht.dense_block(*network, progress=False)
    by_spectra = quadratic.from_spectra(spectra, seed=1)
    by_dense = quadratic.from_spectra(dense, seed=1)
    assert torch.allclose(by_spectra.hessian, by_dense.hessian, rtol=1e-6)
    assert by_spectra.block_names == by_dense.block_names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either CASE|FILE or --from"),
        (["7"], "the cases are 1, 2, 3 and 4"),
        (["nothing.json"], "there is no file"),
        (["3", "--blocks", "a"], "--blocks chooses among"),
        (["3", "--tolerance", "2"], "below 1"),
        (["3", "--kappa", "10"], "at least 104"),
        (["3", "--methods", "adamw"], "invalid choice"),
        (["FILE"], "no lists of eigenvalues"),
        (["BROKEN"], "is not JSON"),
        (["FILE", "--kappa", "9"], "does not apply to a file"),
        (["--from", "RESULT"], "holds no block spectra"),
        (["--from", "nowhere"], "there is no such result"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, words):
    (tmp_path / "file.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("[1,")
    ht.save({"x": 1}, tmp_path / "result")
    named = {"FILE": tmp_path / "file.json", "BROKEN": tmp_path / "broken.json", "RESULT": tmp_path}
    code, out, error = run(*[named.get(argument, argument) for argument in arguments])
    assert code == 2
    assert not out
    assert words in error
    assert error.count("\n") == 1


def place(name: str, middle: float) -> quadratic.Standing:
    quartiles = (middle, middle, middle)
    return quadratic.Standing(name, "given", 0.1, quartiles, diverged=0.0, speedup=1.0)


@pytest.mark.parametrize(
    ("medians", "words"),
    [
        (
            {"gd": 100, "adam_frozen": 25},
            "without momentum: adam_frozen beats gd, 4 times fewer iterations.",
        ),
        (
            {"gd": 100, "adam_frozen": np.inf, "sign": 250},
            "without momentum: gd beats sign, 2.5 times",
        ),
        ({"gd": np.inf, "adam_frozen": np.inf}, "both do not come to the tolerance"),
        ({"gd": 10, "adam_frozen": np.inf}, "gd beats adam_frozen, which does not come"),
        ({"gd": 10, "adam_frozen": 10}, "are even"),
        (
            {"nesterov": 30, "heavy_ball": 20, "adam": 40},
            "with momentum: heavy_ball beats adam, 2 times",
        ),
        ({"jacobi": 30}, "Fastest: jacobi."),
    ],
)
def test_methods_with_momentum_are_compared_with_their_like(medians, words):
    assert words in winner([place(name, float(middle)) for name, middle in medians.items()])
