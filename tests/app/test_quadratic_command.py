"""The command line's quadratics: tables, JSON, saved runs, files, measured networks, bad input."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.app import quadratic_command
from hessian_tools.app.cli import main
from hessian_tools.quadratic.cases import drawn_eigenvalues
from hessian_tools.quadratic.lineup import winner
from hessian_tools.quadratic.problems import exact_quadrature

ROOT = Path(__file__).parents[2]
FILES = {
    "file.json": "[1, 2]",
    "broken.json": "[1,",
    "config.json": '{"command": "js0"}',
    "deep.json": "[" * 100_000,
    "big.json": f"[[1{'0' * 400}, 2]]",
    "words.json": '[["1", 2]]',
    "blocks.jsonl": "",
}
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
    readings = {"bounded", "unnormalised", "log", "wasserstein", "curvature", "scale_spread"}
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


def spectra_of(**blocks: list[float]) -> ht.BlockSpectra:
    """Exact spectra of diagonal blocks."""
    quadratures = {name: exact_quadrature(np.array(values)) for name, values in blocks.items()}
    return ht.BlockSpectra(quadratures, 1, 9, 0, "rademacher", "full", "given")


def test_the_committed_network_runs_with_the_defaults(run, monkeypatch):
    """README's command, with fewer runs: kappa rises until all scales can be kept, and says so."""
    monkeypatch.setattr(quadratic_command, "_STEPS_OF_ADAM_BOUND", 5)
    monkeypatch.setattr(quadratic_command, "check_gd_bound", lambda problem: [])  # takes seconds
    path = ROOT / "results" / "gpt2_official"
    said = run("--from", path, "--starts", "2", "--steps", "5", "--methods", "gd", "--json")
    problem = said.json["problem"]
    drawn = {
        name: drawn_eigenvalues(spectrum, 12, "nodes", 0, name)
        for name, spectrum in ht.load(path / "result")["spectra"].items()
    }
    ranges = [float(np.ptp(values)) for values in drawn.values()]
    ratio = max(ranges) / min(ranges)
    assert problem["size"] == 25 * 12
    assert problem["kappa"] == pytest.approx(300_000)
    assert 10 * ratio <= 300_000 < 10.5 * ratio
    assert list(problem["block_kappas"].values()) == pytest.approx([300_000 / ratio] * 25)
    assert "note: kappa is 300000 instead of 5000" in said.err
    assert "note: 12 eigenvalues are drawn for each of 25 blocks" in said.err


def test_scales_that_lie_close_keep_the_papers_kappa(run, tmp_path):
    ht.save(spectra_of(a=[-1.0, 0.5, 3.0], b=[-8.0, -1.0]), tmp_path / "near")  # ranges 4 and 7
    said = run("--from", tmp_path / "near", *FAST, "--json")
    assert "note" not in said.err
    assert said.json["problem"]["kappa"] == pytest.approx(5000)
    expected = pytest.approx(5000 * 4 / 7)
    assert said.json["problem"]["block_kappas"] == {"a": expected, "b": expected}
    told = run("--from", tmp_path / "near", *FAST, "--kappa", "1.5")
    assert told.code == 2
    assert "--kappa 1.5 is too small" in told.err and "above 1.75 only" in told.err


def test_blocks_without_a_range_are_left_out_and_told(run, tmp_path):
    blocks = {"zero": [0.0, 0.0], "a": [1.0, 2.0], "b": [0.0, 5.0], "rounding": [0.0, 1e-9]}
    ht.save(spectra_of(**blocks), tmp_path / "some")
    said = run("--from", tmp_path / "some", *FAST, "--json")
    assert list(said.json["problem"]["block_kappas"]) == ["a", "b"]
    assert "2 of 4 blocks are left out" in said.err and "zero, rounding" in said.err


@pytest.mark.parametrize("kind", ["mapping", "adaptive", "negative"])
def test_whatever_holds_spectra_is_taken(kind, run, tmp_path):
    spectra = spectra_of(a=[-4.0, -2.0, -1.0], b=[-9.0, -8.0])
    js = ht.js_heterogeneity(spectra)
    held = {
        "mapping": dict(spectra),
        "adaptive": ht.heterogeneity.AdaptiveJS0(spectra, js, (), 0.1, ("log",), True),
        "negative": spectra,
    }
    ht.save(held[kind], tmp_path / "held")
    assert run("--from", tmp_path / "held.npz", *FAST, "--json").json["problem"]["size"] == 5


