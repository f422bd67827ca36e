"""Budgets as users write them, and bytes counted against what is known to be alive."""

import platform
import subprocess
import sys

import pytest
import torch
from problems import network
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.engine.memory import (
    AUTO_SHARE,
    LiveBytes,
    OverBudget,
    budget_bytes,
    format_bytes,
    free_bytes,
    is_out_of_memory,
    measuring,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), (1234, 1234), ("1.5KiB", 1536), ("77", 77)],
)
def test_sizes_are_read(memory, expected):
    assert budget_bytes(memory, CPU) == expected


def test_auto_is_a_share_of_what_is_free():
    assert 0.8 < budget_bytes("auto", CPU) / (AUTO_SHARE * free_bytes(CPU)) < 1.25


@pytest.mark.parametrize("memory", ["8 apples", "-3", 0, "GiB"])
def test_wrong_budgets_are_refused(memory):
    with pytest.raises(ValueError, match=r"memory is .*8GiB"):
        ht.HessianOperator(network("mlp"), memory=memory)


def test_live_bytes_are_those_of_storages_alive():
    with LiveBytes() as live:
        x = torch.zeros(100)
        view, same = x[10:], x.add_(1)
        assert live.now == live.peak == 400
        del x, same
        assert live.now == 400  # the view holds the storage
        del view
        assert live.now == 0 and live.peak == 400
        live.restart()
        assert live.peak == 0


def test_live_bytes_see_what_a_graph_keeps_and_a_batched_backward_pass():
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    with LiveBytes() as live:
        y = torch.tanh(model(x)).exp()
        # tanh's result and exp's; the input and the weights are not new
        assert live.now == 2 * 5 * 4 * 4
        torch.autograd.grad(y, [model.weight], torch.zeros(7, 5, 4), is_grads_batched=True)
        assert live.peak >= live.now + 7 * 5 * 4 * 4


def test_measuring_stops_beyond_its_limit():
    with pytest.raises(OverBudget), measuring(CPU, 1000) as live:
        torch.zeros(200)
        assert live.peak == 800  # freed again
        torch.zeros(300)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measuring_reads_the_allocator_on_cuda():
    with measuring(torch.device("cuda")) as live:
        kept = torch.zeros(1 << 20, device="cuda")
        torch.zeros(1 << 20, device="cuda")
        assert live.now == kept.nbytes and live.peak == 2 * kept.nbytes
    with pytest.raises(OverBudget), measuring(torch.device("cuda"), 1000) as live:
        torch.zeros(1 << 20, device="cuda")
        _ = live.peak


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) == expected


def test_bytes_in_words():
    assert [format_bytes(n) for n in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3 GiB"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_freed_memory_is_kept_until_it_is_returned():
    script = """
import resource, torch
from hessian_tools.curvature.engine.memory import keep_freed_memory, return_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
before = resident()
keep_freed_memory()
for _ in range(6):
    torch.empty(16 << 20).zero_()  # 64 MiB, freed at once
kept = resident() - before
return_freed_memory()
print(kept, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    kept, left = map(int, done.stdout.split())  # MiB
    assert kept >= 60 and left <= kept - 60
