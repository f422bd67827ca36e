"""The benchmark of quadratics counts what it says."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quadratic as benchmark

from hessian_tools.quadratic import case, simulation


def test_products_are_counted_by_block():
    """2 x 3 x 30 x 30 floating-point operations a step: blocks, not the whole 90 x 90."""
    q = benchmark.problem(2, "cpu")
    assert benchmark.counted(q, "adam", {}) == 2 * 3 * 30 * 30


def test_small_blocks_are_joined():
    widths = [where.stop - where.start for where, _ in simulation.tiles_of(case(3))]
    assert widths == [9]
    q = benchmark.problem(2, "cpu")
    widths = [where.stop - where.start for where, _ in simulation.tiles_of(q)]
    assert widths == [30, 30, 30]


def test_it_runs_and_prints_its_table(tmp_path, capsys, monkeypatch):
    result = tmp_path / "b.json"
    arguments = ["--smoke", "--out", str(result), "--note", "a test"]
    monkeypatch.setattr(sys, "argv", ["quadratic.py", *arguments])
    benchmark.main()
    out = capsys.readouterr().out
    for words in ("40 runs of 130 steps", "(a test)", "5,400"):
        assert words in out
    methods = json.loads(result.read_text())["methods"]
    assert methods["gradient descent"]["diverged"] == 0
