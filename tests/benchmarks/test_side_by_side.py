"""The side-by-side benchmark: its referee, its contenders' answers, its bookkeeping, and one tiny
run of all of it."""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import dense_gauss_newton

from hessian_tools.problem.networks import MLP

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peaks  # noqa: E402
import side_by_side  # noqa: E402
from contest import referee  # noqa: E402
from contest.cases import Case, Work, build, criterion  # noqa: E402
from contest.contender import quadrature, smoothed  # noqa: E402
from contest.contenders import CONTENDERS, HessianTools  # noqa: E402
from contest.jobs import Bench  # noqa: E402
from contest.processes import Process  # noqa: E402
from contest.tables import markdown, spread, summarise  # noqa: E402

pytestmark = pytest.mark.slow

# PyHessian's gradients, and an import of curvlinops
THEIR_WARNINGS = pytest.mark.filterwarnings(
    "ignore:Using backward", "ignore:.torch.jit:DeprecationWarning"
)
WORK = Work(probes=2, density=(2, 3), blockwise=(2, 4), sample=(1, 2))


@pytest.fixture
def tiny() -> Case:
    model = MLP((6, 5, 4, 3)).double()
    batches = [(torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,)))]
    return Case("tiny", "", model, batches, ("1.weight", "3.weight", "5.weight"), 3, WORK)


def loaded(name: str) -> type:
    contender = CONTENDERS[name]
    try:
        contender.load()
    except ImportError:
        pytest.skip(f"{contender.package} is not installed; `make bench` has it")
    return contender


def dense(case: Case) -> torch.Tensor:
    """The Hessian from autograd's loop of double backward."""
    parameters = list(case.model.parameters())
    loss = sum(len(y) * criterion(case.model(x), y) for x, y in case.batches) / sum(
        len(y) for _, y in case.batches
    )
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_referee_agrees_with_double_backward(tiny):
    products, uncertainty = referee.reference(tiny)
    matrix, vectors = dense(tiny), referee.whole_directions(tiny)
    assert uncertainty < 1e-6 and set(products) >= {referee.WHOLE, referee.SMALL}
    for name, vector in zip((referee.WHOLE, referee.SMALL), vectors, strict=True):
        assert referee.relative_error(products[name], matrix @ vector) < 1e-6
    block, vector = matrix[:30, :30], referee.block_directions(tiny)["1.weight"]
    assert referee.relative_error(products["block 1.weight"], block @ vector.flatten()) < 1e-6
    assert not vectors[1][:30].any() and torch.equal(vectors[1][30:35], vectors[0][30:35])


def test_referee_agrees_with_a_dense_gauss_newton_matrix(tiny):
    products, _ = referee.reference(tiny)
    matrix = dense_gauss_newton(tiny.problem()).to(tiny.dtype)
    vectors = referee.whole_directions(tiny)
    for name, vector in zip((referee.OUTPUTS, referee.OUTPUTS_SMALL), vectors, strict=True):
        assert referee.relative_error(products[name], matrix @ vector) < 1e-6
    vector = referee.block_directions(tiny)["1.weight"].flatten()
    found = products[referee.OUTPUTS_BLOCK + "1.weight"]
    assert referee.relative_error(found, matrix[:30, :30] @ vector) < 1e-6


@THEIR_WARNINGS
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_give_the_hessian_and_spectra_inside_its_own(name, tiny):
    bench = Bench(loaded(name), tiny)
    matrix = dense(tiny)
    bench.warm()
    assert max(bench.errors(referee.reference(tiny)[0]).values()) < 1e-6
    rows = bench.contender.rows(bench.contender.product(bench.contender.layout(bench.vectors)))
    torch.testing.assert_close(rows.detach(), bench.vectors @ matrix)
    values = torch.linalg.eigvalsh(matrix[:30, :30])
    spectrum = bench.contender.blockwise(2, 4)["1.weight"]
    assert spectrum.nodes.shape == (2, 4) and spectrum.size == 30
    assert spectrum.weights.sum(axis=1) == pytest.approx(1, abs=1e-5)
    slack = 1e-6 * float(values.abs().max())
    assert spectrum.nodes.min() > values[0] - slack and spectrum.nodes.max() < values[-1] + slack
    density, blockwise = bench.repeat("c"), bench.repeat("d")
    assert (
        0.8 < density.facts["mass"] < 1.05 and density.scale == 1
    )  # of so few nodes some grids lose the tails
    part = blockwise.facts["probes"] * blockwise.facts["steps"]
    assert part == (2 if bench.kind.rebuilds else 8)
    whole = blockwise.seconds * blockwise.scale - blockwise.facts["unscaled"]
    assert whole == pytest.approx(8 / part * (blockwise.seconds - blockwise.facts["unscaled"]))


