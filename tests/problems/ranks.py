"""What one of several processes trains: run by torch.multiprocessing, so by its name in a file."""

import copy
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hessian_tools as ht
from hessian_tools.blocks.param_groups import ParamGroup
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
    return weights(model)


def weights(model: nn.Module) -> Tensor:
    """Flat; of tensors that are sharded, all shards."""
    parameters = [p.detach() for p in model.parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.flatten() for p in whole])


def by_inner(model: nn.Module, preset: str) -> Tensor:
    """The partition of the module, which is wrapped afterwards."""
    optimizer = optimizer_of(model, preset)
    return trained(DistributedDataParallel(model), optimizer, _half())


def by_wrapped(model: nn.Module, preset: str) -> Tensor:
    """The partition of the wrapped module, whose gradients lie in the buckets of the wrapper."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return trained(wrapped, optimizer_of(wrapped, preset), _half())


def sharing(groups: list[ParamGroup]) -> torch.optim.Optimizer:
    """Each process has a BlockwiseAdam for a part of the tensors of ``groups``."""
    # here, as the import takes seconds and warns: only the processes of the test need it
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, BlockwiseAdam, **OPTIONS)


def by_shared_state(model: nn.Module, preset: str) -> Tensor:
    """ZeroRedundancyOptimizer, its state saved and loaded on the way."""
    groups = ht.param_groups(model, ht.partition(model, preset))
    wrapped = DistributedDataParallel(model)
    optimizer = sharing(groups)
    half = _half()
    trained(wrapped, optimizer, half[:2])
    state: list[object] = [None]
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        state = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(state)
    optimizer = sharing(groups)
    optimizer.load_state_dict(state[0])
    held = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    assert 0 < held < len(list(model.parameters()))
    return trained(wrapped, optimizer, half[2:])


def by_sharded(model: nn.Module, preset: str) -> Tensor:
    """FSDP: each process has a part of every tensor and of its state."""
    partition = ht.partition(model, preset)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return trained(model, BlockwiseAdam(model, partition, **OPTIONS), _half())


def fused(attention: bool) -> list[ParamGroup]:
    """Groups of sharded tensors that are cut along the axis of the shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if attention:  # query, key and value in three thirds, where each of two processes has a half
        model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        partition = ht.partition(model, "head")
        return ht.param_groups(fully_shard(model, mesh=mesh), partition)
    layer = fully_shard(nn.Linear(3, 8, bias=False), mesh=mesh)
    by_row = {"view": (8, 3), "index": ((0, 4), (0, 3)), "axes": (0,), "num_blocks": 4}
    whole = {"view": (8, 3), "index": ((4, 8), (0, 3)), "axes": (), "num_blocks": 1}
    return [{"params": [layer.weight], "block": "weight", "cuts": [by_row, whole]}]


def refusals(model: nn.Module) -> list[str]:
    """What is said of a model or a partition alone in a wrapper, and of blocks that are torn."""
    wrapped = DistributedDataParallel(model)
    layers = ht.param_groups(model, ht.partition(model, "layer"))
    tried = (
        lambda: BlockwiseAdam(wrapped, ht.partition(model, "adam_mini")),
        lambda: BlockwiseAdam(model, ht.partition(wrapped, "adam_mini")),
        lambda: sharing(layers),
        lambda: BlockwiseAdam(fused(attention=True)),
        lambda: BlockwiseAdam(fused(attention=False)),
    )
    said = []
    for attempt in tried:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


WAYS = {way.__name__: way for way in (by_inner, by_wrapped, by_shared_state, by_sharded)}


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
