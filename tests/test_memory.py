"""Budgets as users write them, and bytes counted against what autograd really keeps."""

import pytest
import torch
from problems import network
from torch import nn

import hessian_tools as ht
from hessian_tools.memory import AUTO_SHARE, budget_bytes, counting_saved_bytes, format_bytes, free_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("memory", "expected"), [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), (1234, 1234), ("1.5KiB", 1536), ("77", 77)]
)
def test_sizes_are_read(memory, expected):
    assert budget_bytes(memory, CPU) == expected


def test_auto_is_a_share_of_what_is_free():
    assert 0.8 < budget_bytes("auto", CPU) / (AUTO_SHARE * free_bytes(CPU)) < 1.25


@pytest.mark.parametrize("memory", ["8 apples", "-3", 0, "GiB"])
def test_wrong_budgets_are_refused(memory):
    with pytest.raises(ValueError, match=r"memory is .*8GiB"):
        ht.HessianOperator(network("mlp"), memory=memory)


def test_saved_bytes_are_those_autograd_keeps():
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    with counting_saved_bytes(list(model.parameters())) as saved:
        torch.tanh(model(x)).exp()
    assert saved.taken() == x.nbytes + 5 * 4 * 4 + 5 * 4 * 4  # input of the product, tanh's result, exp's; no weight


def test_bytes_in_words():
    assert [format_bytes(n) for n in (10, 2048, 3 * 2**30)] == ["10 B", "2 KiB", "3 GiB"]
