"""The command line's quadratics, their saved results and pictures, and the benchmark's bookkeeping."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.app.cli import main
from hessian_tools.app.quadratic_text import winner
from hessian_tools.plots import quadratic as quadratic_plotting
from hessian_tools.quadratic import simulation

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quadratic as benchmark  # noqa: E402

FAST = ["--starts", "6", "--steps", "400", "--methods", "gd", "adam_frozen", "nesterov"]


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["quadratic", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_case_is_told_in_tables(capsys):
    code, out, _ = told(capsys, "3", *FAST)
    assert code == 0 and out.startswith("case 3: d = 9 in blocks 3 of 3, kappa 2000")
    for words in (
        "without momentum: adam_frozen beats gd", "max kappa_l", "GD lower bound: thesis", "Wasserstein [decades]",
        "spread of block scales", "JS0 (literature",
    ):  # fmt: skip
        assert words in out, words


def test_json_has_the_same_numbers(capsys):
    code, out, _ = told(capsys, "4", *FAST, "--json", "--kappa", "500")
    found = json.loads(out)
    assert (
        code == 0
        and found["problem"]["kappa"] == 500
        and found["problem"]["block_kappas"]["block 1"] == 498
    )
    assert found["methods"][0]["name"] == "nesterov" and found["bounds"][0]["violations"] == 0
    assert set(found["heterogeneity"]) == {
        "bounded",
        "unnormalised",
        "log",
        "wasserstein",
        "scale_spread",
    }
    runs = quadratic.run(
        quadratic.case(4, kappa=500),
        "nesterov",
        step="optimal",
        num_starts=6,
        num_steps=400,
        progress=False,
    )
    assert found["methods"][0]["quartiles"] == runs.quantiles(1e-6).tolist()


def test_out_saves_and_the_same_command_reads(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    code, first, _ = told(capsys, "3", *FAST, "--out", str(folder))
    assert code == 0 and (folder / "quadratic.png").read_bytes().startswith(b"\x89PNG")
    saved = ht.load(folder / "result")
    assert isinstance(saved["runs"]["gd"], quadratic.Runs) and isinstance(
        saved["constants"], quadratic.Constants
    )
    monkeypatch.setattr(
        "hessian_tools.app.quadratic_command.compare", lambda *a, **k: pytest.fail("computed again")
    )
    assert told(capsys, "3", *FAST, "--out", str(folder))[1] == first
    code, _, error = told(capsys, "4", *FAST, "--out", str(folder))
    assert code == 2 and "another source" in error


def test_a_file_of_eigenvalues(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"small": [1, 2], "large": [50, 60, 70]}')
    code, out, _ = told(capsys, str(path), *FAST, "--json")
    assert code == 0 and list(json.loads(out)["problem"]["block_kappas"]) == ["small", "large"]
    path.write_text("[[1, 2, 3]]")
    code, out, _ = told(capsys, str(path), *FAST)
    assert code == 0 and "mine: d = 3 in blocks 1 of 3" in out and "JS0" not in out


def test_a_measured_network(capsys, tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    problem = ht.Problem(model, ht.mse, [(torch.randn(9, 3).double(), torch.randn(9, 2).double())])
    blocks = ht.partition(model, "weights")
    spectra = ht.blockwise_slq(problem, blocks, progress=False)
    ht.save({"spectra": spectra, "heterogeneity": None}, tmp_path / "result")
    for path in (tmp_path, tmp_path / "result.json"):
        code, out, _ = told(capsys, "--from", str(path), *FAST, "--json", "--per-block", "5")
        assert code == 0 and json.loads(out)["problem"]["size"] == 10
        assert json.loads(out)["problem"]["kappa"] == pytest.approx(5000)
    code, out, _ = told(capsys, "--from", str(tmp_path), *FAST, "--json", "--blocks", "2.*")
    assert list(json.loads(out)["problem"]["block_kappas"]) == ["2.weight"]
    # dense blocks carry the same eigenvalues, as these blocks are small enough to be exact
    dense = ht.dense_block(problem, blocks, progress=False)
    made, same = (quadratic.from_spectra(of, seed=1) for of in (spectra, dense))
    assert (
        torch.allclose(made.hessian, same.hessian, rtol=1e-6)
        and made.block_names == same.block_names
    )
    code, _, error = told(capsys, "--from", str(tmp_path), "--blocks", "nothing")
    assert code == 2 and "matches none of 0.weight, 2.weight" in error


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
def test_bad_input_is_one_line(capsys, tmp_path, arguments, words):
    (tmp_path / "file.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("[1,")
    ht.save({"x": 1}, tmp_path / "result")
    named = {"FILE": tmp_path / "file.json", "BROKEN": tmp_path / "broken.json", "RESULT": tmp_path}
    code, out, error = told(capsys, *[str(named.get(a, a)) for a in arguments])
    assert code == 2 and not out and words in error and error.count("\n") == 1


def test_results_survive_saving(tmp_path):
    q = quadratic.case(3)
    runs = quadratic.run(
        q, "gd", step=[1e-3, 1.0], num_starts=2, num_steps=40, tail=3, progress=False
    )
    kept = {
        "runs": runs, "sweep": quadratic.best_step(q, "gd", num_starts=2, num_steps=60),
        "constants": quadratic.constants(q), "checks": tuple(quadratic.check_gd_bound(q, num_steps=3)),
        "cycle": quadratic.limit_cycle(q, beta2=0.9, num_steps=300),
        "cards": quadratic.score_prediction(quadratic.random_problems(3)),
    }  # fmt: skip
    ht.save(kept, tmp_path / "x")
    found = ht.load(tmp_path / "x")
    assert np.array_equal(found["runs"].losses, runs.losses) and found["runs"].settings == {}
    assert np.array_equal(found["runs"].iterations_to(1e-2), runs.iterations_to(1e-2))
    assert found["checks"] == kept["checks"] and found["cards"] == kept["cards"]
    assert (
        found["cycle"].exponent == kept["cycle"].exponent
        and found["sweep"].best == kept["sweep"].best
    )


def place(name: str, middle: float) -> quadratic.Standing:
    return quadratic.Standing(name, "given", 0.1, (middle, middle, middle), 0.0, 1.0)


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
def test_who_wins_is_told_like_with_like(medians, words):
    assert words in winner([place(name, float(middle)) for name, middle in medians.items()])


def test_standings_are_in_order_and_compare_with_gradient_descent():
    q = quadratic.case(3)
    runs = quadratic.compare(q, ["gd", "adam_frozen"], num_starts=9, num_steps=8000, progress=False)
    fast, slow = quadratic.standings(runs)
    assert (fast.name, slow.name, slow.speedup) == ("adam_frozen", "gd", 1.0)
    assert fast.speedup == slow.quartiles[1] / fast.quartiles[1] > 10
    tuned = quadratic.compare(q, ["gd"], tuned=True, num_starts=9, num_steps=4000, progress=False)[
        "gd"
    ]
    assert (
        tuned.step.startswith("best of a sweep")
        and tuned.median_iterations(1e-6) <= slow.quartiles[1]
    )
    with pytest.raises(ValueError, match="choose among gd"):
        quadratic.compare(q, ["adamw"])


def test_pictures_show_every_method_and_both_bounds(tmp_path):
    from matplotlib.figure import Figure

    q = quadratic.case(4)
    runs = quadratic.compare(
        q, ["gd", "adam_frozen", "sign"], num_starts=4, num_steps=100, progress=False
    )
    axes = Figure().subplots()
    quadratic_plotting.loss_curves(axes, runs, quadratic.constants(q))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["GD", "Adam, β₂ = 1", "sign descent"] and len(labels) == 5
    drawn = dict(zip(labels, axes.get_lines(), strict=True))
    steps, losses = drawn["GD"].get_data()
    assert (
        losses[-1]
        == pytest.approx(np.quantile(runs["gd"].losses[:, -1], 0.5, method="inverted_cdf"))
        and steps[-1] == 100
    )
    steps, bound = drawn["GD's worst start, any step (Thm 3.2)"].get_data()
    assert bound == pytest.approx((1 - 2 / 2001) ** (2 * steps))
    quadratic_plotting.block_eigenvalues(axes := Figure().subplots(), q)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["block 1", "block 2", "block 3"]


def test_the_benchmark_counts_its_products(tmp_path, capsys, monkeypatch):
    """2 x 3 x 30 x 30 floating-point operations a step: blocks, not the whole 90 x 90."""
    q = benchmark.problem(2, "cpu")
    assert benchmark.counted(q, "adam", {}) == 2 * 3 * 30 * 30
    assert [where.stop - where.start for where, _ in simulation.tiles_of(q)] == [30, 30, 30]
    assert [where.stop - where.start for where, _ in simulation.tiles_of(quadratic.case(3))] == [9]
    monkeypatch.setattr(
        sys,
        "argv",
        ["quadratic.py", "--smoke", "--out", str(tmp_path / "b.json"), "--note", "a test"],
    )
    benchmark.main()
    out = capsys.readouterr().out
    assert "40 runs of 130 steps" in out and "(a test)" in out and "5,400" in out
    assert (
        json.loads((tmp_path / "b.json").read_text())["methods"]["gradient descent"]["diverged"]
        == 0
    )
