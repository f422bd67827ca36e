"""Networks by name, ready with loss and real data: the families of the published JS0 table and small siblings of them.

All start at random (no package carries pretrained weights of these), offline, from ``seed``, which also draws the data.
Defaults of the full-size models are the published architectures with ten-class heads for images; their data is kept to
what a machine of 16 GB holds with room for the graphs of second derivatives, and can be raised by the caller.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hessian_tools.problem import data as real_data
from hessian_tools.problem.losses import LossFunction, cross_entropy
from hessian_tools.problem.networks import MLP, MLPMixer, NanoGPT, SmallResNet, SmallVGG
from hessian_tools.problem.vision import repair, torchvision

Build = Callable[[int, int], nn.Module]  # (number of classes, size) -> model


@dataclass(frozen=True)
class ModelSpec:
    """One line of the zoo: ``build(classes, size)`` takes the vocabulary and the context in tokens, or the number of
    classes and the image side in pixels."""

    name: str
    family: str
    description: str
    data: str  # "text", "masked text" or "images"
    build: Build
    size: int  # default context or image side
    num_examples: int  # default number of sequences or images
    step: int = 1  # images: the side must be a multiple of it
    longest: int | None = (
        None  # text: the longest context the positions allow, None: positions are made to fit
    )
    tokenizer: str = "byte"
    channels: int = 3
    batch_stats: bool | None = (
        None  # True: BatchNorm by batch statistics (running ones mean nothing before training)
    )

    @property
    def default_data(self) -> str:
        """The default data in words."""
        if self.data == "images":
            return f"{self.num_examples} Fashion-MNIST images of {self.channels} x {self.size} x {self.size}"
        return f"{self.num_examples} sequences of {self.size} {self.tokenizer} tokens of the plays"

    def num_parameters(self) -> int:
        """Parameters at the default size (tied ones once), counted on the meta device without building them."""
        classes = 10 if self.data == "images" else real_data.TOKENIZERS[self.tokenizer].size
        with torch.device("meta"):
            return sum(
                parameter.numel() for parameter in self.build(classes, self.size).parameters()
            )


@dataclass(frozen=True)
class ZooModel:
    """A model in eval mode with loss and batches: ``Problem(model, loss_fn, batches, batch_stats=batch_stats)``."""

    model: nn.Module
    loss_fn: LossFunction
    batches: list[real_data.Batch]
    batch_stats: bool | None
    description: str
    settings: dict[str, Any]  # every choice as resolved, JSON-able


def _torchvision(name: str) -> Build:
    return lambda classes, size: getattr(torchvision().models, name)(num_classes=classes)


def _transformers(name: str, classes_key: str, size_key: str, **settings: Any) -> Build:
    """A model of transformers from its default config, but for ``settings``, the classes and the size."""

    def build(classes: int, size: int) -> nn.Module:
        repair()
        import transformers

        network = getattr(transformers, name)
        return network(network.config_class(**{classes_key: classes, size_key: size, **settings}))

    return build


# The default start and end tokens of GPT-2 lie outside smaller vocabularies. BERT's padding token (number 0) would get
# no gradient where it is read, so the gradient would not be that of the loss; no text here is padded.
_gpt2 = partial(_transformers, "GPT2LMHeadModel", "vocab_size", "n_positions", use_cache=False, bos_token_id=None,
                eos_token_id=None)  # fmt: skip
_bert = partial(
    _transformers, "BertForMaskedLM", "vocab_size", "max_position_embeddings", pad_token_id=None
)
_vit = partial(_transformers, "ViTForImageClassification", "num_labels", "image_size")
_FOUR = {"num_hidden_layers": 4, "num_attention_heads": 4}
SPECS = {spec.name: spec for spec in (
    ModelSpec("resnet18", "CNN", "ResNet-18 of torchvision, BatchNorm by batch statistics", "images",
              _torchvision("resnet18"), 224, 8, batch_stats=True),
    ModelSpec("vgg16", "CNN", "VGG-16 of torchvision, without BatchNorm", "images", _torchvision("vgg16"), 224, 4,
              step=32),
    ModelSpec("vit-base", "Transformer", "ViT-B/16 of transformers", "images", _vit(), 224, 4, step=16),
    ModelSpec("gpt2", "Transformer", "GPT-2 small of transformers, vocabulary 50257", "text",
              _gpt2(vocab_size=50257, n_positions=1024), 128, 2, longest=1024, tokenizer="bpe"),
    ModelSpec("bert-base", "Transformer", "BERT base of transformers, masked tokens, vocabulary 30522", "masked text",
              _bert(vocab_size=30522, max_position_embeddings=512), 128, 4, longest=512, tokenizer="bpe"),
    ModelSpec("mlp-mixer", "Mixer", "MLP-Mixer B/16", "images",
              lambda c, s: MLPMixer(s, num_classes=c), 224, 4, step=16),
    ModelSpec("gpt2-nano", "Transformer", "GPT-2 of transformers (fused c_attn), 4 layers of width 128", "text",
              _gpt2(n_embd=128, n_layer=4, n_head=4), 64, 4),
    ModelSpec("gpt-nano", "Transformer", "plain GPT, separate q, k, v, 4 layers of width 128", "text", NanoGPT, 64, 4),
    ModelSpec("bert-nano", "Transformer", "BERT of transformers, masked tokens, 4 layers of width 128", "masked text",
              _bert(hidden_size=128, intermediate_size=512, **_FOUR), 64, 8),
    ModelSpec("vit-nano", "Transformer", "ViT of transformers, patch 4, 4 layers of width 96", "images",
              _vit(hidden_size=96, intermediate_size=384, patch_size=4, **_FOUR), 32, 16, step=4),
    ModelSpec("mixer-nano", "Mixer", "MLP-Mixer, patch 4, 4 layers of width 96", "images",
              lambda c, s: MLPMixer(s, 4, 4, 96, 64, 384, c), 32, 16, step=4),
    ModelSpec("resnet-nano", "CNN", "ResNet of 4 basic blocks, widths 16 to 128, batch statistics", "images",
              lambda c, s: SmallResNet(num_classes=c), 32, 32, batch_stats=True),
    ModelSpec("vgg-nano", "CNN", "4 convolutions with max-pooling, widths 32 to 192, without BatchNorm", "images",
              lambda c, s: SmallVGG(num_classes=c), 32, 32, step=16),
    ModelSpec("mlp", "MLP", "fully connected, 3 hidden layers of 256, GELU", "images",
              lambda c, s: MLP((s * s, 256, 256, 256, c)), 28, 64, channels=1),
)}  # fmt: skip


def names() -> list[str]:
    """Names that :func:`load` takes, full-size models first."""
    return list(SPECS)


def describe() -> list[dict[str, Any]]:
    """One row a model for a table: name, family, parameters, data (the default, in words), description."""
    return [
        {"name": spec.name, "family": spec.family, "parameters": spec.num_parameters(), "data": spec.default_data,
         "description": spec.description}
        for spec in SPECS.values()
    ]  # fmt: skip


def load(
    name: str,
    *,
    seed: int = 0,
    num_examples: int | None = None,
    batch_size: int | None = None,
    context: int | None = None,
    image_size: int | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ZooModel:
    """A network of the zoo at random initialisation, with mean cross-entropy (nats) on real data.

    Args:
        name: one of :func:`names`.
        seed: of the weights and of the choice of data; the weights are drawn in float32 on the CPU, then moved.
        num_examples: sequences or images; batch_size: how many a batch (default: all in one).
        context: tokens of a sequence, text models only. image_size: side in pixels, image models only.
        data: the user's own (see :func:`hessian_tools.problem.data.text_tokens`, ``image_source``); None: the packaged data.
        tokenizer: "bpe" or "byte", text models only.
    Raises:
        ValueError: an unknown name, a value out of range or for the other kind of model, unusable data or device.
    """
    spec = _find(name)
    unused = (
        {"context": context, "tokenizer": tokenizer}
        if spec.data == "images"
        else {"image_size": image_size}
    )
    for knob, value in unused.items():
        if value is not None:
            raise ValueError(
                f"{knob} does not apply to {name}, which reads {spec.data}; leave it out"
            )
    size = next((value for value in (context, image_size) if value is not None), spec.size)
    count = spec.num_examples if num_examples is None else num_examples
    knobs = {
        "num_examples": count,
        "batch_size": count if batch_size is None else batch_size,
        "seed": seed,
    }
    device = _usable(device, dtype)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        batches, classes, settings = _drawn(spec, size, data, tokenizer or spec.tokenizer, knobs)
        torch.default_generator.manual_seed(seed)
        model = spec.build(classes, size)
    batches = [
        (x.to(device, dtype if x.is_floating_point() else None), y.to(device)) for x, y in batches
    ]
    settings = {
        "model": name,
        **knobs,
        **settings,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    description = f"{spec.description}, at random initialisation, on {settings['data']}"
    return ZooModel(
        model.to(device, dtype).eval(),
        cross_entropy,
        batches,
        spec.batch_stats,
        description,
        settings,
    )


def _find(name: str) -> ModelSpec:
    if name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(str(name), SPECS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"model {name!r} is not in the zoo; {hint}it has {', '.join(SPECS)}")


def _drawn(
    spec: ModelSpec, size: int, data: str | None, tokenizer: str, knobs: dict[str, int]
) -> tuple[list[real_data.Batch], int, dict[str, Any]]:
    """Batches, number of classes or tokens, and what was settled."""
    if spec.data == "images":
        source = real_data.image_source(data)
        batches = real_data.image_batches(source, image_size=size, channels=spec.channels, **knobs)
        if size % spec.step:
            raise ValueError(
                f"image_size must be a multiple of {spec.step} for {spec.name}, got {size}"
            )
        return batches, len(source.classes), {"image_size": size, "data": data or source.name}
    tokens, vocabulary = real_data.text_tokens(tokenizer, data), real_data.TOKENIZERS[tokenizer]
    if spec.data == "text":
        batches = real_data.language_batches(tokens, context=size, **knobs)
    else:
        batches = real_data.masked_language_batches(tokens, vocabulary, context=size, **knobs)
    if spec.longest is not None and size > spec.longest:
        raise ValueError(f"context must be at most {spec.longest} for {spec.name}, got {size}")
    return (
        batches,
        vocabulary.size,
        {"context": size, "tokenizer": tokenizer, "data": data or "the packaged plays"},
    )


def _usable(device: torch.device | str, dtype: torch.dtype) -> torch.device:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be a floating torch dtype such as torch.float64, got {dtype!r}"
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one this machine has, such as 'cpu', got {str(device)!r}: {reason}"
        ) from None
