"""The Problem, and the stream of batches, of a folder saved by transformers and the user's data."""

from pathlib import Path

import torch
from torch import Tensor

from hessian_tools.app.models.saved_data import Samples, samples
from hessian_tools.app.models.saved_model import IMAGES, SavedModel, network, saved_model
from hessian_tools.problem.batches import to_device
from hessian_tools.problem.losses import huggingface
from hessian_tools.problem.problem import Problem
from hessian_tools.results import JsonObject
from hessian_tools.training.sources import OnDemand
from hessian_tools.training.stream import BATCH_SIZE, TEXT_BATCH_SIZE, Stream

NUM_EXAMPLES = 8  # of the curvature, where the user does not say


def problem_from_folder(
    reference: str,
    *,
    data: str | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    context: int | None = None,
    seed: int = 0,
    batch_stats: bool | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Problem, JsonObject]:
    """The Problem of the model in a folder, with its own loss, and what identifies it.

    Args:
        reference: the folder.
        data: as for :func:`hessian_tools.app.models.saved_data.samples`; None: what is packaged.
        num_examples: windows, texts or images, drawn by ``seed``.
        batch_size: of them in a batch; None: all in one.
        context: tokens of a window, at most.
        batch_stats: as for Problem, which a model with BatchNorm needs.
        dtype: of the weights; None: float32, whatever was saved.

    Raises:
        ValueError: a folder or data that cannot be used, in words that say why.
    """
    try:
        saved = saved_model(Path(reference))
        found = samples(saved, data, context)
        count = _count(found, num_examples)
        model = network(saved, dtype or torch.float32)
    except ValueError as error:
        raise ValueError(f"--model {reference}: {error}") from error
    place = torch.device(device or "cpu")
    order = _order(found, seed)[:count].tolist()
    size = batch_size or count
    numbers = [order[first : first + size] for first in range(0, count, size)]
    batches = [to_device(found.made(some), place, dtype or torch.float32) for some in numbers]
    problem = Problem(model.to(place), huggingface, batches, batch_stats=batch_stats)
    return problem, _identity(saved, found, count, size, problem)


def stream_from_folder(
    reference: str,
    *,
    data: str | None = None,
    context: int | None = None,
    batch_stats: bool | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Stream:
    """All the data, in batches of 8 sequences or 32 images, with the model's own loss.

    Raises:
        ValueError: see :func:`problem_from_folder`.
    """
    try:
        saved = saved_model(Path(reference))
        found = samples(saved, data, context)
    except ValueError as error:
        raise ValueError(f"--model {reference}: {error}") from error
    kind = dtype or torch.float32
    source = OnDemand(
        found.size, lambda numbers: to_device(found.made(numbers), torch.device("cpu"), kind)
    )
    size = BATCH_SIZE if saved.task == IMAGES else TEXT_BATCH_SIZE
    return Stream(
        source,
        min(size, source.size),
        huggingface,
        batch_stats,
        device=torch.device(device or "cpu"),
        described=found.described,
    )


def _count(found: Samples, asked: int | None) -> int:
    count = min(NUM_EXAMPLES, found.size) if asked is None else asked
    if count > found.size:
        raise ValueError(
            f"--num-examples is {count}, and there are {found.described}; ask for fewer"
        )
    return count


def _order(found: Samples, seed: int) -> Tensor:
    return torch.randperm(found.size, generator=torch.Generator().manual_seed(seed))


def _identity(
    saved: SavedModel,
    found: Samples,
    count: int,
    batch_size: int,
    problem: Problem,
) -> JsonObject:
    return {
        "folder": saved.folder.name,
        "architecture": saved.architecture,
        "task": saved.task,
        "data": found.described,
        "num_examples": count,
        "batch_size": batch_size,
        "device": str(problem.device),
        "dtype": str(problem.dtype).removeprefix("torch."),
    }
