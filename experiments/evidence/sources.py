"""The data of the suite: packaged images and plays, cut in the ways that the networks need.

Every function returns the same stream whenever it is asked for the same, so that images are
prepared once. Letters: n examples, b of a batch, t tokens, V vocabulary, s image side, k nodes.
"""

import functools
import math

import torch
from torch import Tensor

from hessian_tools.problem import data as real_data
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.data import TOKENIZERS, Vocabulary
from hessian_tools.problem.losses import LossFunction, cross_entropy, mse
from hessian_tools.training import Stream
from hessian_tools.training.sources import Examples, Images, Text

BATCH_SIZE = 32
SEED = 20_261_127  # of whatever is drawn to make a data set
HELD_OUT_BATCHES = 4  # of at least 32 examples
NOISY = 0.5  # standard deviation of the noise on images, which have about 1
SHARE_HIDDEN = 0.3  # of the tokens that an encoder-decoder has to restore


class SuiteStream(Stream):
    """A stream whose validation loss is taken of fewer examples, for there are many short runs."""

    def held_out(self) -> list[Batch]:
        return super().held_out()[:HELD_OUT_BATCHES]


def pool(batch: Batch, loss_fn: LossFunction) -> Stream:
    """The stream of examples that lie in memory, in one batch."""
    return SuiteStream(Examples(batch), BATCH_SIZE, loss_fn)


def drawing(words: str) -> torch.Generator:
    """Random numbers of their own for each data set."""
    return torch.Generator().manual_seed(SEED + sum(words.encode()))


# ------------------------------------------------------------------------------------------ images


@functools.cache
def fashion(side: int, channels: int = 3, batch_stats: bool | None = None) -> Stream:
    """Fashion-MNIST, ten balanced classes."""
    images = Images(real_data.image_source(), side, channels)
    return SuiteStream(images, BATCH_SIZE, cross_entropy, batch_stats)


@functools.cache
def all_images(side: int) -> tuple[Tensor, Tensor]:
    """(n, 1, s, s) images and (n,) labels, all that are packaged."""
    source = real_data.image_source()
    pairs = [real_data.labelled_image(source, number, side, 1) for number in range(source.size)]
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels)


@functools.cache
def fashion_zipf(side: int) -> Stream:
    """Fashion-MNIST with class k, counted from 1, as often as 1/k."""
    images, labels = all_images(side)
    kept = []
    for label in range(10):
        members = torch.nonzero(labels == label).flatten()
        kept.append(members[: math.ceil(len(members) / (label + 1))])
    numbers = torch.cat(kept)
    return pool((images[numbers], labels[numbers]), cross_entropy)


@functools.cache
def reconstruction(side: int, flat: bool = True) -> Stream:
    """Images that are to be given back, (b, s * s) or (b, 1, s, s), by mean squared error."""
    images, _ = all_images(side)
    targets = images.flatten(1) if flat else images
    return pool((images, targets), mse)


@functools.cache
def denoising(side: int) -> Stream:
    """Images with noise, from which the noise is to be predicted, as diffusion models do."""
    images, _ = all_images(side)
    noise = torch.randn(images.shape, generator=drawing("noise"))
    return pool((images + NOISY * noise, noise), mse)


@functools.cache
def inpainting(side: int) -> Stream:
    """Images with a quarter blanked, which are to be restored."""
    images, _ = all_images(side)
    half = side // 2
    hidden = images.clone()
    corners = torch.randint(2, (len(images), 2), generator=drawing("corners")) * half
    for image, (row, column) in zip(hidden, corners.tolist(), strict=True):
        image[:, row : row + half, column : column + half] = 0
    return pool((hidden, images), mse)


@functools.cache
def segmentation(side: int) -> Stream:
    """Images whose pixels are to be classed: background, or the garment's class; 11 classes."""
    images, labels = all_images(side)
    darkest = images.amin((1, 2, 3), keepdim=True)
    is_garment = (images > darkest + 0.1)[:, 0]
    targets = torch.where(is_garment, labels[:, None, None] + 1, 0)
    return pool((images, targets), cross_entropy)


@functools.cache
def views(side: int) -> tuple[Tensor, Tensor]:
    """Two (n, 1, s, s) views of every image: shifted by up to two pixels, mirrored, made noisy."""
    images, _ = all_images(side)
    generator = drawing("views")
    made = []
    for _ in range(2):
        shifts = torch.randint(-2, 3, (len(images), 2), generator=generator).tolist()
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        noise = torch.randn(images.shape, generator=generator)
        moved = [
            torch.roll(image, shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)
        ]
        view = torch.stack(moved)
        view[mirrored] = view[mirrored].flip(-1)
        made.append(view + 0.2 * noise)
    return made[0], made[1]


