"""What a stream draws its batches from: texts, images, or the batches of a Problem.

A source has ``size`` training examples, numbered from 0, and makes a batch of any of them. A tenth
of the data is held out, always the same, whatever the seed of a stream.

Letters: b examples of a batch, t tokens of a sequence, s image side.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hessian_tools.problem.batches import (
    Batch,
    batch_length,
    cut_batch,
    is_plain,
    lengths_agree,
    map_tensors,
    tensors_of,
    with_tensors,
)
from hessian_tools.problem.data import (
    ImageSource,
    LabelledBatch,
    Vocabulary,
    labelled_image,
    masked,
)
from hessian_tools.problem.problem import Problem

HELD_OUT = 0.1  # of the data
MOST_HELD_OUT = 512  # examples that the validation loss is a mean over, at most
_MOST_KEPT = 2**29  # bytes of images that are prepared once only
_HELD_OUT_SEED = 20_240_707


class Place(NamedTuple):
    """A training example, and the pass over the data in which it is drawn."""

    seed: int
    epoch: int
    number: int


class Source(Protocol):
    """Training examples that are asked for by number, and batches that are held out."""

    @property
    def size(self) -> int:
        """Training examples."""
        ...

    def batch(self, places: Sequence[Place]) -> Batch:
        """The batch of these examples."""
        ...

    def held_out(self, batch_size: int) -> list[Batch]:
        """Batches for the validation loss; none where there is too little data."""
        ...


def random_numbers(*words: object) -> torch.Generator:
    """A generator that is the same whenever ``words`` are."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Text:
    """Windows of a text, at other places in every epoch; the last tenth is held out.

    Every epoch shifts the windows by a random offset, so that tokens come in fresh company.

    Args:
        tokens: (n,) int64.
        context: t.
        vocabulary: predict masked tokens of it; None: the next token.
    Raises:
        ValueError: a text of fewer than three windows.
    """

    def __init__(
        self,
        tokens: Tensor,
        context: int,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        held_out = max(context + 1, int(HELD_OUT * len(tokens)))
        self._training = tokens[:-held_out]
        self._held_out = tokens[-held_out:]
        self._context = context
        self._vocabulary = vocabulary
        # a window's targets reach one token further, and the offset up to a window
        self.size = (len(self._training) - 1) // context - 1
        if self.size < 1:
            raise ValueError(
                f"a text of {len(tokens)} tokens is too short to train on windows of {context}; "
                "give a longer text or a shorter context"
            )

    def batch(self, places: Sequence[Place]) -> LabelledBatch:
        windows = [self._window(place) for place in places]
        uniform = [self._uniform(*place) for place in places]
        return self._labelled(torch.stack(windows), uniform)

    def held_out(self, batch_size: int) -> list[Batch]:
        windows = self._held_out.unfold(0, self._context + 1, self._context)
        every = max(1, len(windows) // MOST_HELD_OUT)
        windows = windows[::every][:MOST_HELD_OUT]
        uniform = [self._uniform("held out", number) for number in range(len(windows))]
        inputs, targets = self._labelled(windows, uniform)
        pairs = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        return list(pairs)

    def _window(self, place: Place) -> Tensor:
        """(t + 1,) tokens."""
        first = _offset(self._context, place.seed, place.epoch) + place.number * self._context
        return self._training[first : first + self._context + 1]

    def _uniform(self, *words: object) -> Tensor:
        """(3, t) of what is random about a window's masks."""
        if self._vocabulary is None:
            return torch.empty(0)
        return torch.rand(3, self._context, generator=random_numbers("mask", *words))

    def _labelled(self, windows: Tensor, uniform: Sequence[Tensor]) -> LabelledBatch:
        if self._vocabulary is None:
            return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        return masked(windows[:, :-1], self._vocabulary, torch.stack(list(uniform)))


@functools.lru_cache(maxsize=64)
def _offset(context: int, seed: int, epoch: int) -> int:
    """Of the windows of an epoch; kept, as every window of it asks."""
    generator = random_numbers("offset", seed, epoch)
    return int(torch.randint(context, (), generator=generator))


class Images:
    """Labelled images; a tenth, drawn once and for all, is held out.

    Args:
        source: the images.
        image_size: s, to which they are resized.
        channels: 1 or 3.
        dtype: of the pixels.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        channels: int = 3,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._source = source
        self._image_size = image_size
        self._channels = channels
        self._dtype = dtype
        self._numbers, self._held_out = _parted(source.size)
        self.size = len(self._numbers)
        self._kept: dict[int, tuple[Tensor, int]] = {}
        bytes_of_one = 4 * channels * image_size**2
        self._most_kept = _MOST_KEPT // bytes_of_one

    def batch(self, places: Sequence[Place]) -> LabelledBatch:
        return self._batch([self._numbers[place.number] for place in places])

    def held_out(self, batch_size: int) -> list[Batch]:
        numbers = self._held_out[:MOST_HELD_OUT]
        starts = range(0, len(numbers), batch_size)
        return [self._batch(numbers[first : first + batch_size]) for first in starts]

    def _batch(self, numbers: Sequence[int]) -> LabelledBatch:
        images, labels = zip(*map(self._image, numbers), strict=True)
        return torch.stack(images).to(self._dtype), torch.tensor(labels)

    def _image(self, number: int) -> tuple[Tensor, int]:
        if number in self._kept:
            return self._kept[number]
        image = labelled_image(self._source, number, self._image_size, self._channels)
        if len(self._kept) < self._most_kept:
            self._kept[number] = image
        return image


class OnDemand:
    """Examples that are made when they are asked for; a tenth is held out.

    Args:
        count: of all examples.
        made: the batch of examples by number, counted from 0.
    """

    def __init__(self, count: int, made: Callable[[Sequence[int]], Batch]) -> None:
        self._made = made
        self._numbers, self._held_out = _parted(count)
        self.size = len(self._numbers)

    def batch(self, places: Sequence[Place]) -> Batch:
        return self._made([self._numbers[place.number] for place in places])

    def held_out(self, batch_size: int) -> list[Batch]:
        numbers = self._held_out[:MOST_HELD_OUT]
        starts = range(0, len(numbers), batch_size)
        return [self._made(numbers[first : first + batch_size]) for first in starts]


class Examples(OnDemand):
    """The examples of a Problem's batches in one pool, from which batches of any size are made.

    Args:
        pooled: one batch of plain tensors that holds all of them.
    """

    def __init__(self, pooled: Batch) -> None:
        self._pooled = pooled
        super().__init__(batch_length(pooled) or 0, self._of_pool)

    def _of_pool(self, numbers: Sequence[int]) -> Batch:
        index = torch.tensor(numbers)
        return map_tensors(lambda t: t[index.to(t.device)] if t.ndim else t, self._pooled)


class WholeBatches:
    """A Problem's batches as they are, where they cannot be cut; every example is a batch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._numbers, self._held_out = _parted(len(batches))
        self.size = len(self._numbers)

    def batch(self, places: Sequence[Place]) -> Batch:
        (place,) = places
        return self._batches[self._numbers[place.number]]

    def held_out(self, batch_size: int) -> list[Batch]:
        return [self._batches[number] for number in self._held_out]


def pooled(problem: Problem) -> Batch | None:
    """One batch with all examples of a Problem; None where its batches are not of plain tensors.

    All tensors of a batch must have the examples along their first axis, and but for their number
    the batches must be alike. Batches of several sizes, each padded to its own length, are not.
    """
    batches = problem.batches
    if not all(is_plain(batch) and lengths_agree(batch) for batch in batches):
        return None
    parts = [tensors_of(batch) for batch in batches]
    kinds = {tuple((t.shape[1:], t.dtype, t.ndim) for t in tensors) for tensors in parts}
    if len(kinds) > 1 or not all(t.ndim for t in parts[0]):
        return None
    return with_tensors(batches[0], [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


def is_mean_over_examples(problem: Problem, whole: Batch) -> bool:
    """Whether the loss of two examples is the mean of theirs, so that any may share a batch."""
    length = batch_length(whole)
    if length is None or length < 2 or problem.batch_stats:
        return length is not None
    try:
        problem.split(1.0, cut_batch(whole, 0, 2, length), 1)
    except (ValueError, ZeroDivisionError):  # or two examples of which nothing counts
        return False
    return True


def _parted(size: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on and of those held out; none of fewer than ten."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_HELD_OUT_SEED)).tolist()
    count = int(HELD_OUT * size)
    return sorted(order[count:]), order[:count]
