"""Networks written here: the ones no library ships, and small plain references that need nothing but torch.

Letters: b examples, t tokens of a sequence, d model width, c channels, s image side, C classes, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Fully connected, (b, ...) -> (b, sizes[-1]): inputs flattened, PyTorch's default initialisation."""

    def __init__(
        self, sizes: Sequence[int], bias: bool = True, activation: type[nn.Module] = nn.GELU
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"sizes must be two or more positive widths, input to output, got {list(sizes)}"
            )
        pairs = (
            (activation(), nn.Linear(fan_in, fan_out, bias=bias))
            for fan_in, fan_out in pairwise(sizes)
        )
        super().__init__(nn.Flatten(), *[layer for pair in pairs for layer in pair][1:])


def _he_convolutions(network: nn.Module) -> None:
    """He normal over the fan-out for every convolution, as torchvision's VGG and ResNet start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SmallVGG(nn.Sequential):
    """Plain CNN, (b, 3, s, s) -> (b, C): 3x3 convolution, ReLU, 2x2 max-pooling a stage; global mean, linear head."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 192), num_classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for before, width in pairwise((3, *widths)):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        _he_convolutions(self)


class BasicBlock(nn.Module):
    """Residual block of He et al. 2016 (arXiv 1512.03385), (b, c, s, s) -> (b, c', s / stride, s / stride)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """ResNet for small images, (b, 3, s, s) -> (b, C): 3x3 stem, one basic block a stage, each stage halves s."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128), num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = (
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
        )
        strides = (1, *[2] * (len(widths) - 1))
        self.blocks = nn.Sequential(*map(BasicBlock, (widths[0], *widths[:-1]), widths, strides))
        self.head = nn.Linear(widths[-1], num_classes)
        _he_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def _normal_weights(network: nn.Module, std: Callable[[str, Tensor], float]) -> None:
    """Matrices N(0, std(name, matrix)^2), biases 0; the factors of a LayerNorm stay 1."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std(name, parameter))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing: GELU MLPs behind a LayerNorm, skip connections; (b, t, d) -> (b, t, d)."""

    def __init__(self, tokens: int, d: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(d, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """MLP-Mixer, (b, 3, s, s) -> (b, C); defaults: B/16 (59 M) of Tolstikhin et al. 2021 (arXiv 2105.01601, table 1).

    Weights N(0, 1 / fan_in), biases 0. The paper's head starts at zero, which makes every other block's Hessian vanish;
    here it starts like any other layer.
    """

    def __init__(self, image_size: int = 224, patch: int = 16, layers: int = 12, d: int = 768, token_hidden: int = 384,
                 channel_hidden: int = 3072, num_classes: int = 1000) -> None:  # fmt: skip
        super().__init__()
        tokens = (image_size // patch) ** 2
        self.patches = nn.Conv2d(3, d, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, d, token_hidden, channel_hidden) for _ in range(layers))
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, num_classes)
        _normal_weights(self, lambda name, weight: weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class CausalAttention(nn.Module):
    """Causal self-attention, query, key and value separate, (b, t, d) -> (b, t, d); num_heads divides d."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in layers)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class GPTBlock(nn.Module):
    """Pre-LayerNorm Transformer block, (b, t, d) -> (b, t, d)."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.fc, self.proj = (
            CausalAttention(d, num_heads),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class NanoGPT(nn.Module):
    """Plain pre-LayerNorm GPT, (b, t <= context) -> logits (b, t, V): learned positions, GELU, no dropout.

    Initialisation of GPT-2 (Radford et al. 2019, section 2.3): weights N(0, 0.02^2), the matrices that end a residual
    branch divided by sqrt(2 layers), biases 0.
    """

    def __init__(self, vocabulary: int, context: int, layers: int = 4, d: int = 128, num_heads: int = 4,
                 tied: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(GPTBlock(d, num_heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        last = 0.02 / (2 * layers) ** 0.5
        _normal_weights(self, lambda name, weight: last if name.endswith("proj.weight") else 0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        return self.head(self.norm(self.blocks(x)))
