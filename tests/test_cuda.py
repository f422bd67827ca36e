"""CUDA: the same numbers as on a CPU, memory as planned, and no wait for the device inside Lanczos.

``pytest -m cuda`` is the one command; what a CPU can tell about waiting is tested on one as well.
Products of every network and Lanczos itself are held against the CPU in test_hessian and
test_lanczos.
"""

import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import network, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessian_tools as ht
from hessian_tools.curvature import MonteCarloFisherOperator
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.spectra.probes import PROBE_KINDS, draw_probes

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_throughput
from gpu_measure import Clock, launches, matmul_rate, operations

MIB = 2**20


def cuda(test):
    return pytest.mark.cuda(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test)
    )


class Waits(TorchDispatchMode):
    """The operators, while ``on``, for which a CUDA device would have to be waited for: a value or
    a shape is read."""

    def __init__(self):
        super().__init__()
        self.on, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        reads = (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "item",
            "equal",
            "masked_select",
            "unique",
            "_unique",
        )
        if self.on and (masked or name.startswith(reads)):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Watched:
    """An operator that calls ``switch(True)`` in its first product and ``switch(False)`` after its
    last."""

    def __init__(self, operator, products, switch):
        self.operator, self.left, self.switch = operator, products, switch
        self.dtype, self.device = operator.dtype, operator.device
        self.steady = operator.steady

    def matmat(self, vectors):
        self.switch(True)
        product = self.operator.matmat(vectors)
        self.left -= 1
        if not self.left:
            self.switch(False)
        return product


KINDS = (ht.HessianOperator, ht.GaussNewtonOperator, ht.EmpiricalFisherOperator)


def operators(problem, record, kind=ht.HessianOperator):
    """The whole matrix, a weight, and pieces of a cut over two axes, each warmed up by one
    product."""
    hessian = kind(problem, record=record)
    cuts = ht.partition(problem.model, "head").cuts
    several = [cut for cut in cuts if len(cut.parts[0].axes) > 1 and cut.num_blocks > 3][:1]
    weight = ht.partition(problem.model, "weights").cuts[-1]
    found = [
        hessian,
        hessian.stacked(weight),
        *(hessian.stacked(cut.chunk(1, 4)) for cut in several),
    ]
    for operator in found:
        operator.matmat(
            torch.ones(getattr(operator, "num_blocks", 1), operator.size).to(
                operator.device, operator.dtype
            )
        )
    return found