def test_official_lanczos_has_the_moments_of_its_probe(tiny):
    official = CONTENDERS["official"](tiny)
    torch.manual_seed(1)
    nodes, weights = official.lanczos(("1.weight",), 1, 4)
    torch.manual_seed(1)
    probe = torch.randn(30, dtype=torch.float64)
    probe /= probe.norm()
    product = dense(tiny)[:30, :30] @ probe
    for power, expected in ((1, probe @ product), (2, product @ product)):
        assert float((weights * nodes**power).sum()) == pytest.approx(float(expected), rel=1e-5)


@THEIR_WARNINGS
@pytest.mark.parametrize(
    ("name", "case", "right"),
    [("ours", "uneven", True), ("ours", "ignored", True), ("official", "uneven", False), ("official", "ignored", False),
     ("eigenthings", "uneven", False), ("eigenthings", "ignored", False), ("curvlinops", "uneven", True),
     ("curvlinops", "ignored", False), ("pyhessian", "uneven", True), ("pyhessian", "ignored", False)],
)  # fmt: skip
def test_who_weighs_batches_rightly(name, case, right):
    special = build(case, "cpu", torch.float32, smoke=True)
    errors = Bench(loaded(name), special).errors(referee.reference(special)[0])
    assert (max(errors.values()) < referee.BOUNDS[torch.float32]) is right


def test_a_wrong_hessian_is_found(tiny):
    class Wrong(HessianTools):
        def product(self, vectors):
            return 1.001 * super().product(vectors)

    errors = Bench(Wrong, tiny).errors(referee.reference(tiny)[0])
    assert (
        errors[referee.WHOLE] == pytest.approx(1e-3, rel=1e-3) and errors["block 1.weight"] < 1e-6
    )


def test_spectra_of_libraries_are_sorted_and_padded():
    nodes, weights = (
        torch.tensor([[2.0, 1.0, float("nan")], [1.0, 2.0, 3.0]]),
        torch.tensor([[0.3, 0.7, 0], [1, 0, 0]]),
    )
    found = quadrature(nodes, weights, 9)
    assert found.nodes.tolist() == [[1, 2, 2], [1, 2, 3]] and found.steps.tolist() == [2, 3]
    assert found.moment(1).value == pytest.approx(((0.7 + 0.6) + 1) / 2)
    grid, density = smoothed(found.nodes, found.weights)
    assert torch.trapezoid(torch.tensor(density), torch.tensor(grid)) == pytest.approx(1, abs=1e-5)


def entry(*seconds: float, scale: float = 1.0) -> dict:
    repetitions = [
        {"seconds": s, "scale": scale, "facts": {"probes": 1, "steps": 1}} for s in seconds
    ]
    return {"repetitions": repetitions, "peak_bytes": 2**20}


