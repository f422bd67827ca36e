"""A stream of batches: the same batches in the same order for every optimizer, from a seed.

A batch is a function of the stream's seed and of the step alone, so that a run that goes on after a
kill needs no more than the number of its step. Every epoch visits all examples once, in an order of
its own. The order does not depend on the batch size: a stream in batches of 64 sees the examples of
one in batches of 8.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hessian_tools.problem import data as real_data
from hessian_tools.problem.batches import Batch, batch_length, to_device
from hessian_tools.problem.evaluation import batch_norm_mode, in_modes
from hessian_tools.problem.losses import LossFunction, cross_entropy
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.specs import SPECS, DataKind, ModelSpec
from hessian_tools.training.sources import (
    Examples,
    Images,
    Place,
    Source,
    Text,
    WholeBatches,
    is_mean_over_examples,
    pooled,
    random_numbers,
)

BATCH_SIZE = 32  # images
TEXT_BATCH_SIZE = 8  # sequences, each of many tokens


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches by step, with the loss that is taken of them.

    Attributes:
        source: the examples.
        batch_size: examples of a batch; None where batches are taken as they are.
        loss_fn: ``loss_fn(model, batch)`` -> scalar mean loss.
        batch_stats: BatchNorm by each batch's own statistics (True) or by the running ones, which
            then never change (False); None leaves the model as it is.
        seed: of the order.
        device: where the batches go.
        described: the data in words.
        differentiates_inside: whether the loss needs gradients enabled.
    """

    source: Source
    batch_size: int | None
    loss_fn: LossFunction
    batch_stats: bool | None = None
    seed: int = 0
    device: torch.device | str = "cpu"
    described: str = ""
    differentiates_inside: bool = False
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        size = self.batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"batch_size must be a whole number of at least 1, got {size!r}")

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        size = self.batch_size or 1
        places = [self._place(number) for number in range(step * size, (step + 1) * size)]
        return to_device(self.source.batch(places), torch.device(self.device))

    def held_out(self) -> list[Batch]:
        """The batches of the validation loss, the same for every seed; may be none."""
        size = max(self.batch_size or 1, BATCH_SIZE)
        device = torch.device(self.device)
        return [to_device(batch, device) for batch in self.source.held_out(size)]

    def with_seed(self, seed: int) -> "Stream":
        """The same data in another order."""
        return replace(self, seed=seed, _orders={})

    def with_batch_size(self, batch_size: int) -> "Stream":
        """The same examples in the same order, in batches of another size.

        Raises:
            ValueError: batches that cannot be cut.
        """
        if self.batch_size is None:
            raise ValueError(
                f"batch_size {batch_size} cannot be had: the batches of this problem hold no plain "
                "tensors of one length, or their loss is no mean over examples, so they are taken "
                "as they are; leave the batch size out"
            )
        return replace(self, batch_size=batch_size)

    def validation_loss(self, model: nn.Module, held_out: Sequence[Batch]) -> float:
        """The mean loss over batches, not in training mode.

        They are weighted by the examples that count, or by their lengths.
        """
        counted = getattr(self.loss_fn, "num_examples", None)
        total = weights = 0.0
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_modes(dict.fromkeys(model.modules(), False)))
            stack.enter_context(batch_norm_mode(model, self.batch_stats))
            stack.enter_context(torch.set_grad_enabled(self.differentiates_inside))
            for batch in held_out:
                weight = counted(model, batch) if counted else batch_length(batch) or 1
                total += weight * float(self.loss_fn(model, batch).detach())
                weights += weight
        return total / weights

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1

    def _place(self, number: int) -> Place:
        """Where the example of this number stands, of all that the stream ever gives."""
        epoch, position = divmod(number, self.source.size)
        if epoch not in self._orders:
            # one epoch and the one before it, which a batch may straddle
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            generator = random_numbers("order", self.seed, epoch)
            self._orders[epoch] = torch.randperm(self.source.size, generator=generator)
        return Place(self.seed, epoch, int(self._orders[epoch][position]))


def zoo_stream(
    name: str,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    context: int | None = None,
    image_size: int | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    batch_stats: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stream:
    """The stream of a model of the zoo: its kind of data, whole, and mean cross-entropy (nats).

    Args:
        name: one of ``hessian_tools.problem.zoo.names()``.
        batch_size: sequences or images in a batch; None: 8 or 32.
        seed: of the order.
        batch_stats: as for Problem; None: the model's own choice.
        context, image_size, data, tokenizer, device, dtype: as for ``zoo.load``, which checks them.

    Raises:
        ValueError: an unknown name, data that cannot be read or is too short.
    """
    if name not in SPECS:
        raise ValueError(f"model {name!r} is not in the zoo; it has {', '.join(SPECS)}")
    spec = SPECS[name]
    source: Source
    if spec.data is DataKind.IMAGES:
        images = real_data.image_source(data)
        source = Images(images, image_size or spec.size, spec.channels, dtype)
        described = f"{source.size} images of {images.name}"
    else:
        source = _text(spec, context or spec.size, data, tokenizer or spec.tokenizer)
        described = f"{source.size} windows of {data or 'the packaged plays'}"
    stats = spec.batch_stats if batch_stats is None else batch_stats
    place = torch.device(device)
    is_text = spec.data is not DataKind.IMAGES
    size = batch_size
    if size is None:
        size = TEXT_BATCH_SIZE if is_text else BATCH_SIZE
    return Stream(source, size, cross_entropy, stats, seed, place, described)


def _text(spec: ModelSpec, context: int, path: str | None, tokenizer: str) -> Text:
    is_masked = spec.data is DataKind.MASKED_TEXT
    vocabulary = real_data.TOKENIZERS[tokenizer] if is_masked else None
    return Text(real_data.text_tokens(tokenizer, path), context, vocabulary)


def problem_stream(problem: Problem, *, batch_size: int | None = None, seed: int = 0) -> Stream:
    """The stream of a Problem's own batches, shuffled anew in every epoch.

    Where the batches are of plain tensors of one length, and the loss is a mean over examples, all
    examples form one pool, of which a tenth is held out; else a tenth of the batches is. Nothing is
    held out of fewer than ten.

    Args:
        problem: the data and the loss; its model is not used.
        batch_size: default: that of its first batch, at most nine tenths of all.
        seed: of the order.

    Raises:
        ValueError: a batch size for batches that cannot be cut, or one that is no positive number.
    """
    whole = pooled(problem)
    source: Source
    if whole is None or not is_mean_over_examples(problem, whole):
        source = WholeBatches(problem.batches)
        size = None
        described = f"{source.size} batches of its own, taken as they are"
    else:
        source = Examples(whole)
        size = min(batch_length(problem.batches[0]) or 1, source.size)
        described = f"{source.size} examples of its own"
    stream = Stream(
        source,
        size,
        problem.loss_fn,
        problem.batch_stats,
        seed,
        problem.device,
        described,
        problem.differentiates_inside,
    )
    return stream if batch_size is None else stream.with_batch_size(batch_size)