def steps(operator, switch, m=3):
    start = torch.randn(2 * getattr(operator, "num_blocks", 1), operator.size)
    ht.lanczos(Watched(operator, m, switch), start, m)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("name", ["mlp", "batchnorm-batch", "gpt", "hf-gpt2", "hf-bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_reads_no_value(name, record, kind):
    for operator in operators(network(name, torch.float32), record, kind):
        with Waits() as waits:
            steps(operator, lambda on: setattr(waits, "on", on))
        assert waits.found == [], f"{type(operator).__name__} of size {operator.size}"


@pytest.mark.parametrize(
    "read", [lambda v: float(v.sum()), lambda v: bool((v > 0).any()), lambda v: v[v > 0]]
)
def test_a_value_that_is_read_is_found(read):
    operator = ht.curvature.DiagonalOperator(torch.arange(1.0, 9.0))
    plain = operator.matmat
    operator.matmat = lambda v: (read(v), plain(v))[1]
    with Waits() as waits:
        steps(operator, lambda on: setattr(waits, "on", on))
    assert waits.found


def forbid_waiting(on):
    with warnings.catch_warnings():
        # said once, that not every way to wait is found
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error" if on else "default")


@cuda
@pytest.mark.parametrize("name", ["mlp", "batchnorm-batch", "gpt", "hf-gpt2", "hf-bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_does_not_wait_for_the_device(name, kind):
    """Of a recorded graph; a rebuilt one contains the model's own forward pass, which may wait as
    it likes."""

    try:
        for operator in operators(network(name, torch.float32, "cuda"), True, kind):
            steps(operator, forbid_waiting)
    finally:
        forbid_waiting(False)


@cuda
def test_waiting_is_found():
    value = torch.ones(3, device="cuda")
    try:
        forbid_waiting(True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.sum().item()
    finally:
        forbid_waiting(False)


@cuda
@pytest.mark.parametrize("kind", PROBE_KINDS)
def test_probes_are_those_of_the_cpu(kind):
    here, there = (
        draw_probes(kind, 3, "block", 2, 1001, device=device) for device in ("cpu", "cuda")
    )
    assert torch.equal(here, there.cpu())


@cuda
@pytest.mark.parametrize("name", ["mlp", "batchnorm-batch", "gpt", "hf-gpt2"])
def test_spectra_are_those_of_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        problem = network(name, device=device)
        blocks = ht.partition(problem.model, "weights")
        found.append(
            ht.blockwise_slq(problem, blocks, num_probes=2, num_steps=5, seed=1, progress=False)
        )
    here, there = found
    for block in here:
        scale = np.abs(here[block].nodes).max()
        assert here[block].status == there[block].status
        np.testing.assert_allclose(there[block].nodes, here[block].nodes, rtol=0, atol=1e-8 * scale)
        np.testing.assert_allclose(there[block].weights, here[block].weights, rtol=0, atol=1e-6)


@cuda
@pytest.mark.parametrize("route", ["double backward", "tangent program"])
@pytest.mark.parametrize("kind", [*KINDS, ht.FisherOperator, MonteCarloFisherOperator])
@pytest.mark.parametrize("name", ["mlp", "batchnorm-batch", "gpt", "hf-gpt2"])
def test_products_are_those_of_the_cpu(name, kind, route):
    here = network(name)
    there = network(name, device="cuda")
    vectors = torch.randn(3, here.num_parameters, dtype=torch.float64)
    expected = kind(here, route=route).matmat(vectors)
    found = kind(there, route=route).matmat(vectors.cuda())
    assert relative_error(found.cpu(), expected) < 1e-10


@cuda
@pytest.mark.parametrize("rows", [1, 4])
def test_the_peak_of_gauss_newton_products_is_the_plans(big, rows):
    operator = ht.GaussNewtonOperator(big, memory="4GiB", route="double backward")
    vectors = torch.randn(rows, operator.size, device="cuda")
    peak, _ = peak_of(lambda: operator.matmat(vectors))
    assert peak <= operator.plan.peak_bytes(rows) * 1.1


@cuda
def test_a_cut_over_two_axes_is_gathered_by_index():
    here, there = (
        operators(network("hf-gpt2", device=device), True)[2] for device in ("cpu", "cuda")
    )
    vectors = torch.randn(2 * here.num_blocks, here.size, dtype=torch.float64)
    assert relative_error(there.matmat(vectors.cuda()).cpu(), here.matmat(vectors)) < 1e-10


@pytest.fixture
def big():
    """A problem of small blocks whose graph is hundreds of MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    model = NanoGPT(512, 128, layers=4, d=128, num_heads=4).cuda()
    tokens = torch.randint(512, (32, 129)).cuda()
    return ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


def peak_of(call):
    """Bytes of tensors at the peak of a call beyond those before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@cuda
@pytest.mark.parametrize("rows", [1, 4])
def test_the_peak_is_the_plans(big, rows):
    hessian = ht.HessianOperator(big, memory="4GiB")
    hessian.matmat(torch.randn(1, hessian.size, device="cuda"))
    hessian.release()
    # vectors and products count in the plan
    peak, _ = peak_of(lambda: hessian.matmat(torch.randn(rows, hessian.size, device="cuda")))
    planned = hessian.plan.peak_bytes(rows)
    # an H200 with torch 2.11 took 0.78 of the plan for four rows
    assert 0.75 * planned <= peak <= 1.15 * planned


@cuda
def test_a_quarter_of_the_graph_is_enough(big):
    plain = ht.HessianOperator(big, memory="4GiB", record=True)
    vectors = torch.randn(2, plain.size, device="cuda")
    expected = plain.matmat(vectors)
    plain.release()
    budget = plain.plan.graph_bytes // 4
    thrifty = ht.HessianOperator(big, memory=budget)
    peak, found = peak_of(lambda: thrifty.matmat(vectors))
    assert peak <= 1.15 * budget, thrifty.route
    assert relative_error(found, expected) < 1e-4


@cuda
def test_running_out_of_memory_loses_nothing(big):
    hessian = ht.HessianOperator(big, memory="16GiB")
    vectors = torch.randn(32, hessian.size, device="cuda")
    expected = hessian.matmat(vectors)
    hessian.release()
    gc.collect()
    torch.cuda.empty_cache()
    needed = torch.cuda.memory_reserved() + hessian.plan.peak_bytes(8)
    try:
        torch.cuda.set_per_process_memory_fraction(
            needed / torch.cuda.get_device_properties(0).total_memory
        )
        with pytest.warns(RuntimeWarning, match="goes on with"):
            found = hessian.matmat(vectors)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert hessian.plan.rows < 32 and "out of memory once" in hessian.route
    assert relative_error(found, expected) < 1e-4


@cuda
def test_tf32_is_used_where_asked_for_and_only_there():
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64 * 64, 64)
    ).cuda()
    batch = (torch.randn(16, 32, 8, 8).cuda(), torch.randint(64, (16,)).cuda())
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    products = {}
    for precision in ("ieee", "tf32"):
        hessian = ht.HessianOperator(
            ht.Problem(model, ht.cross_entropy, [batch]), precision=precision
        )
        products[precision] = hessian.matmat(torch.ones(1, hessian.size, device="cuda")).double()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    exact = ht.HessianOperator(
        ht.Problem(model.double(), ht.cross_entropy, [(batch[0].double(), batch[1])])
    )
    exact = exact.matmat(torch.ones(1, exact.size, device="cuda", dtype=torch.float64))
    assert relative_error(products["ieee"], exact) < 1e-5
    assert 1e-5 < relative_error(products["tf32"], exact) < 3e-2


@cuda
def test_a_bfloat16_model_has_float32_vectors():
    exact, coarse = network("gpt", torch.float32, "cuda"), network("gpt", torch.bfloat16, "cuda")
    hessians = [ht.HessianOperator(problem) for problem in (exact, coarse)]
    vectors = torch.randn(2, hessians[0].size, device="cuda")
    here, there = (hessian.matmat(vectors) for hessian in hessians)
    assert here.dtype == there.dtype == torch.float32
    assert relative_error(there, here) < 0.1


@cuda
def test_the_benchmark_measures_a_gpu(tmp_path, capsys):
    device = torch.device("cuda")
    a = torch.randn(64, 64, device=device)
    found = launches(lambda: (a @ a).relu(), device)
    assert found["operators"] == 2 and found["kernels"] >= 2 and found["device_seconds"] > 0
    clock = Clock(device)
    with clock.running():
        a @ a
    assert clock.taken() > 0 and clock.taken() == 0
    assert operations(lambda: a @ a) == 2 * 64**3
    assert all(
        matmul_rate(precision, 256, device, 2)["rate"] > 0
        for precision in ("float32", "tf32", "bfloat16")
    )
    assert gpu_throughput.replayed(lambda: a @ a, lambda: None, device, 2)["not_captured"] == ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert gpu.main(["--device", "cuda", "--smoke", "--out", str(tmp_path)]) == 0
    assert (
        "JS0 of llama" in capsys.readouterr().out
        and len(list(tmp_path.glob("gpu_*/run.json"))) == 4
    )
