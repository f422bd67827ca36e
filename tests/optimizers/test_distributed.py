"""Two processes with half of every batch each come to the weights of one process with all of it."""

import warnings

import pytest
import torch
from problems import relative_error

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

with warnings.catch_warnings():
    # torch.distributed.optim compiles its parts as it is imported, in a way that torch has retired
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from problems import ranks

NUM_RANKS = 2


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """(weights by way and preset, refusals) of every process."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.work, (NUM_RANKS, str(folder)), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("preset", ranks.PRESETS)
def test_two_processes_train_as_one(of_ranks, way, preset):
    model, tokens = ranks.model_and_tokens()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = ranks.trained(model, ranks.optimizer_of(model, preset), tokens)
    assert relative_error(before, expected) > 1e-3  # or nothing was trained
    for weights, _ in of_ranks:
        assert relative_error(weights[way, preset], expected) < 1e-12
    (first, _), (second, _) = of_ranks
    assert torch.equal(first[way, preset], second[way, preset])


def test_what_cannot_work_is_refused_in_every_process(of_ranks):
    for _, (inner, wrapped, torn) in of_ranks:
        assert "'tokens.weight'" in inner and "has it as 'module.tokens.weight'" in inner
        assert "has it as 'tokens.weight'" in wrapped
        assert "with their wrapper (DistributedDataParallel, torch.compile)" in wrapped
        assert "share out tensors among processes" in torn
