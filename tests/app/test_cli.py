"""The command line as its user meets it: tables, JSON, files, exit codes, kills, resumed and
refused runs."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from problems import dense_hessian
from problems.command_line import run
from problems.compared import same

import hessian_tools as ht
from hessian_tools import results
from hessian_tools.app import cli, spectra_command
from hessian_tools.app.models import user_model
from hessian_tools.curvature.operators import StackedBlocks
from hessian_tools.plots import spectra as plotting
from hessian_tools.problem import zoo

ROOT = Path(__file__).parents[2]
OWN = """
import os
import torch
from torch import nn
import hessian_tools as ht

print("a model's noise")

def net(width=8, depth=2, **keywords):
    layers = [nn.Linear(6, width), *(nn.Linear(width, width) for _ in range(depth - 1)), nn.Linear(width, 3)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    shift = float(os.environ.get("SHIFT", 0))
    return model, ht.cross_entropy, [(shift + torch.randn(n, 6), torch.randint(3, (n,))) for n in (16, 5)]

def loud(model, batch):
    print("a model's noise")
    return ht.cross_entropy(model, batch)

def problem():
    model, _, batches = net()
    return ht.Problem(model, loud, batches)

def large():
    return net(64, 16)

def wide():
    return net(24, 3)

def fails():
    return {}["nothing"]

def fails_at_length():
    raise OSError("first line\\nsecond line")

def three():
    return 3

def no_model():
    return 1, 2, 3

def no_scalar():
    return nn.Linear(2, 2), lambda model, batch: model(batch), [torch.randn(3, 2)]

def nan():
    return nn.Linear(2, 2), lambda model, batch: model(batch).sum() * float("nan"), [torch.randn(3, 2)]

def norm():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return model, ht.mse, [(torch.randn(4, 2), torch.randn(4, 2))]

def stated():
    return ht.Problem(*norm(), batch_stats=True)

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

def once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return model, lambda model, batch: (Once.apply(model(batch)) ** 2).mean(), [torch.randn(3, 2)]

def quits():
    raise SystemExit("no")
"""
FAST = ("--probes", "2", "--steps", "3", "--no-verify")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A folder with own.py, to work in; one thread, so that runs can be compared bit by bit."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of anything but pictures: these take longest."""
    monkeypatch.setattr(plotting, "draw", lambda *arguments, **options: [])


def start(*arguments, **keywords):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hessian_tools", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **keywords)


def said(capsys):
    """(stdout, lines of stderr without the plan and what the model printed)"""
    out, err = capsys.readouterr()
    return out, [
        line
        for line in err.splitlines()
        if line != "a model's noise" and not line.startswith("plan: ")
    ]


def test_the_plan_is_told_before_the_run(capsys):
    assert run("js0", "--model", "own.py:net", *FAST[:4]) == 0
    lines = capsys.readouterr().err.splitlines()
    plan = [line for line in lines if line.startswith("plan: ")]
    assert [line for line in lines if line != "a model's noise"][
        :4
    ] == plan and "3 of 3 blocks to compute" in plan[0]
    assert "18 Hessian-vector products for 3 block(s), about 0 s" in plan[1]
    assert (
        "recorded once" in plan[2] and "peak" in plan[3] and "left for Lanczos vectors" in plan[3]
    )


def test_js0_prints_saves_and_draws(capsys):
    assert run("js0", "--model", "own.py:net", "--out", "out", *FAST[:4]) == 0
    out, err = said(capsys)
    lines = out.splitlines()
    assert lines[0].startswith("own.py:net (155 parameters, data of its own, loss 1.")
    assert [line.split()[0] for line in lines[3:6]] == ["0.weight", "2.weight", "4.weight"]
    assert "curvature [decades]" in out and "JS0" not in out
    assert re.search(r"^own.py:net: (Adam|undecided)\.", out, re.M)
    assert "a model's noise" not in out and err[0].startswith(
        "verified (quick set, relative errors): symmetry "
    )
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "block_spectra.png", "commands.json", "config.json", "js_matrix.png", "result.json",
        "result.npz",
    ]  # fmt: skip
    assert json.loads(Path("out/commands.json").read_text()) == {
        "repeat": f"hessian-tools js0 --model own.py:net --out out {' '.join(FAST[:4])}",
        "race": "hessian-tools race --model own.py:net --optimizers sgd adam --budget 5min",
    }
    config = json.loads(Path("out/config.json").read_text())
    assert config == json.loads(Path("out/result.json").read_text())["config"]
    assert config["seed"] == 0 and config["probes"] == 2 and len(config["sha256"]) == 64
    saved = ht.load("out/result")
    torch.manual_seed(0)
    scope = {}
    exec(OWN.replace("print", "str"), scope)
    problem = scope["problem"]()
    spectra = ht.blockwise_slq(
        problem, ht.partition(problem.model, "weights"), num_probes=2, num_steps=3
    )
    assert same(saved, {"spectra": spectra, "heterogeneity": ht.js_heterogeneity(spectra)})


