"""Every test draws the same random numbers, alone and in company."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_memory_of_verified_networks(monkeypatch, tmp_path_factory):
    """What one test has verified, no other may take as verified."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