def test_an_interrupted_run_goes_on_with_the_methods_left(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = run("3", *FAST, "--out", tmp_path / "whole").out
    compared, compare = [], quadratic_command.compare

    def interrupting(problem, methods, **keywords):
        if len(compared) == 1:
            raise KeyboardInterrupt
        compared.extend(methods)
        return compare(problem, methods, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(quadratic_command, "compare", interrupting)
        code, _, error = run("3", *FAST, "--out", folder)
        assert code == 130 and "the same command goes on" in error
    code, out, error = run("3", *FAST, "--out", folder)
    assert code == 0 and out == first and "gd: finished before" in error


@pytest.mark.parametrize("blocks", [[[5]], [[2, 2], [2, 2]], [[3, 4]], [[1, 2]]])
def test_small_condition_numbers_violate_nothing(blocks, run, tmp_path):
    """Up to kappa 2 the bounds of gradient descent are 0 or less, and say nothing."""
    (tmp_path / "mine.json").write_text(json.dumps(blocks))
    found = run(tmp_path / "mine.json", *FAST, "--json").json
    assert [bound["violations"] for bound in found["bounds"]] == [0] * 6


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
        (["--from", "FILE"], "it is a list; a file of eigenvalues is given without --from"),
        (["--from", "CONFIG"], "is not a saved result of format 1"),
        (["--from", "BEGUN"], "its run is not finished: the same command with this --out"),
        (["--from", "SEVERAL"], "there is no such result, but in"),
        (["--from", "HALF"], "not the arrays beside it, result.npz"),
        (["--from", "DEEP"], "recursion"),
        (["--from", "FLAT"], "no block of a, b has two different eigenvalues"),
        (["--from", "FLAT", "--shift", "joint"], "all eigenvalues are 0"),
        (["--from", "ONE", "--per-block", "1"], "a single eigenvalue has no range"),
        (["--from", "ONE", "--per-block", "9999999"], "of 10,000 at most"),
        (["--from", "ONE", "--blocks", "*", "none"], "--blocks none matches none of a.long.name"),
        (["--from", "ONE", "--blocks", "a.long.nam"], "close: a.long.name"),
        (["--from", "PARTITION"], "no block spectra but report, drawn, conditioning"),
        (["--from", "TOLERANCE"], "no block spectra but vgg-nano"),
        (["3", "--per-block", "3"], "--per-block is of blocks that are drawn"),
        (["3", "--kappa", "1e13"], "up to 1e+12"),
        (["²"], "there is no file"),
        (["9" * 5000], "the cases are 1, 2, 3 and 4"),
        (["EMPTY"], "is a folder; --from"),
        (["SAVED"], "is a saved result, not a list of eigenvalues; give --from"),
        (["DEEP"], "is not JSON: maximum recursion"),
        (["BIG"], "eigenvalues [inf, 2.0]"),
        (["WORDS"], "no lists of eigenvalues"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, words):
    for name, text in FILES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
    ht.save({"x": 1}, tmp_path / "result")
    ht.save({"x": 1}, tmp_path / "several" / "one" / "result")
    ht.save({"x": 1}, tmp_path / "half" / "result")
    (tmp_path / "half" / "result.npz").unlink()
    ht.save(spectra_of(a=[0.0, 0.0], b=[0.0]), tmp_path / "flat")
    ht.save(spectra_of(**{"a.long.name": [1.0, 2.0, 4.0]}), tmp_path / "one")
    named = {
        **{name.partition(".")[0].upper(): tmp_path / name / name for name in FILES},
        **{name.upper(): tmp_path / name for name in ("half", "flat", "one", "several")},
        "RESULT": tmp_path,
        "SAVED": tmp_path / "result.json",
        "EMPTY": tmp_path / "several",
        "BEGUN": tmp_path / "blocks.jsonl",
        "PARTITION": ROOT / "results" / "partition_gpt2",
        "TOLERANCE": ROOT / "results" / "tolerance",
    }
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