def test_json_on_stdout_is_right_and_alone(capsys):
    """Exact blocks against the dense Hessian by double backward."""
    arguments = (
        "--blocks",
        "semantic",
        "--probes",
        "8",
        "--steps",
        "20",
        "--dtype",
        "float64",
        "--json",
    )
    assert run("js0", "--model", "own.py:problem", *arguments) == 0
    out, err = capsys.readouterr()
    assert "a model's noise" in err
    found = json.loads(out)["own.py:problem"]
    assert [block["status"] for block in found["blocks"]] == ["exact"] * 6
    problem, _ = user_model.problem_from("own.py:problem", dtype=torch.float64)
    dense, start = dense_hessian(problem), 0
    for block in found["blocks"]:
        part = slice(start, start + block["size"])
        values = torch.linalg.eigvalsh(dense[part, part])
        assert (block["smallest"], block["largest"]) == pytest.approx(
            (float(values[0]), float(values[-1])), abs=1e-12
        )
        assert (
            block["trace"] == pytest.approx(float(values.sum()))
            and block["matvecs"] == block["size"]
        )
        start += block["size"]
    assert start == 155 and set(found["readings"]) == {"scale", "curvature"}
    assert found["verdict"]["decision"] == "undecided"


def test_spectrum_is_of_the_whole_hessian_or_of_blocks(capsys):
    assert run("spectrum", "--model", "own.py:net", "--out", "whole", *FAST) == 0
    out, _ = said(capsys)
    assert out.splitlines()[3].split()[:2] == ["(model)", "155"] and "verdict" not in out
    assert Path("whole/spectrum.png").exists() and not Path("whole/block_spectra.png").exists()
    assert ht.load("whole/result")["spectra"]["(model)"].size == 155
    assert (
        run(
            "spectrum",
            "--model",
            "own.py:net",
            "--out",
            "some",
            "--blocks",
            "0.*",
            "4.weight",
            *FAST,
        )
        == 0
    )
    assert list(ht.load("some/result")["spectra"]) == ["4.weight", "0.weight", "0.bias"]
    assert Path("some/block_spectra.png").exists() and not Path("some/js_matrix.png").exists()


def test_several_models_side_by_side(capsys):
    arguments = ("--probes", "2", "--steps", "2", "--out", "out", "--no-verify")
    assert run("js0", "--model", "own.py:net", "mlp", "own.py:problem", *arguments) == 0
    out, err = said(capsys)
    names = ["own.py:net", "mlp", "own.py:problem"]
    header = next(line for line in out.splitlines() if line.startswith("reading"))
    assert header.split()[-3:] == names and "verified" not in "".join(err)
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "mlp",
        "own.py_net",
        "own.py_problem",
    ]
    assert all((folder / "js_matrix.png").exists() for folder in Path("out").iterdir())
    config = json.loads(Path("out/mlp/config.json").read_text())
    assert config["data"] == "the packaged Fashion-MNIST" and config["dtype"] == "float32"
    assert re.search(
        r"^mlp \(335,114 parameters, the packaged Fashion-MNIST, loss 2\.\d+\)$", out, re.M
    )


