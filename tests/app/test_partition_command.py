"""``hessian-tools partition`` as its user meets it: exit codes, tables, JSON, files, resumed
runs."""

import json

import pytest
import torch
from problems.command_line import run

import hessian_tools as ht
from hessian_tools.app import partition_command
from hessian_tools.curvature.operators import StackedBlocks
from hessian_tools.plots import partition as partition_plotting
from hessian_tools.structure import check as partition_check

OWN = """
import torch
from torch import nn
import hessian_tools as ht

class Rows(nn.Module):
    "Its Hessian is block-diagonal by rows of fc.weight."
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 16, bias=False)
        half = torch.randn(16, 12, 12)
        self.blocks = half + half.mT

def rows():
    print("a model's noise")
    model = Rows()

    def loss(model, batch):
        w = model.fc.weight
        return torch.einsum("ia,iab,ib->", w, model.blocks, w)

    return model, loss, [torch.zeros(1)]

def net():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, ht.cross_entropy, [(torch.randn(16, 6), torch.randint(3, (16,)))]
"""
FAST = ("--no-verify", "--coupling", "0")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(partition_plotting, "draw", lambda *arguments: [])


@pytest.mark.parametrize(
    ("claim", "code", "verdict"),
    [
        ("fc.weight=row", 0, "follows"),
        ("fc.weight=0", 0, "follows"),
        ("fc.weight=heads(16)", 0, "follows"),
        ("fc.*=column", 1, "wrong axis"),
        ("fc.weight=whole", 1, "too coarse"),
        ("fc.weight=elements", 1, "too fine"),
    ],
)
def test_a_single_claim_is_tested_and_a_wrong_one_is_code_1(claim, code, verdict, capsys):
    assert run("partition", "--model", "own.py:rows", "--check", claim, *FAST) == code
    out, err = capsys.readouterr()
    (row,) = [line for line in out.splitlines() if line.startswith("fc.weight ")]
    assert row.endswith(f"  {verdict}") and "noise" not in out and "plan: " in err
    assert (
        "  row       ^fc\\.weight$" in out.splitlines()
        and "learning rates for 192 parameters" in out
    )


def test_exact_masses_leave_nothing_undecided(capsys):
    assert (
        run(
            "partition",
            "--model",
            "own.py:rows",
            "--check",
            "fc.weight=row",
            "--blocks",
            "4",
            "--exact",
            *FAST,
        )
        == 0
    )
    assert "  100.0%  " in capsys.readouterr().out
    run("partition", "--model", "own.py:rows", "--preset", "neuron", "--json", "--exact", *FAST)
    (tensor,) = json.loads(capsys.readouterr().out)["tensors"]
    assert (
        tensor["exact"]
        and tensor["num_matvecs"] == 192
        and tensor["evidence"][2]["share_error"] == 0
    )


def test_json_holds_all_of_the_report(capsys):
    assert run("partition", "--model", "own.py:rows", "--preset", "tensor", "--json", *FAST) == 1
    found = json.loads(capsys.readouterr().out)
    (tensor,) = found["tensors"]
    assert (
        tensor["verdict"] == "too coarse"
        and tensor["suggested"] == "rows"
        and found["contradicted"] == ["fc.weight"]
    )
    assert [e["cut"] for e in tensor["evidence"]] == ["whole", "elements", "rows", "columns"]
    assert tensor["evidence"][0]["excess"] == "nan" and found["counts"]["too coarse"] == 1
    assert found["suggestion"] == {"^fc\\.weight$": "row"} and found["savings"]["num_blocks"] == 16


def test_out_keeps_the_report_the_suggestion_and_pictures(capsys, tmp_path):
    arguments = (
        "partition",
        "--model",
        "own.py:net",
        "--preset",
        "neuron",
        "--no-verify",
        "--out",
        "out",
    )
    code = run(*arguments)
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "commands.json",
        "config.json",
        "result.json",
        "result.npz",
        "suggestion.json",
        "optimizer.txt",
        "evidence.png",
        "hessian.png",
    }
    kept = ht.load(folder / "result")
    assert code == bool(kept["report"].contradicted) and isinstance(
        kept["drawn"], ht.structure.DenseBlock
    )
    assert (
        len(kept["drawn"].matrix) == 83 and "Adam_mini(" in (folder / "optimizer.txt").read_text()
    )
    first = capsys.readouterr().out
    assert run(
        "partition", "--model", "own.py:net", "--preset", str(folder / "suggestion.json"), *FAST
    ) in (0, 1)
    capsys.readouterr()
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == first and "finished before" in err
    assert run(*arguments, "--seed", "1") == 2 and "another seed" in capsys.readouterr().err


