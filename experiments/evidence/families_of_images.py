"""The families that read images: what is in them, and on which data.

Sizes are such that a step on 32 images takes some ten milliseconds on one core.
"""

from functools import partial

from torch import nn

from evidence.networks.convolutions import (
    ConvNeXt,
    ConvolutionalAutoencoder,
    LeNet,
    MobileNet,
    PlainCNN,
    ResNet,
    UNet,
)
from evidence.networks.library import NO_DROPOUT, library
from evidence.networks.plain import Autoencoder, NormalisedMLP
from evidence.networks.transformers import Design, VisionTransformer
from evidence.pair import Pair, Traits, family
from evidence.sources import (
    denoising,
    fashion,
    fashion_zipf,
    inpainting,
    reconstruction,
    segmentation,
)
from hessian_tools.problem.networks import MLP, MLPMixer, SmallVGG

PLAIN = Traits(is_transformer=False, is_text=False)
TRANSFORMER = Traits(is_transformer=True, is_text=False)
SIDE = 14
PATCHED = 16  # side where it has to be a multiple of four
by_batch = partial(fashion, SIDE, batch_stats=True)
VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": PATCHED,
    "patch_size": 4,
    "num_labels": 10,
}

PAIRS: list[Pair] = [
    *family(
        "softmax-balanced",
        PLAIN,
        {
            "pixels-28": (partial(MLP, (784, 10)), partial(fashion, 28, 1)),
            "pixels-14": (partial(MLP, (196, 10)), partial(fashion, 14, 1)),
        },
    ),
    *family(
        "softmax-zipf",
        PLAIN,
        {"images": (partial(MLP, (256, 10)), partial(fashion_zipf, PATCHED))},
    ),
    *family(
        "mlp",
        PLAIN,
        {
            "relu": (
                partial(MLP, (784, 128, 128, 10), activation=nn.ReLU),
                partial(fashion, 28, 1),
            ),
            "tanh-deep": (
                partial(MLP, (196, 64, 64, 64, 64, 64, 10), activation=nn.Tanh),
                partial(fashion, 14, 1),
            ),
            "layernorm-zipf": (
                partial(NormalisedMLP, (256, 96, 96, 96, 10)),
                partial(fashion_zipf, PATCHED),
            ),
        },
    ),
    *family(
        "autoencoder",
        PLAIN,
        {
            "relu": (partial(Autoencoder, (196, 64, 16)), partial(reconstruction, 14)),
            "tanh-deep": (
                partial(Autoencoder, (784, 128, 64, 32, 8), nn.Tanh),
                partial(reconstruction, 28),
            ),
            "convolutional": (
                ConvolutionalAutoencoder,
                partial(reconstruction, PATCHED, flat=False),
            ),
        },
    ),
    *family(
        "cnn",
        PLAIN,
        {
            "lenet": (LeNet, partial(fashion, 28, 1)),
            "vgg": (partial(SmallVGG, (8, 16, 32)), partial(fashion, SIDE)),
            "deep": (partial(PlainCNN, (8, 8, 16, 16, 32, 32)), partial(fashion, SIDE, 1)),
        },
    ),
    *family(
        "resnet-batchnorm",
        PLAIN,
        {
            "three-blocks": (partial(ResNet, (8, 8, 16, 32), "batch"), by_batch),
            "deep": (partial(ResNet, (8, 8, 8, 16, 16, 32), "batch"), by_batch),
            "norm-first": (
                partial(ResNet, (8, 8, 16, 16), "batch", is_first_norm=True),
                by_batch,
            ),
        },
    ),
    *family(
        "resnet-groupnorm",
        PLAIN,
        {
            "three-blocks": (partial(ResNet, (8, 8, 16, 32), "group"), partial(fashion, SIDE)),
            "deep": (
                partial(ResNet, (8, 8, 8, 16, 16, 32), "group"),
                partial(fashion, SIDE),
            ),
            "norm-first-zipf": (
                partial(ResNet, (8, 8, 16, 16), "group", is_first_norm=True, channels=1),
                partial(fashion_zipf, SIDE),
            ),
        },
    ),
    *family(
        "convnext",
        PLAIN,
        {
            "narrow": (partial(ConvNeXt, (16, 16, 32)), partial(fashion, SIDE)),
            "layer-scale": (
                partial(ConvNeXt, (16, 16, 32, 32), layer_scale=1e-2),
                partial(fashion, SIDE),
            ),
            "kernel-7": (partial(ConvNeXt, (24, 24, 24), kernel=7), partial(fashion, SIDE)),
        },
    ),
    *family(
        "mobilenet",
        PLAIN,
        {
            "separable": (partial(MobileNet, (8, 16, 16, 32)), by_batch),
            "inverted": (partial(MobileNet, (8, 8, 16, 16), expansion=3), by_batch),
            "squeezed": (partial(MobileNet, (8, 8, 16), expansion=4, squeeze=True), by_batch),
        },
    ),
    *family(
        "unet",
        PLAIN,
        {
            "noise": (UNet, partial(denoising, PATCHED)),
            "inpainting": (partial(UNet, 8), partial(inpainting, PATCHED)),
            "segmentation": (partial(UNet, 8, 11), partial(segmentation, PATCHED)),
        },
    ),
    *family(
        "mixer",
        PLAIN,
        {
            "patch-4": (
                partial(MLPMixer, PATCHED, 4, 2, 32, 32, 64, 10),
                partial(fashion, PATCHED),
            ),
            "patch-2": (partial(MLPMixer, 14, 2, 2, 16, 32, 32, 10), partial(fashion, 14)),
            "deep": (partial(MLPMixer, PATCHED, 4, 5, 24, 16, 48, 10), partial(fashion, PATCHED)),
        },
    ),
    *family(
        "vit",
        TRANSFORMER,
        {
            "mean-token": (
                partial(VisionTransformer, PATCHED, 4, Design(d=32, causal=False)),
                partial(fashion, PATCHED),
            ),
            "library": (
                library("ViTForImageClassification", **VIT, **NO_DROPOUT),
                partial(fashion, PATCHED),
            ),
            "deep": (
                partial(VisionTransformer, PATCHED, 4, Design(d=24, layers=4, causal=False)),
                partial(fashion, PATCHED),
            ),
        },
    ),
]