BAD = {
    "": "required: COMMAND",
    "js1": "invalid choice: 'js1'",
    "js0": "required: --model",
    "js0 --model gpt-nan": "did you mean gpt-nano",
    "js0 --model own.py:net --probes 0": "'0' is not a whole number of at least 1",
    "js0 --model own.py:net --steps ²": "'²' is not a whole number",
    "js0 --model own.py:net --seed -1": "'-1' is not a whole number of at least 0",
    "js0 --model own.py:net --seed 99999999999999999999": "is not a whole number",
    "js0 --model own.py:net --device meta": "'meta' is no device of this machine",
    "js0 --model own.py:net --device none": "'none' is no device of this machine",
    "js0 --model own.py:net --dtype float16": "invalid choice: 'float16'",
    "js0 --model own.py:net --memory lots": "memory is 'lots'",
    "js0 --model own.py:net --memory 100B": "is too little",
    "js0 --model own.py:net --unknown": "unrecognized arguments: --unknown",
    "js0 --model own.py:net --blocks semantik": "'semantik' matches no block or trainable parameter",
    "js0 --model own.py:net --blocks 0.wieght": "close: 0.weight",
    "js0 --model own.py:net --blocks model": "js0 compares two or more",
    "js0 --model own.py:net --out own.py": "--out own.py cannot be written",
    "js0 --model own.py:net --out own.py/below": "name a folder you may write to",
    "js0 --model own.py:net own.py:net": "twice",
    "js0 --model own.py:net --context 3": "--context does not apply to own.py:net",
    "js0 --model own.py": "the function's name is missing",
    "js0 --model missing.py:net": "there is no file 'missing.py'",
    "js0 --model own.py:missing": "the file has no function missing",
    "js0 --model own.py:three": "it returned a int",
    "js0 --model own.py:no_model": "model is a int; pass a torch.nn.Module",
    "js0 --model own.py:fails": "line 30: KeyError: 'nothing'",
    "js0 --model own.py:fails_at_length": "line 33: OSError: first line",
    "js0 --model own.py:quits": "SystemExit: no",
    "js0 --model own.py:no_scalar": "not a real scalar tensor",
    "js0 --model own.py:norm": "batch_stats=True",
    "js0 --model own.py:once": "Once",
    "js0 --model broken.py:f": "SyntaxError",
    "js0 --model text.txt:f": "not a Python file",
    "js0 --model gpt-nano --data missing.txt": "missing.txt",
    "js0 --model gpt-nano --image-size 32": "image_size does not apply to gpt-nano",
    "js0 --model mlp --data own.py": "data must be a folder",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_code_2(line, capsys):
    Path("broken.py").write_text("def f(:\n")
    Path("text.txt").write_text("text")
    assert run(*line.split()) == 2
    out, err = said(capsys)
    assert (
        out == "" and len(err) == 1 and BAD[line] in err[0] and err[0].startswith("hessian-tools: ")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("model", ["own.py:net", "mlp"])
def test_cuda_without_one_is_one_line(model, capsys):
    assert run("js0", "--model", model, "--device", "cuda") == 2
    _, err = said(capsys)
    assert len(err) == 1 and "'cuda' is no device of this machine" in err[0]


def test_a_numerical_failure_is_code_3(capsys, monkeypatch):
    assert run("js0", "--model", "own.py:nan") == 3
    _, err = said(capsys)
    assert len(err) == 1 and err[0].startswith(
        "hessian-tools: numerical failure: the loss of batch 0 is nan"
    )
    monkeypatch.setattr(StackedBlocks, "matmat", lambda self, vectors: vectors * float("inf"))
    assert run("js0", "--model", "own.py:net", *FAST) == 3
    assert "0.weight" in said(capsys)[1][-1]


def test_a_hessian_that_fails_verification_is_code_3(capsys, monkeypatch):
    product = ht.HessianOperator._matmat
    monkeypatch.setattr(ht.HessianOperator, "_matmat", lambda self, v: product(self, v) * 1.5)
    assert run("js0", "--model", "own.py:net", *FAST[:4]) == 3
    assert "fail verification: FAILED" in said(capsys)[1][0]
    assert run("js0", "--model", "own.py:net", *FAST) == 0


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    def exhausted(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(spectra_command, "adaptive_js0", exhausted)
    assert run("js0", "--model", "own.py:net", "--no-verify") == 2
    _, err = said(capsys)
    assert len(err) == 1 and "out of memory" in err[0] and "--memory" in err[0]


def test_tracebacks_on_demand_alone(capsys, monkeypatch):
    monkeypatch.setenv("HESSIAN_TOOLS_TRACEBACK", "1")
    assert run("js0", "--model", "mlp", "mlp") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "in spectra_command" not in err.splitlines()[-1]
    assert "twice" in err.splitlines()[-1]
    monkeypatch.delenv("HESSIAN_TOOLS_TRACEBACK")
    for error, words in (
        (KeyError("a mistake"), "KeyError: 'a mistake'"),
        (SystemExit(1), "SystemExit: 1"),
    ):

        def bug(*arguments, error=error, **keywords):
            raise error

        monkeypatch.setattr(spectra_command, "blockwise_slq", bug)
        assert run("js0", "--model", "own.py:net", *FAST) == 3
        last = said(capsys)[1][-1]
        assert re.match(rf"hessian-tools: failed in test_cli.py, line \d+: {words} \(HESS", last)


def test_tolerance_spends_by_need_and_tells(capsys, undrawn):
    command = ("js0", "--model", "own.py:wide", "--no-verify", "--seed", "1", "--reading", "scale")
    products = {}
    for tolerance in ("0.2", "0.01"):
        assert run(*command, "--tolerance", tolerance, "--out", tolerance) == 0
        _, err = said(capsys)
        line = next(line for line in err if line.startswith("tolerance "))
        assert re.match(
            rf"tolerance {tolerance} met after \d+ products: scale .*standard error", line
        )
        spectra = ht.load(f"{tolerance}/result")["spectra"]
        products[tolerance] = spectra.num_matvecs
        assert (
            f"after {spectra.num_matvecs} products" in line
            and max(q.num_matvecs for q in spectra.values()) <= 1576
        )
    assert products["0.2"] < products["0.01"]
    assert run(*command, "--tolerance", "0.1", "--out", "0.2") == 2
    assert "another tolerance (tolerance was 0.2, is now 0.1)" in said(capsys)[1][-1]


def test_the_default_spends_what_the_readings_need(capsys):
    assert run("js0", "--model", "own.py:large", "--no-verify") == 0
    out, err = said(capsys)
    (line,) = (line for line in err if line.startswith("tolerance 0.05 met after "))
    assert "scale" in line and "curvature" in line
    products = int(re.search("after ([0-9]+) products", line)[1])
    assert products <= 16 * 12 + 600 and "not resolved" not in out


def test_the_literatures_readings_take_a_fixed_run(capsys):
    command = ("js0", "--model", "own.py:net", "--no-verify", "--reading", "unnormalised")
    assert run(*command) == 0
    out, err = said(capsys)
    assert "(floor " in out and not any(line.startswith("tolerance") for line in err)
    assert "JS0 (literature, unnormalised) [nats / dx]" in out


def test_blocks_are_exact_up_to_the_size_asked_for(capsys):
    command = ("js0", "--model", "own.py:net", "--no-verify", "--exact")
    for size, exact in (("40", 1), ("80", 3)):
        assert run(*command, size) == 0
        rows = said(capsys)[0].splitlines()
        found = [line for line in rows if line.startswith(("0.weight", "2.weight", "4.weight"))]
        assert sum(line.endswith("exact") for line in found) >= exact


def test_an_interrupted_tolerance_run_goes_on(capsys, monkeypatch, undrawn):
    """Interrupted while its last blocks grow: what is in the journal is not computed again."""
    command = (
        "js0",
        "--model",
        "own.py:wide",
        "--no-verify",
        "--tolerance",
        "0.01",
        "--reading",
        "scale",
        "--out",
    )
    assert run(*command, "whole") == 0
    whole = ht.load("whole/result")["spectra"]
    appended, append = [], results.Journal.append

    def interrupting(self, name, quadrature):
        append(self, name, quadrature)
        appended.append(quadrature.num_matvecs)
        if len(appended) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Journal, "append", interrupting)
        assert run(*command, "out") == 130
    begun = sum(q.num_matvecs for q in results.Journal(Path("out/blocks.jsonl")).finished.values())
    said(capsys)
    assert run(*command, "out") == 0
    spectra = ht.load("out/result")["spectra"]
    _, err = said(capsys)
    left = spectra.num_matvecs - begun
    assert 0 < left < whole.num_matvecs
    assert any(
        f"{left} Hessian-vector products for 4 blocks (after {begun} before)" in line
        for line in err
    )
    assert spectra.num_matvecs == pytest.approx(whole.num_matvecs, rel=0.3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tolerance", "0"), "'0' is not a positive number, such as 0.05"),
        (("--tolerance", "5%"), "'5%' is not a positive number"),
        (
            ("--reading", "log", "bounded", "--tolerance", "0.1"),
            "--tolerance 0.1 cannot be had of bounded, the literature's",
        ),
        (("--exact", "0"), "'0' is not a whole number of at least 1"),
        (("--tolerance", "0.1", "--reading", "js"), "invalid choice: 'js'"),
        (("--tolerance", "0.1", "--probes", "1", "--steps", "4"), "max_matvecs is 4"),
        (
            ("--precision", "tf32", "--dtype", "float64"),
            "precision is 'tf32', which is about products in float32",
        ),
    ],
)
def test_bad_tolerances_and_precisions_are_one_line(options, told, capsys):
    assert run("js0", "--model", "own.py:net", "--no-verify", *options) == 2
    _, err = said(capsys)
    assert len(err) == 1 and told in err[0]


OF_SPECTRA = (
    "(default: what --tolerance needs, or 4; paper: 10)",
    "(default: what --tolerance needs, or 40; paper: 100)",
)
HELP = {  # command -> number of options, what its help tells
    "js0": (28, (*OF_SPECTRA, "(default: weights; paper: official)")),
    "spectrum": (26, (*OF_SPECTRA, "(default: model; paper: official)")),
    "partition": (
        31,
        ("arXiv 2406.16793", "(default: adam_mini)", "Exit code 1 when a claim is contradicted"),
    ),
    "quadratic": (
        17,
        ("(default: 5000; cases 3 and 4: 2000; a file's own; paper: 5000, thesis: 2000)",),
    ),
}


@pytest.mark.parametrize("command", HELP)
def test_help_tells_defaults_and_sources(command, capsys):
    with pytest.raises(SystemExit) as exit:
        run(command, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and "(default: None)" not in out and "(default: True)" not in out
    actions = next(iter(cli._parser()._subparsers._group_actions)).choices[command]._actions
    options = [action for action in actions if action.dest != "help"]
    count, words = HELP[command]
    assert len(options) == count and all(action.help for action in options)
    for action in options:
        told = re.search(r"\(default: ([^,;)]+)", action.help)
        assert action.required or told or not action.option_strings, action.dest
        if (
            isinstance(action.default, str | int | float)
            and not isinstance(action.default, bool)
            and told
        ):
            number = isinstance(action.default, int | float)
            assert float(told[1]) == action.default if number else told[1] == action.default, (
                action.dest
            )
    for told in (*words, "arXiv 2402.16788", "130 interrupted", "HESSIAN_TOOLS_TRACEBACK=1"):
        assert told in out


def computed_blocks(monkeypatch):
    """Names of the blocks that the engine multiplies from now on."""
    names, product = [], StackedBlocks.matmat

    def counted(self, vectors):
        names.extend(self.names)
        return product(self, vectors)

    monkeypatch.setattr(StackedBlocks, "matmat", counted)
    return names


def test_a_finished_run_repeated_computes_nothing(capsys, monkeypatch):
    command = ("js0", "--model", "own.py:net", "--out", "out", *FAST)
    assert run(*command) == 0
    out, _ = said(capsys)
    files = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path("out").glob("result.*")
    }
    Path("out/js_matrix.png").unlink()

    def forbidden(*arguments, **keywords):
        raise AssertionError("computed")

    for name in ("operator_for", "blockwise_slq", "js_heterogeneity"):
        monkeypatch.setattr(spectra_command, name, forbidden)
    assert run(*command) == 0
    again, err = said(capsys)
    assert again == out and "nothing is computed" in err[0]
    assert Path("out/js_matrix.png").exists()  # drawing may have been what was interrupted
    assert files == {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path("out").glob("result.*")
    }


@pytest.mark.parametrize(
    "change, told",
    [
        (("--probes", "3"), "another probes (probes was 2, is now 3)"),
        (("--steps", "4"), "another steps (steps was 3, is now 4)"),
        (
            ("--probe-kind", "gaussian"),
            'another probe_kind (probe_kind was "rademacher", is now "gaussian")',
        ),
        (("--seed", "1"), "another seed, network_and_data (seed was 0, is now 1)"),
        (("--blocks", "semantic"), 'another blocks (blocks was ["weights"], is now ["semantic"])'),
        (
            ("--dtype", "float64"),
            'another dtype, network_and_data (dtype was "float32", is now "float64")',
        ),
        (("--model", "own.py:problem"), 'another function (function was "net", is now "problem")'),
    ],
)
def test_another_configuration_is_refused(change, told, capsys, undrawn):
    command = ("js0", "--model", "own.py:net", "--out", "out", *FAST)
    assert run(*command) == 0
    said(capsys)
    assert run(*command, *change) == 2
    _, err = said(capsys)
    assert len(err) == 1 and told in err[0] and "name another folder" in err[0]
    assert run(*command) == 0


def test_other_data_are_refused_although_the_file_is_the_same(capsys, monkeypatch, undrawn):
    command = ("js0", "--model", "own.py:net", "--out", "out", *FAST)
    assert run(*command) == 0
    monkeypatch.setenv("SHIFT", "1e-3")
    assert run(*command) == 2
    assert "another network_and_data" in said(capsys)[1][-1]


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}'),
        ("config.json", "[1]"),
        ("config.json", "no json"),
        ("result.json", "{}"),
        ("result.npz", "x"),
        ("blocks.jsonl", "x"),
    ],
)
def test_a_folder_of_other_files_is_left_alone(name, content, capsys):
    Path("out").mkdir()
    (Path("out") / name).write_text(content)
    assert run("js0", "--model", "own.py:net", "--out", "out", *FAST) == 2
    assert [(path.name, path.read_text()) for path in Path("out").iterdir()] == [(name, content)]
    assert len(said(capsys)[1]) == 1


