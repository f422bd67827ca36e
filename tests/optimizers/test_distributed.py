"""Two processes with half of every batch each come to the weights of one process with all of it."""

import pytest
import torch
from problems import relative_error

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

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
    before = ranks.weights(model)
    expected = ranks.trained(model, ranks.optimizer_of(model, preset), tokens)
    assert relative_error(before, expected) > 1e-3  # or nothing was trained
    for weights, _ in of_ranks:
        assert relative_error(weights[way, preset], expected) < 1e-12
    (first, _), (second, _) = of_ranks
    assert torch.equal(first[way, preset], second[way, preset])


def test_what_cannot_work_is_refused_in_every_process(of_ranks):
    for _, (inner, wrapped, torn, *sharded) in of_ranks:
        assert "'tokens.weight'" in inner and "has it as 'module.tokens.weight'" in inner
        assert "has it as 'tokens.weight'" in wrapped
        assert "with their wrapper (DistributedDataParallel, torch.compile)" in wrapped
        assert "share out tensors among processes" in torn
        assert len(sharded) == 2
        assert all("is sharded across processes where its blocks are cut" in it for it in sharded)
