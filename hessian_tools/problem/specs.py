"""The networks of the zoo, one entry each: how it is built, and on which data by default.

Full-size entries are the published architectures, with heads for ten classes of images. Their
default data is kept to what a machine of 16 GB holds with room for the graphs of second
derivatives; the caller can ask for more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import nn

from hessian_tools.problem.data import TOKENIZERS
from hessian_tools.problem.networks import MLP, MLPMixer, NanoGPT, SmallResNet, SmallVGG
from hessian_tools.problem.vision import repair, torchvision

# (number of classes or tokens, image side or context) -> model
Build = Callable[[int, int], nn.Module]


class DataKind(StrEnum):
    """What a network reads."""

    TEXT = "text"
    MASKED_TEXT = "masked text"
    IMAGES = "images"


@dataclass(frozen=True)
class ModelSpec:
    """One entry of the zoo.

    ``build(classes, size)`` takes the number of classes and the image side in pixels, or the
    vocabulary and the context in tokens.
    """

    name: str
    family: str
    description: str
    data: DataKind
    build: Build
    size: int  # default image side or context
    num_examples: int  # default number of images or sequences
    step: int = 1  # images: the side must be a multiple of it
    # text: the longest context that the positions allow; None: positions are made to fit
    longest: int | None = None
    tokenizer: str = "byte"
    channels: int = 3
    # True: BatchNorm by batch statistics (running ones mean nothing before training)
    batch_stats: bool | None = None

    @property
    def default_data(self) -> str:
        """The default data in words."""
        if self.data is DataKind.IMAGES:
            shape = f"{self.channels} x {self.size} x {self.size}"
            return f"{self.num_examples} Fashion-MNIST images of {shape}"
        return f"{self.num_examples} sequences of {self.size} {self.tokenizer} tokens of the plays"

    def num_parameters(self) -> int:
        """Parameters at the default size (tied ones once), counted without allocating them."""
        classes = 10 if self.data is DataKind.IMAGES else TOKENIZERS[self.tokenizer].size
        with torch.device("meta"):
            model = self.build(classes, self.size)
        return sum(parameter.numel() for parameter in model.parameters())


def _torchvision(name: str) -> Build:
    return lambda classes, size: getattr(torchvision().models, name)(num_classes=classes)


def _transformers(name: str, classes_key: str, size_key: str, **settings: object) -> Build:
    """A model of transformers from its default config, but for ``settings``, classes and size."""

    def build(classes: int, size: int) -> nn.Module:
        repair()
        import transformers

        network = getattr(transformers, name)
        return network(network.config_class(**{classes_key: classes, size_key: size, **settings}))

    return build


_gpt2 = partial(
    _transformers,
    "GPT2LMHeadModel",
    "vocab_size",
    "n_positions",
    use_cache=False,
    # the default start and end tokens lie outside smaller vocabularies
    bos_token_id=None,
    eos_token_id=None,
)
_bert = partial(
    _transformers,
    "BertForMaskedLM",
    "vocab_size",
    "max_position_embeddings",
    # The default padding token, number 0, would get no gradient where it is read, so the gradient
    # would not be that of the loss; no text here is padded.
    pad_token_id=None,
)
_vit = partial(_transformers, "ViTForImageClassification", "num_labels", "image_size")

SPECS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "resnet18",
            "CNN",
            "ResNet-18 of torchvision, BatchNorm by batch statistics",
            DataKind.IMAGES,
            _torchvision("resnet18"),
            size=224,
            num_examples=8,
            batch_stats=True,
        ),
        ModelSpec(
            "vgg16",
            "CNN",
            "VGG-16 of torchvision, without BatchNorm",
            DataKind.IMAGES,
            _torchvision("vgg16"),
            size=224,
            num_examples=4,
            step=32,
        ),
        ModelSpec(
            "vit-base",
            "Transformer",
            "ViT-B/16 of transformers",
            DataKind.IMAGES,
            _vit(),
            size=224,
            num_examples=4,
            step=16,
        ),
        ModelSpec(
            "gpt2",
            "Transformer",
            "GPT-2 small of transformers, vocabulary 50257",
            DataKind.TEXT,
            _gpt2(vocab_size=50257, n_positions=1024),
            size=128,
            num_examples=2,
            longest=1024,
            tokenizer="bpe",
        ),
        ModelSpec(
            "bert-base",
            "Transformer",
            "BERT base of transformers, masked tokens, vocabulary 30522",
            DataKind.MASKED_TEXT,
            _bert(vocab_size=30522, max_position_embeddings=512),
            size=128,
            num_examples=4,
            longest=512,
            tokenizer="bpe",
        ),
        ModelSpec(
            "mlp-mixer",
            "Mixer",
            "MLP-Mixer B/16",
            DataKind.IMAGES,
            lambda classes, side: MLPMixer(side, num_classes=classes),
            size=224,
            num_examples=4,
            step=16,
        ),
        ModelSpec(
            "gpt2-nano",
            "Transformer",
            "GPT-2 of transformers (fused c_attn), 4 layers of width 128",
            DataKind.TEXT,
            _gpt2(n_embd=128, n_layer=4, n_head=4),
            size=64,
            num_examples=4,
        ),
        ModelSpec(
            "gpt-nano",
            "Transformer",
            "plain GPT, separate q, k, v, 4 layers of width 128",
            DataKind.TEXT,
            NanoGPT,
            size=64,
            num_examples=4,
        ),
        ModelSpec(
            "bert-nano",
            "Transformer",
            "BERT of transformers, masked tokens, 4 layers of width 128",
            DataKind.MASKED_TEXT,
            _bert(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
            ),
            size=64,
            num_examples=8,
        ),
        ModelSpec(
            "vit-nano",
            "Transformer",
            "ViT of transformers, patch 4, 4 layers of width 96",
            DataKind.IMAGES,
            _vit(
                hidden_size=96,
                intermediate_size=384,
                patch_size=4,
                num_hidden_layers=4,
                num_attention_heads=4,
            ),
            size=32,
            num_examples=16,
            step=4,
        ),
        ModelSpec(
            "mixer-nano",
            "Mixer",
            "MLP-Mixer, patch 4, 4 layers of width 96",
            DataKind.IMAGES,
            lambda classes, side: MLPMixer(side, 4, 4, 96, 64, 384, classes),
            size=32,
            num_examples=16,
            step=4,
        ),
        ModelSpec(
            "resnet-nano",
            "CNN",
            "ResNet of 4 basic blocks, widths 16 to 128, batch statistics",
            DataKind.IMAGES,
            lambda classes, side: SmallResNet(num_classes=classes),
            size=32,
            num_examples=32,
            batch_stats=True,
        ),
        ModelSpec(
            "vgg-nano",
            "CNN",
            "4 convolutions with max-pooling, widths 32 to 192, without BatchNorm",
            DataKind.IMAGES,
            lambda classes, side: SmallVGG(num_classes=classes),
            size=32,
            num_examples=32,
            step=16,
        ),
        ModelSpec(
            "mlp",
            "MLP",
            "fully connected, 3 hidden layers of 256, GELU",
            DataKind.IMAGES,
            lambda classes, side: MLP((side * side, 256, 256, 256, classes)),
            size=28,
            num_examples=64,
            channels=1,
        ),
    )
}
