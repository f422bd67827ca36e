"""benchmarks/gpu.py on a CPU at small size: what it counts against closed forms, what it keeps,
what it says."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.engine.memory import measuring
from hessian_tools.results import load

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_js0
import gpu_throughput
from gpu_measure import Clock, ResultFile, launches, matmul_rate, operations, seconds
from gpu_plan import BlockCost, Plan, counted

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = replace(
    gpu_js0.LLAMA_SMOKE, layers=1, chosen_layers=(0,), width=8, mlp=12, steps=2, precision="float32"
)


class Chain(nn.Sequential):
    def __init__(self, d):
        super().__init__(
            *[nn.Linear(d, d, bias=False) if i % 2 == 0 else nn.Tanh() for i in range(5)]
        )


def squares(model, batch):
    return model(batch).square().mean()


def test_plan_counts_the_matrix_products_of_a_block():
    n, d = 5, 7
    with torch.device("meta"):
        model, batch = Chain(d), torch.zeros(n, d)
        plan = counted(model, squares, batch, {"2.weight": 1, "4.weight": 7}, probes=3, steps=4)
    product = 2 * n * d * d
    assert plan.forward_operations == 3 * product
    # tangents of a block's layer and of those above it, forward and backward
    assert [cost.operations for cost in plan.costs] == [4 * product, 2 * product]
    assert [cost.size for cost in plan.costs] == [d * d, d]
    assert (
        plan.gradient_operations == (3 + 1 + 2) * product
    )  # forward, through the last layer, two weights
    assert plan.num_products == 3 * 4 * (1 + 7)
    assert plan.operations == plan.gradient_operations + 3 * 4 * (4 + 7 * 2) * product
    assert plan.parameters == 3 * d * d and plan.model_bytes == 4 * 3 * d * d


def test_plan_counts_the_lanczos_vectors():
    plan = Plan(
        1,
        4,
        1,
        1,
        1000,
        (BlockCost("a", 10, 2, 1, 1), BlockCost("b", 30, 1, 1, 1)),
        probes=3,
        steps=5,
    )
    reads = sum(
        2 * 2 * (j + 1) + 20 for j in range(5)
    )  # two passes, two readings of the vectors so far; the others
    assert plan.lanczos_traffic == 3 * reads * 4 * (2 * 10 + 30)
    assert plan.largest_basis == (5 + 5) * 4 * 30
    assert plan.memory == 4 + 2 * 1000 + plan.largest_basis
    assert plan.seconds(2.0, 4.0) == (
        plan.operations / 2,
        plan.product_traffic / 4,
        plan.lanczos_traffic / 4,
    )


@pytest.mark.parametrize("settings", [replace(gpu_js0.GPT2_SMOKE, chosen_layers=(3,)), TINY])
def test_plan_is_what_the_engine_does(settings):
    plan, problem = gpu_js0.plan(settings), gpu_js0.build_problem(settings, CPU)
    with measuring(CPU, 1 << 40) as live, problem.evaluating():
        loss = problem.batch_loss(problem.batches[0])
        gradients = torch.autograd.grad(loss, list(problem.parameters.values()), create_graph=True)
        assert live.now == pytest.approx(plan.graph_bytes, rel=0.1)
    del gradients
    hessian = ht.HessianOperator(problem, memory="1GiB")
    for cost in (plan.costs[0], plan.costs[-1]):
        block = hessian.block(ht.partition(problem.model, [cost.name])[cost.name])
        vector = torch.ones(1, block.size)
        block.matmat(vector)
        assert (
            0.5 * cost.operations
            < operations(lambda b=block, v=vector: b.matmat(v))
            <= cost.operations
        )


def test_blocks_are_the_official_ones():
    problem = gpu_js0.build_problem(gpu_js0.GPT2_SMOKE, CPU)
    official = ht.partition(problem.model, "official")
    assert {block.parameter for block in official} == set(
        gpu_js0.chosen_tensors(gpu_js0.GPT2_SMOKE)
    )
    assert len(official) == sum(gpu_js0.chosen_tensors(gpu_js0.GPT2).values()) == 25


def test_llama_has_the_published_size():
    with torch.device("meta"):
        model = gpu_js0.build_model(gpu_js0.LLAMA, torch.device("meta"))
    d, mlp, layers, vocabulary = 4096, 11008, 32, 32000
    assert sum(p.numel() for p in model.parameters()) == (
        2 * vocabulary * d + layers * (4 * d * d + 3 * d * mlp + 2 * d) + d
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert set(gpu_js0.chosen_tensors(gpu_js0.LLAMA)) <= {
        name for name, _ in model.named_parameters()
    }


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path):
    whole = gpu_js0.run(TINY, CPU, tmp_path / "whole", None)
    with pytest.raises(gpu_js0.Stopped, match="1 of 9 blocks"):
        gpu_js0.run(TINY, CPU, tmp_path / "cut", 0.0)
    assert gpu_js0.run(TINY, CPU, tmp_path / "cut", None)["readings"] == whole["readings"]
    one, other = (
        load(gpu_js0.folder(tmp_path / out, TINY) / "result")["spectra"] for out in ("whole", "cut")
    )
    assert len(one) == 9 and all(np.array_equal(one[name].nodes, other[name].nodes) for name in one)
    assert set(whole["seconds"]) == {"model", "planning", "recording", "products", "lanczos", "js"}
    assert whole["total"] == pytest.approx(sum(whole["seconds"].values()))
    assert gpu_js0.run(TINY, CPU, tmp_path / "whole", None) == whole  # from the file


def test_results_are_kept_and_never_mixed(tmp_path):
    results = ResultFile(tmp_path / "sub" / "r.json", {"settings": {"a": (1, 2)}})
    results.add({"model": "x", "k": 1})
    again = ResultFile(tmp_path / "sub" / "r.json", {"settings": {"a": [1, 2]}})
    assert (
        again.rows == [{"model": "x", "k": 1}]
        and again.has(model="x", k=1)
        and not again.has(model="x", k=2)
    )
    with pytest.raises(ValueError, match="another settings"):
        ResultFile(tmp_path / "sub" / "r.json", {"settings": {"a": [1, 3]}})


def test_measurements():
    a = torch.ones(3, 4)
    found = launches(lambda: (a + a).T.sum(), CPU)
    assert found["operators"] == 2 and found["kernels"] is None
    calls = []
    taken = seconds(lambda: calls.append(1), CPU, 3)
    assert len(calls) == 4 and taken["low"] <= taken["median"] <= taken["high"]
    row = matmul_rate("bfloat16", 16, CPU, 2)
    assert row["rate"] == pytest.approx(2 * 16**3 / row["seconds"]["median"])
    clock = Clock(CPU)
    with clock.running():
        pass
    assert clock.taken() > 0 and clock.taken() == 0


def test_resnet50_is_built():
    settings = replace(gpu_throughput.SMOKE, images=2, image_size=32)
    problem = gpu_throughput.build("resnet50", settings, CPU, "bfloat16")
    assert problem.num_parameters == 23_528_522 and problem.dtype == torch.bfloat16


def test_everything_by_one_command(tmp_path, monkeypatch, capsys):
    small = {
        "models": ("mlp", "llama"),
        "small_models": ("mlp",),
        "images": 2,
        "image_size": 28,
        "matrix_sizes": (16,),
    }
    monkeypatch.setattr(
        gpu_throughput, "SMOKE", replace(gpu_throughput.SMOKE, **small, llama=(8, 12, 2, 1))
    )
    monkeypatch.setattr(gpu_js0, "LLAMA_SMOKE", TINY)
    command = ["--device", "cpu", "--smoke", "--out", str(tmp_path), "--precision", "float32"]
    assert gpu.main([*command, "--only", "rates", "products", "launches", "llama"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("full, k = 2", "block product", "JS0 of llama", "6.00"))
    products = json.loads((tmp_path / "gpu_products.json").read_text())
    assert {(row["model"], row["precision"]) for row in products["rows"]} == {
        (m, p) for m in ("mlp", "llama") for p in ("float32", "bfloat16")
    }
    assert products["hardware"]["device"] == "cpu" and all(
        row["share"] > 0 for row in products["rows"]
    )
    unasked = [line for line in text.splitlines() if line.startswith("JS0 of gpt2-nano")]
    assert len(unasked) == 3 and all(line.endswith("not measured") for line in unasked)
    assert gpu.main(["--table", "--smoke", "--out", str(tmp_path)]) == 0
    assert text.endswith(capsys.readouterr().out)


def test_what_is_not_measured_says_so(tmp_path, capsys):
    assert gpu.main(["--table", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert (
        text.count("not measured") == 2 + 1 + 3 + 1
    )  # rates, products; launches; three precisions of GPT-2; Llama


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "reason"), [([], "no CUDA device"), (["--device", "cpu"], "only with --smoke")]
)
def test_without_a_gpu_one_line_says_what_to_do(arguments, reason, tmp_path, capsys):
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_plans_need_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_js0, "LLAMA", TINY)
    assert (
        gpu.main(["--plan-only", "--only", "llama", "--out", str(tmp_path), "--share", "0.5"]) == 0
    )
    text = capsys.readouterr().out
    assert "at 50% of 50 TFLOP/s" in text and "assumptions" in text
    needed = gpu_js0.plan(TINY).operations / (40 * 60) / 50e12
    assert f"the goal of 40 minutes asks for {needed:.2%}" in text
    (tmp_path / "gpu_rates.json").write_text(
        json.dumps({"rows": [{"precision": "float32", "rate": 3e13}]})
    )
    gpu.main(["--plan-only", "--only", "llama", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "of 30 TFLOP/s" in text and "assumptions" not in text