def test_a_larger_model_is_drawn_by_the_coupling_of_its_tensors(monkeypatch, tmp_path):
    monkeypatch.setattr(partition_command, "MOST_DENSE", 50)
    run("partition", "--model", "own.py:net", "--no-verify", "--out", "out", "--coupling", "3")
    assert (tmp_path / "out" / "coupling.png").read_bytes().startswith(b"\x89PNG")
    drawn = ht.load(tmp_path / "out" / "result")["drawn"]
    assert isinstance(drawn, ht.structure.Coupling) and drawn.groups == (
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    )


def test_an_interrupted_run_goes_on(monkeypatch, capsys, undrawn):
    arguments = ("partition", "--model", "own.py:net", "--preset", "neuron", "--out", "out", *FAST)
    measure, measured = partition_check.measure, []

    def interrupted(hessian, region, *rest, **keywords):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(region.name)
        return measure(hessian, region, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(partition_check, "measure", interrupted)
        assert run(*arguments) == 130
    measured.clear()
    assert run(*arguments) in (0, 1)
    assert "2 tensors done before" in capsys.readouterr().err
    again = ht.load("out/result")["report"]
    assert [t.name for t in again.tensors] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_conditioning_is_told(capsys, undrawn):
    run("partition", "--model", "own.py:net", "--preset", "neuron", "--conditioning", *FAST)
    out = capsys.readouterr().out
    assert "with Adam's" in out and "highest lambda_max" in out and "0.weight[row=" in out
    for _ in "computed", "loaded":
        run("partition", "--model", "own.py:net", "--conditioning", "--json", "--out", "out", *FAST)
        found = json.loads(capsys.readouterr().out)
        assert {"kappa", "kappa_adam", "tau", "names"} <= set(found["conditioning"]) and len(
            found["extremes"]["largest"]
        ) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "fc.weight"), "--check fc.weight: NAME=AXIS is needed"),
        (
            ("--check", "fc.wight=row"),
            "'fc.wight' matches no trainable parameter; close: fc.weight",
        ),
        (("--check", "fc.weight=rwo"), "axes are whole, role"),
        (("--check", "fc.weight=heads(3)"), "heads(3) is stated for fc.weight"),
        (("--check", "fc.weight=heads(two)"), "states no heads; write 'heads"),
        (("--heads", "fc.weight"), "--heads fc.weight: NAME=COUNT is needed"),
        (("--heads", "fc.wight=2"), "'fc.wight' matches no trainable parameter; close: fc.weight"),
        (("--heads", "fc.weight=2", "--check", "fc.weight=row"), "and --heads"),
        (("--check", "fc.weight=row", "--preset", "tensor"), "leave out --preset and --only"),
        (("--preset", "tensr"), "--preset tensr: "),
        (("--preset", "none.json"), "--preset none.json: there is no such file"),
        (("--preset", "own.py"), "--preset own.py: presets are tensor"),
        (("--contrast", "1"), "--contrast is 1; it must exceed 1"),
        (("--alpha", "1"), "'1' is not between 0 and 1"),
        (("--probes", "2"), "'2' is not a whole number of at least 3"),
    ],
)
def test_bad_input_is_code_2_in_one_line(arguments, message, capsys):
    assert run("partition", "--model", "own.py:rows", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "noise" not in line]
    assert len(lines) == 1 and message in lines[0]


def test_a_numerical_failure_is_code_3(monkeypatch, capsys):
    monkeypatch.setattr(StackedBlocks, "matmat", lambda self, vectors: vectors * torch.inf)
    assert run("partition", "--model", "own.py:rows", *FAST) == 3
    assert "product with the Hessian of fc.weight is NaN or inf" in capsys.readouterr().err