def test_tables_show_the_wrong_and_the_failed_and_choose_the_best_right_one():
    names = ("ours", "fast", "slow", "broken")
    contenders = {
        "ours": entry(1, 2, 4),
        "fast": entry(1, 1, 1),
        "slow": entry(1, 2, 5, scale=3),
        "broken": {},
    }
    contenders["broken"] = {"error": "RuntimeError: no | kernel"}
    errors = {"ours": 1e-7, "fast": 1e-2, "slow": 1e-6, "broken": 1e-7}
    correctness = {
        name: {"errors": {referee.WHOLE: e, "block w": 1e-7}, "notes": []}
        for name, e in errors.items()
    }
    model = {"description": "m", "uncertainty": 1e-8, "bound": 1e-4, "correctness": correctness,
             "jobs": {"c": {"text": "density", "contenders": contenders}}}  # fmt: skip
    result = {"hardware": {"cpu": "x", "cores": 2, "threads": 2, "gpu": None}, "packages": {}, "special": {},
              "settings": {"rounds": {"c": 3}, "dtype": "float32"}, "models": {"m": model},
              "contenders": {name: {"label": name, "how": "so"} for name in names}}  # fmt: skip
    summarise(result)
    assert model["jobs"]["c"]["best_other"] == {"contender": "slow", "ratio": 3.0}
    assert contenders["slow"]["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.375}
    text = markdown(result)
    for shown in (
        "WRONG (1e-02): 0.50",
        "~3.00 (3.00-3.38)",
        "failed: RuntimeError: no / kernel",
        "slow 3.00",
        "GPU: not",
    ):
        assert shown in text
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_a_case_that_is_killed_or_late_is_told_and_the_next_one_opens(tmp_path):
    with (tmp_path / "log").open("wb+") as log:
        process = Process("ours", ["mlp"], log, 60)
        case = {"name": "mlp", "device": "cpu", "dtype": "float32", "threads": 1, "smoke": True}
        try:
            assert process.loaded() == {}
            assert process.open(**case) == {"threads": 1}
            assert "no_such_job" in process.ask("repeat", job="no_such_job").get("error", "")
            children = (
                Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
                .read_text()
                .split()
            )
            os.kill(int(children[0]), signal.SIGKILL)
            answer = process.ask("repeat", job="a1")
            assert "SIGKILL" in answer["error"] and answer["closed"]
            assert process.open(**case) == {"threads": 1}
            assert process.ask("repeat", job="a1")["seconds"] > 0
            process.limit = 1e-4
            assert "given up" in process.ask("repeat", job="a8")["error"]
            assert "given up" in process.ask("repeat", job="a8")["error"]
            process.limit = 60
            assert process.open(**case) == {"threads": 1}
        finally:
            process.end()


def test_smoke_run_writes_what_table_and_figure_need(tmp_path, monkeypatch, capsys):
    out, figure = tmp_path / "result.json", tmp_path / "figure.png"
    chosen = "--models gpt --jobs a1 b d --contenders ours official"
    monkeypatch.setattr(
        sys, "argv", ["side_by_side.py", "--smoke", "--out", str(out), *chosen.split()]
    )
    side_by_side.main()
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--table", "--out", str(out)])
    side_by_side.main()
    assert capsys.readouterr().out == printed and printed.count("| gpt |") == 9
    runpy.run_path(str(ROOT / "figures" / "benchmark.py"))["main"](str(out), str(figure))
    assert figure.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*partial*"))
    result = json.loads(out.read_text())
    jobs = result["models"]["gpt"]["jobs"]
    assert list(jobs) == ["a1", "b", "d"] and result["hardware"]["cpu"]
    for job in jobs.values():
        for contender in job["contenders"].values():
            assert (
                contender["right"]
                and contender["peak_bytes"] > 0
                and len(contender["repetitions"]) == 1
            )
    ours, official = (jobs["b"]["contenders"][name]["F_a_product"] for name in ("ours", "official"))
    assert ours < 2.5 and official > 3 * ours
    assert jobs["a1"]["contenders"]["official"]["F_a_product"] == pytest.approx(9, rel=1e-2)
    assert result["special"]["uneven"]["correctness"]["official"]["errors"][referee.WHOLE] > 0.1


def test_jobs_are_added_to_a_file_of_the_same_machine_only():
    def entry(job):
        return {"text": job, "contenders": {"ours": {}}}

    old = {"hardware": {"cpu": "x"}, "packages": {"torch": "2"}, "contenders": {"ours": 1, "official": 2}, "models": {
        "gpt": {"jobs": {"a1": entry("old"), "c": entry("old")}, "correctness": {"official": 1}, "F": 1}}}  # fmt: skip
    new = {"hardware": {"cpu": "x"}, "packages": {"torch": "2"}, "contenders": {"ours": 1}, "models": {
        "gpt": {"jobs": {"b": entry("new"), "c": entry("new")}, "correctness": {"ours": 0}, "F": 2},
        "mlp": {"jobs": {"b": entry("new")}, "correctness": {}, "F": 3}}}  # fmt: skip
    found = side_by_side.added(old, new)
    gpt = found["models"]["gpt"]
    assert [(job, entry["text"]) for job, entry in gpt["jobs"].items()] == [
        ("a1", "old"),
        ("b", "new"),
        ("c", "new"),
    ]
    assert gpt["correctness"] == {"official": 1, "ours": 0} and list(found["contenders"]) == [
        "ours",
        "official",
    ]
    assert list(found["models"]) == ["gpt", "mlp"]
    with pytest.raises(SystemExit, match="--add: packages of the file"):
        side_by_side.added(old, new | {"packages": {"torch": "3"}})


def script(monkeypatch, capsys, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_route_is_timed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "routes.json"
    printed = script(
        monkeypatch,
        capsys,
        "routes.py",
        "--smoke",
        "--models",
        "gpt",
        "--rounds",
        "1",
        "--out",
        str(out),
    )
    passes = json.loads(out.read_text())["models"]["gpt"]["forward_passes"]
    assert len(passes) == 9 and all(
        way in printed and len(taken) == 1 for way, taken in passes.items()
    )


def test_a_long_context_states_its_peak(tmp_path, monkeypatch, capsys):
    out = tmp_path / "long.json"
    arguments = ("--model", "gpt2-nano", "--context", "32", "--memory", "1GB", "--out", str(out))
    assert "at its peak" in script(monkeypatch, capsys, "long_context.py", *arguments)
    facts = json.loads(out.read_text())
    assert (
        0 < facts["process_GiB_before"] <= facts["process_GiB_peak"] and facts["product_norm"] > 0
    )


def test_more_memory_lets_more_probes_go_together(monkeypatch, capsys):
    lines = script(monkeypatch, capsys, "plan_table.py", "--smoke").splitlines()
    small, large = (line.split() for line in lines[2:4])
    assert small[1:3] == ["100MB", "recorded"] and large[1:3] == ["16GB", "recorded"]
    assert int(small[5]) < int(large[5])


def test_a_whole_run_is_divided_up(tmp_path, monkeypatch, capsys):
    out = tmp_path / "profile.txt"
    script(monkeypatch, capsys, "profile_run.py", "--smoke", "--out", str(out))
    lines = out.read_text().splitlines()
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:-1]]
    assert (
        "exit code 0" in lines[0]
        and lines[-1].endswith("s")
        and sum(shares) == pytest.approx(100, abs=1)
    )
    assert any(line.startswith("second-order passes") for line in lines)


def test_planned_peaks_are_held_against_the_process(tmp_path, monkeypatch, capsys):
    found = peaks.measured("gpt", "tangent program", 2, "cpu", smoke=True)
    assert found["planned"] > 0 and found["taken"] > 0 and "tangent program" in found["plan"]
    out, row = tmp_path / "peaks.json", {"planned": 1000, "taken": 1100, "plan": "some"}
    done = SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(row)}\n")
    monkeypatch.setattr(peaks.subprocess, "run", lambda command, **options: done)
    monkeypatch.setattr(sys, "argv", ["peaks.py", "--models", "gpt", "--out", str(out)])
    peaks.main()
    assert capsys.readouterr().out.count("+10%") == len(peaks.WAYS) * len(peaks.PROBES)
    assert json.loads(out.read_text())["peaks"][0] == {
        "model": "gpt",
        "way": "recorded",
        "probes": 1,
        **row,
    }
    done.returncode, done.stderr = 1, "Traceback\nMemoryError: no more"
    with pytest.raises(SystemExit, match="gpt, recorded, 1 probes: MemoryError: no more"):
        peaks.main()
