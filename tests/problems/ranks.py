"""What one of several processes trains: run by torch.multiprocessing, so by its name in a file."""

import copy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import hessian_tools as ht
from hessian_tools.optimizers import BlockwiseAdam
from problems import gpt

STEPS = 5
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
PRESETS = ("adam_mini", "adalayer_star")


def model_and_tokens() -> tuple[nn.Module, Tensor]:
    """The same in every process; tokens (steps, batch, context + 1)."""
    torch.manual_seed(3)
    return gpt().double(), torch.randint(11, (STEPS, 8, 7))


def optimizer_of(model: nn.Module, preset: str) -> BlockwiseAdam:
    return BlockwiseAdam(model, ht.partition(model, preset), **OPTIONS)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """The weights, flat, after a step on each batch of ``tokens``."""
    for batch in tokens:
        optimizer.zero_grad()
        loss = ht.cross_entropy(model, (batch[:, :-1], batch[:, 1:]))
        loss.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_inner(model: nn.Module, preset: str) -> Tensor:
    """The partition of the module, which is wrapped afterwards."""
    optimizer = optimizer_of(model, preset)
    return trained(DistributedDataParallel(model), optimizer, _half())


def by_wrapped(model: nn.Module, preset: str) -> Tensor:
    """The partition of the wrapped module, whose gradients lie in the buckets of the wrapper."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return trained(wrapped, optimizer_of(wrapped, preset), _half())


def by_shared_state(model: nn.Module, preset: str) -> Tensor:
    """Each process keeps the state of a part of the tensors, saved and loaded on the way."""
    groups = ht.param_groups(model, ht.partition(model, preset))
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(groups, BlockwiseAdam, **OPTIONS)
    half = _half()
    trained(wrapped, optimizer, half[:2])
    state: list[object] = [None]
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        state = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(state)
    optimizer = ZeroRedundancyOptimizer(groups, BlockwiseAdam, **OPTIONS)
    optimizer.load_state_dict(state[0])
    held = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    assert 0 < held < len(list(model.parameters()))
    return trained(wrapped, optimizer, half[2:])


def refusals(model: nn.Module) -> list[str]:
    """What is said of a partition and a model of which one is wrapped, and of a torn block."""
    wrapped = DistributedDataParallel(model)
    layers = ht.param_groups(model, ht.partition(model, "layer"))
    tried = (
        lambda: BlockwiseAdam(wrapped, ht.partition(model, "adam_mini")),
        lambda: BlockwiseAdam(model, ht.partition(wrapped, "adam_mini")),
        lambda: ZeroRedundancyOptimizer(layers, BlockwiseAdam, **OPTIONS),
    )
    said = []
    for attempt in tried:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


WAYS = {way.__name__: way for way in (by_inner, by_wrapped, by_shared_state)}


def work(rank: int, world_size: int, folder: str) -> None:
    """One process: weights by way and preset, and what was refused, in FOLDER/RANK.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=2),
    )
    found = {
        (name, preset): way(model_and_tokens()[0], preset)
        for name, way in WAYS.items()
        for preset in PRESETS
    }
    said = refusals(model_and_tokens()[0])
    torch.save((found, said), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _half() -> Tensor:
    """This process's part of every batch."""
    tokens = model_and_tokens()[1]
    return tokens.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