@functools.cache
def patch_graphs(neighbours: int = 6) -> Stream:
    """Images as graphs of 49 patches, each joined to those most like it and closest to it.

    A batch is ((nodes (b, k, 4), adjacency (b, k, k)), labels). A node knows its place, its mean
    and its spread; the adjacency is row-normalised and holds the node itself.
    """
    images, labels = all_images(28)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(1, 3)  # (n, 49, 16)
    places = torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0)) / 3 - 1
    places = places.expand(len(images), -1, -1)
    nodes = torch.cat([places, patches.mean(2, keepdim=True), patches.std(2, keepdim=True)], 2)
    distances = torch.cdist(nodes, nodes)
    nearest = distances.topk(neighbours + 1, largest=False).indices
    adjacency = torch.zeros_like(distances).scatter_(2, nearest, 1.0)
    return pool(((nodes, _row_normalised(adjacency)), labels), cross_entropy)


# -------------------------------------------------------------------------------------------- text


@functools.cache
def tokens(tokenizer: str, size: int | None = None) -> Tensor:
    """(num_tokens,) of the plays; with ``size``, the most frequent ones and one for all others.

    Numbers are then ranks by frequency, the last that of all others.
    """
    found = real_data.text_tokens(tokenizer)
    if size is None:
        return found
    counts = torch.bincount(found, minlength=TOKENIZERS[tokenizer].size)
    ranks = counts.argsort(descending=True, stable=True).argsort()
    return ranks[found].clamp(max=size - 1)


@functools.cache
def text(tokenizer: str, context: int, size: int | None = None) -> Stream:
    """Windows whose next tokens are to be predicted."""
    return SuiteStream(Text(tokens(tokenizer, size), context), BATCH_SIZE, cross_entropy)


@functools.cache
def masked_text(tokenizer: str, context: int, size: int | None = None) -> Stream:
    """Windows of which 15 % are to be predicted; with ``size``, its last number + 1 is the mask."""
    vocabulary = TOKENIZERS[tokenizer] if size is None else Vocabulary(size + 1, size)
    source = Text(tokens(tokenizer, size), context, vocabulary)
    return SuiteStream(source, BATCH_SIZE, cross_entropy)


@functools.cache
def restored_text(
    tokenizer: str,
    context: int,
    size: int | None = None,
    names: tuple[str, str] | None = None,
) -> Stream:
    """Windows with tokens hidden, for an encoder, and the whole windows, for a decoder.

    A batch is ((hidden (b, t), shifted (b, t)), targets (b, t)), the shifted being the targets that
    came before, after a first 0. ``names`` make a dict of the inputs.
    """
    all_tokens = tokens(tokenizer, size)
    mask = TOKENIZERS[tokenizer].mask if size is None else size
    windows = all_tokens.unfold(0, context, context)[:20_000]
    is_hidden = torch.rand(windows.shape, generator=drawing("hidden")) < SHARE_HIDDEN
    source = torch.where(is_hidden, mask, windows)
    shifted = torch.cat([torch.zeros_like(windows[:, :1]), windows[:, :-1]], 1)
    inputs: Batch = (source, shifted)
    if names is not None:
        inputs = dict(zip(names, inputs, strict=True))
    return pool((inputs, windows.contiguous()), cross_entropy)


@functools.cache
def windows_by_play(tokenizer: str, context: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """(n, t) windows and the (n,) tenths of the plays, in their order, that they come from."""
    windows = tokens(tokenizer, size).unfold(0, context, context)
    labels = torch.arange(len(windows)) * 10 // len(windows)
    order = torch.randperm(len(windows), generator=drawing("windows"))[:10_000]
    return windows[order].contiguous(), labels[order]


@functools.cache
def text_by_play(tokenizer: str, context: int, size: int | None = None) -> Stream:
    """Windows of which the tenth of the plays is to be told: ten balanced classes."""
    return pool(windows_by_play(tokenizer, context, size), cross_entropy)


@functools.cache
def neighbouring_windows(tokenizer: str, context: int, size: int) -> tuple[Tensor, Tensor]:
    """Two (n, t) windows, the second of which follows the first."""
    windows = tokens(tokenizer, size).unfold(0, context, context)
    pairs = windows[: len(windows) // 2 * 2].unflatten(0, (-1, 2))[:10_000]
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


@functools.cache
def word_graphs(context: int = 32, size: int = 512) -> Stream:
    """Windows as graphs: tokens are joined to their neighbours and to where they stand again.

    A batch is ((tokens (b, k), adjacency (b, k, k)), the tenth of the plays).
    """
    windows, labels = windows_by_play("bpe", context, size)
    places = torch.arange(context)
    is_near = (places[:, None] - places).abs() <= 2
    is_same = windows[:, :, None] == windows[:, None, :]
    is_rare = (windows < size - 1)[:, :, None]  # all other tokens are no one token
    adjacency = (is_near | (is_same & is_rare)).float()
    return pool(((windows, _row_normalised(adjacency)), labels), cross_entropy)


def _row_normalised(adjacency: Tensor) -> Tensor:
    return adjacency / adjacency.sum(-1, keepdim=True)