def test_interrupted_before_any_block_the_folder_takes_any_configuration(
    capsys, monkeypatch, undrawn
):
    def interrupted(self, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ht.HessianOperator, "verify", interrupted)
        assert run("js0", "--model", "own.py:net", "--out", "out", *FAST[:4]) == 130
    out, err = said(capsys)
    assert out == "" and err == [
        "hessian-tools: interrupted; finished blocks are kept in out, the same command goes on"
    ]
    assert run("js0", "--model", "own.py:net", "--out", "out", "--probes", "3", "--steps", "2") == 0
    assert ht.load("out/result")["spectra"].num_probes == 3


VERIFIED = ("spectrum", "--model", "own.py:net", "--probes", "1", "--steps", "2")


def verification(capsys):
    """What a run says of its verification."""
    found = [line for line in said(capsys)[1] if "erified" in line]
    return found[0].split(",")[0].split(":")[0] if found else ""


def test_a_network_is_verified_once(capsys, monkeypatch):
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified (quick set")
    assert run(*VERIFIED, "--seed", "0") == 0
    assert verification(capsys).startswith("verified before (the quick set")
    assert run(*VERIFIED, "--verify", "full") == 0
    assert verification(capsys).startswith("verified (full set")
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified before (the full set")
    assert run(*VERIFIED, "--verify", "never") == 0
    assert verification(capsys) == ""
    monkeypatch.setenv("SHIFT", "1e-3")  # other data
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified (quick set")


def test_other_code_is_verified_again(capsys):
    assert run(*VERIFIED) == 0
    with open("own.py", "a") as file:
        file.write("\n# changed\n")
    capsys.readouterr()
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified (quick set")


def test_a_changed_file_that_the_model_imports_is_verified_again(capsys, monkeypatch):
    Path("pieces_of_own.py").write_text("def scaled(x):\n    return x\n")
    with open("own.py", "a") as file:
        file.write("\nfrom pieces_of_own import scaled\n")
    for factor, outcome in (("", "verified (quick set"), (" * 2", "verified (quick set")):
        Path("pieces_of_own.py").write_text(f"def scaled(x):\n    return x{factor}\n")
        assert run(*VERIFIED) == 0
        assert verification(capsys).startswith(outcome)
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified before")
    sys.modules.pop("pieces_of_own")


def test_a_long_run_is_verified_in_full(capsys):
    long = ("spectrum", "--model", "own.py:wide", "--probes", "30", "--steps", "20")
    assert run(*long) == 0
    assert verification(capsys).startswith("verified (full set")


def test_what_fails_is_not_remembered(capsys, monkeypatch):
    class Failed:
        passed = False
        failures = ("FAILED symmetry",)

    with monkeypatch.context() as patch:
        patch.setattr(ht.HessianOperator, "verify", lambda self, **options: Failed)
        assert run(*VERIFIED) != 0
    assert "fail verification: FAILED symmetry" in said(capsys)[1][-1]
    assert run(*VERIFIED) == 0
    assert verification(capsys).startswith("verified (quick set")


def test_without_a_place_to_remember_the_run_goes_on(capsys, monkeypatch):
    Path("taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "taken")
    assert run(*VERIFIED) == 0
    lines = said(capsys)[1]
    assert any(line.startswith("not remembered as verified") for line in lines), lines


@pytest.mark.parametrize("where", ["npz", "json", "journal", "pictures"])
def test_interrupted_while_saving_a_run_goes_on_without_computing(where, capsys, monkeypatch):
    command = ("js0", "--model", "own.py:net", "--out", "out", *FAST[:4])
    assert run("js0", "--model", "own.py:net", "--out", "whole", *FAST[:4]) == 0
    replace, unlink = os.replace, Path.unlink

    def crash_replacing(source, target):
        if str(target).endswith(f"result.{where}") or (
            where == "pictures" and str(target).endswith("matrix.png")
        ):
            raise KeyboardInterrupt
        replace(source, target)

    def crash_unlinking(path, missing_ok=False):
        if where == "journal" and path.name == "blocks.jsonl":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        if where != "pictures":
            patch.setattr(plotting, "draw", lambda *arguments, **options: [])
        patch.setattr(os, "replace", crash_replacing)
        patch.setattr(Path, "unlink", crash_unlinking)
        assert run(*command) == 130
    names = computed_blocks(monkeypatch)
    assert run(*command) == 0
    assert names == [] and same(ht.load("out/result"), ht.load("whole/result"))
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "block_spectra.png", "commands.json", "config.json", "js_matrix.png", "result.json",
        "result.npz",
    ]  # fmt: skip


def test_half_a_result_is_computed_again(monkeypatch, undrawn):
    command = ("js0", "--model", "own.py:net", "--out", "out", *FAST)
    assert run(*command) == 0
    Path("out/result.npz").unlink()
    names = computed_blocks(monkeypatch)
    assert run(*command) == 0 and set(names) == {"0.weight", "2.weight", "4.weight"}
    ht.load("out/result")


def test_a_killed_run_goes_on_where_it_was(capsys, monkeypatch, undrawn):
    """Real processes, one stopped by Ctrl-C, the next by kill -9: no finished block is computed
    again, and the numbers are those of a run that nobody stopped."""
    command = (
        "spectrum",
        "--model",
        "own.py:large",
        "--blocks",
        "weights",
        "--probes",
        "3",
        "--steps",
        "40",
        "--out",
    )
    journal, finished = Path("out/blocks.jsonl"), set()
    for by in (signal.SIGINT, signal.SIGKILL):
        process = start(*command, "out", stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > len(finished)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(by)
        out, err = process.communicate()
        assert out == "" and "Traceback" not in err
        if by == signal.SIGINT:
            assert process.returncode == 130 and err.splitlines()[-1].startswith(
                "hessian-tools: interrupted; finished"
            )
        else:
            assert process.returncode == -signal.SIGKILL
        before, finished = finished, set(results.Journal(journal).finished)
        assert before < finished
    with journal.open("a") as file:
        file.write('["46.weight", {"type": "Quad')  # as if it had been killed while writing
    names = computed_blocks(monkeypatch)
    assert run(*command, "out", "--no-verify") == 0
    left = 17 - len(finished)
    assert (
        left > 0 and len(set(names)) == left and not finished & set(names) and not journal.exists()
    )
    told = f"{120 * left} Hessian-vector products for {left} blocks ({len(finished)} were finished before)"
    assert told in capsys.readouterr().err
    assert run(*command, "whole", "--no-verify") == 0
    assert len(set(names)) == 17 and same(ht.load("out/result"), ht.load("whole/result"))


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    command = ("spectrum", "--model", "own.py:net", "--probes", "2", "--steps", "40", "--no-verify")
    assert run(*command) == 0
    _, err = said(capsys)
    assert (
        len(err) == 2
        and not re.search(r"HVP|it/s", err[0])
        and "own.py:net: 80 Hessian-vector products" in err[1]
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(*command) == 0
        monkeypatch.undo()
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(master, "rb", 0) as screen:
        while piece := screen.read(4096):
            shown += piece
    assert (
        re.search(rb"80/80 \[\d\d:\d\d<\d\d:\d\d", shown) and b"HVP" in shown
    )  # done, time spent < time left
    assert b"1 of 1 blocks to compute" in shown


def test_own_files_work_beside_a_torchvision_that_does_not_import(tmp_path):
    """In a fresh process; its reader hangs up, which is no error."""
    (tmp_path / "vision.py").write_text(
        "from torchvision.ops import MLP\nimport hessian_tools as ht, torch\n"
        "def make():\n    return MLP(4, [5, 2]), ht.mse, [(torch.randn(3, 4), torch.randn(3, 2))]\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    process = start("js0", "--model", tmp_path / "vision.py:make", *FAST, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 0
        and "Hessian-vector products for 2 blocks" in err
        and "Error" not in err
    ), err


def test_own_files_are_repaired_once_and_only_where_that_can_help(monkeypatch):
    Path("late.py").write_text("import repaired_by_the_test\nfrom own import net\n")
    calls = []

    def repair():
        calls.append(1)
        Path("repaired_by_the_test.py").write_text("")
        return len(calls) == 1

    monkeypatch.setattr(user_model, "repair", repair)
    problem, _ = user_model.problem_from("late.py:net")
    assert problem.num_parameters == 155 and calls == [1]
    with pytest.raises(ValueError, match="KeyError"):
        user_model.problem_from("own.py:fails")
    assert calls == [1]


def test_a_users_problem_is_seeded_and_overridden():
    first, identity = user_model.problem_from("own.py:problem", seed=3)
    assert identity["file"] == "own.py" and identity["function"] == "problem"
    torch.rand(5)
    again, _ = user_model.problem_from("own.py:problem", seed=3, dtype=torch.float64, device="cpu")
    assert again.dtype == torch.float64 and again.batches[0][0].dtype == torch.float64
    assert again.batches[0][1].dtype == torch.int64 and again.loss == pytest.approx(
        first.loss, rel=1e-6
    )
    assert user_model.problem_from("own.py:problem", seed=4)[0].loss != first.loss
    assert [
        user_model.problem_from("own.py:stated", batch_stats=x)[0].batch_stats
        for x in (None, False)
    ] == [True, False]
    assert [
        user_model.problem_from("own.py:norm", batch_stats=stats)[0].batch_stats
        for stats in (True, False)
    ] == [
        True,
        False,
    ]
    assert user_model.fingerprint(
        user_model.problem_from("own.py:norm", batch_stats=True)[0]
    ) == user_model.fingerprint(user_model.problem_from("own.py:norm", batch_stats=False)[0])


def test_fingerprint_sees_parameters_buffers_and_data():
    def problem(change=lambda model, batch: None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).eval()
        batch = (torch.randn(4, 2), torch.randn(4, 2))
        with torch.no_grad():
            change(model, batch)
        return user_model.fingerprint(ht.Problem(model, ht.mse, [batch], batch_stats=False))

    changes = [
        lambda model, batch: model[0].weight[1, 1].add_(1e-6),
        lambda model, batch: model[1].running_mean.add_(1),
        lambda model, batch: batch[1][3].add_(1e-6),
    ]
    assert len({problem(), *map(problem, changes)}) == 4 and problem() == problem()


def test_models_lists_the_zoo(capsys):
    assert run("models") == 0
    table = capsys.readouterr().out.splitlines()
    assert run("models", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == zoo.names() == [line.split()[0] for line in table[2:]]
    gpt2 = next(line for line in table if line.startswith("gpt2 "))
    assert "124,439,808" in gpt2 and "plays" in gpt2


@pytest.mark.parametrize("option", [[], ["--normalize"]])
def test_normalised_pictures_are_asked_for(option, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "draw", lambda *_, **options: drawn.append(options) or [])
    command = ("js0", "--model", "own.py:net", "--no-verify", "--probes", "1", "--steps", "2")
    assert run(*command, *option, "--out", tmp_path / "out") == 0
    assert drawn == [{"normalized": bool(option)}]
