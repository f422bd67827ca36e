"""Real data, packaged or the user's own, as deterministic batches. Nothing is downloaded.

Letters: N examples in all, b of a batch, t tokens of a sequence (the context), c channels, s image
side. What is packaged, from where and on what terms: assets/README.md. Examples are drawn without
replacement, in an order given by ``seed``; a larger N keeps the examples of a smaller one.
"""

import functools
import gzip
import importlib.resources
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.problem.losses import IGNORED
from hessian_tools.problem.vision import torchvision

LabelledBatch = tuple[Tensor, Tensor]  # (inputs, targets)
Pixels = NDArray[np.uint8]  # (height, width, 3)


class Vocabulary(NamedTuple):
    """Token numbers of a tokenizer: 0 to size - 1, among them ``mask``, which no text contains."""

    size: int
    mask: int


TOKENIZERS = {"bpe": Vocabulary(8192, 0), "byte": Vocabulary(257, 256)}

_FASHION_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class ImageSource(NamedTuple):
    """Labelled images that are read one by one; labels count the classes from 0."""

    name: str
    classes: tuple[str, ...]
    size: int  # number of images
    read: Callable[[int], tuple[Pixels, int]]  # number -> pixels and label
    # Of pixels in [0, 1]. The defaults are the means of the usual ImageNet constants over channels.
    mean: float = 0.449
    std: float = 0.226


def text_tokens(tokenizer: str = "bpe", path: str | Path | None = None) -> Tensor:
    """The tokens of a text, (num_tokens,) int64.

    The text is the UTF-8 file at ``path``, or ten packaged plays of Shakespeare (1.27 MB).
    ``tokenizer``: "bpe" (8192 byte-level tokens trained on the plays; codes any text) or "byte"
    (the 256 bytes). Raises ValueError for another tokenizer and for a path that is no readable
    text.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if path is None:
        return _packaged_tokens(tokenizer).clone()
    return _encode(text_of(path), tokenizer)


def text_of(path: str | Path | None = None) -> str:
    """The UTF-8 text in the file at ``path``, or the packaged plays.

    Raises ValueError for a path that is no readable text.
    """
    if path is None:
        return gzip.decompress(_asset("plays.txt.gz")).decode()
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data must be a UTF-8 text file for a language model, got '{path}': {error}"
        ) from None


def language_batches(
    tokens: Tensor,
    *,
    num_examples: int,
    batch_size: int,
    context: int,
    seed: int = 0,
) -> list[LabelledBatch]:
    """Next-token batches (inputs, targets), each (b, t) int64.

    The inputs are N windows of ``tokens`` that do not overlap. Raises ValueError when a number is
    not positive or the text has fewer windows.
    """
    windows = _windows(tokens, num_examples, context, 1, seed)
    inputs = windows[:, :-1].contiguous()
    targets = windows[:, 1:].contiguous()
    return _cut(inputs, targets, batch_size)


def masked_language_batches(
    tokens: Tensor,
    vocabulary: Vocabulary,
    *,
    num_examples: int,
    batch_size: int,
    context: int,
    seed: int = 0,
) -> list[LabelledBatch]:
    """Masked-token batches (inputs, targets), each (b, t) int64.

    After Devlin et al. 2019 (arXiv 1810.04805, section 3.1): 15 % of each window's positions
    (rounded, at least one) are to be predicted; there the input is the mask (80 %), a random token
    (10 %) or left as it is (10 %). Targets are -100 elsewhere. Windows are running text without
    [CLS] and [SEP]. Errors as for :func:`language_batches`.
    """
    windows = _windows(tokens, num_examples, context, 0, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    uniform = torch.rand(num_examples, 3, context, generator=generator)
    inputs, targets = masked(windows, vocabulary, uniform)
    return _cut(inputs, targets, batch_size)


def masked(windows: Tensor, vocabulary: Vocabulary, uniform: Tensor) -> LabelledBatch:
    """Masked tokens (inputs, targets) of windows, each (b, t) int64.

    See :func:`masked_language_batches`; all that is random is read off ``uniform``, (b, 3, t) in
    [0, 1).
    """
    context = windows.shape[1]
    priority, kind, other = uniform.unbind(1)  # each (b, t)
    rank = priority.argsort(1).argsort(1)
    predicted = rank < max(1, round(0.15 * context))
    hidden = predicted & (kind < 0.8)
    replaced = predicted & (kind >= 0.9)
    inputs = torch.where(hidden, vocabulary.mask, windows)
    inputs = torch.where(replaced, (other * vocabulary.size).long(), inputs)
    return inputs, torch.where(predicted, windows, IGNORED)


def image_source(path: str | Path | None = None) -> ImageSource:
    """Packaged Fashion-MNIST (4,000 training images), or the user's images at ``path``.

    ``path``: a folder with one sub-folder of images a class (classes in the order of their sorted
    names), or ``torchvision:NAME:ROOT``, the classification dataset torchvision.datasets.NAME
    already on disk under ROOT. Raises ValueError when there is nothing of the kind.
    """
    if path is None:
        return _packaged_images()
    path = str(path)
    try:
        dataset = _opened(path)
        classes = _classes_of(dataset)
    except Exception as error:  # each dataset has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            "data must be a folder with one sub-folder of images a class, or "
            "torchvision:NAME:ROOT with that classification dataset on disk under ROOT, "
            f"for an image model, got {path!r}: {reason}"
        ) from None

    def read(number: int) -> tuple[Pixels, int]:
        try:
            image, label = dataset[number]
            return np.array(image.convert("RGB")), int(label)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"data {path!r}: item {number} is no image with a class: {error}"
            ) from None

    return ImageSource(path, classes, len(dataset), read)


def image_batches(
    source: ImageSource,
    *,
    num_examples: int,
    batch_size: int,
    image_size: int,
    channels: int = 3,
    seed: int = 0,
) -> list[LabelledBatch]:
    """Batches (images, labels), (b, c, s, s) float32 and (b,) int64, of N images of ``source``.

    Each image, in [0, 1], is resized to s x s (aspect not kept) by anti-aliased bilinear
    interpolation, then becomes (x - source.mean) / source.std in every channel. A grey channel is
    repeated; c = 1 is the mean over channels. Raises ValueError for a number out of range.
    """
    _check_whole(1, num_examples=num_examples, batch_size=batch_size, image_size=image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    if num_examples > source.size:
        raise ValueError(
            f"num_examples is {num_examples}, but {source.name} has {source.size} images; "
            "ask for fewer"
        )
    images = []
    labels = []
    for number in _order(source.size, seed)[:num_examples].tolist():
        image, label = labelled_image(source, number, image_size, channels)
        images.append(image)
        labels.append(label)
    return _cut(torch.stack(images), torch.tensor(labels), batch_size)


def labelled_image(
    source: ImageSource,
    number: int,
    image_size: int,
    channels: int = 3,
) -> tuple[Tensor, int]:
    """One image, (c, s, s) float32 as :func:`image_batches` makes it, and its label."""
    pixels, label = source.read(number)
    return (_resized(pixels, image_size, channels) - source.mean) / source.std, label


def _resized(pixels: Pixels, side: int, channels: int) -> Tensor:
    """(height, width, 3) uint8 -> (channels, side, side) in [0, 1]"""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
    if channels == 1:
        image = image.mean(1, keepdim=True)
    resized = torch.nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True)
    return resized[0]


def _opened(path: str) -> Any:
    """The torchvision dataset that ``path`` names; Any, as that library is optional."""
    name, root = "ImageFolder", path
    if path.startswith("torchvision:"):
        name, _, root = path.removeprefix("torchvision:").partition(":")
    # no dataset downloads anything unless asked to
    return getattr(torchvision().datasets, name)(root)


def _classes_of(dataset: Any) -> tuple[str, ...]:
    if hasattr(dataset, "classes"):
        classes = dataset.classes
    else:
        classes = sorted(set(map(int, dataset.labels)))
    if len(classes) < 2:
        raise ValueError("it has fewer than two classes")
    return tuple(map(str, classes))


def _check_whole(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not least <= number < 2**63 - 1:  # a tensor's sizes are int64
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def _order(count: int, seed: int) -> Tensor:
    _check_whole(0, seed=seed)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _cut(inputs: Tensor, targets: Tensor, batch_size: int) -> list[LabelledBatch]:
    _check_whole(1, batch_size=batch_size)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def _windows(tokens: Tensor, count: int, context: int, extra: int, seed: int) -> Tensor:
    """(count, context + extra): windows that start at multiples of ``context``."""
    _check_whole(1, num_examples=count, context=context)
    available = max(0, len(tokens) - extra) // context
    if count > available:
        raise ValueError(
            f"num_examples is {count}, but the text of {len(tokens)} tokens holds {available} "
            f"windows of {context}; ask for fewer or shorter ones, or give a longer text"
        )
    windows = tokens.unfold(0, context + extra, context)
    return windows[_order(available, seed)[:count]]


def _asset(name: str) -> bytes:
    return (importlib.resources.files("hessian_tools") / "assets" / name).read_bytes()


@functools.cache
def _packaged_tokens(tokenizer: str) -> Tensor:
    return _encode(text_of(), tokenizer)


def _encode(text: str, tokenizer: str) -> Tensor:
    if tokenizer == "byte":
        return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_str(gzip.decompress(_asset("bpe8192.json.gz")).decode())
    bpe.encode_special_tokens = True  # "<mask>" written in a text is text
    return torch.tensor(bpe.encode(text).ids, dtype=torch.int64)


@functools.cache
def _packaged_images() -> ImageSource:
    with np.load(io.BytesIO(_asset("fashion_mnist.npz")), allow_pickle=False) as arrays:
        images = arrays["images"]  # (number, 28, 28)
        labels = arrays["labels"]
    coloured = np.broadcast_to(images[..., None], (*images.shape, 3))
    pairs = list(zip(coloured, labels.tolist(), strict=True))
    return ImageSource(
        name="the packaged Fashion-MNIST",
        classes=_FASHION_CLASSES,
        size=len(pairs),
        read=pairs.__getitem__,
        mean=0.2860,
        std=0.3530,
    )
