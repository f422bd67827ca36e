"""Networks written here: those no library ships, and small plain references that need only torch.

Letters: b examples, t tokens of a sequence, d model width, c channels, s image side, C classes,
V vocabulary. The order in which a network makes its layers is part of what a seed means: it decides
which random numbers a layer starts from.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Fully connected network, (b, ...) -> (b, sizes[-1]).

    Inputs are flattened; the initialisation is PyTorch's default. Raises ValueError unless
    ``sizes`` holds two or more positive widths.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        bias: bool = True,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"sizes must be two or more positive widths, input to output, got {list(sizes)}"
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers.append(nn.Linear(fan_in, fan_out, bias=bias))
            layers.append(activation())
        super().__init__(*layers[:-1])  # the outputs are not activated


class SmallVGG(nn.Sequential):
    """Plain convolutional network, (b, 3, s, s) -> (b, C).

    Each stage is a 3x3 convolution, ReLU and 2x2 max-pooling; then the global mean and a linear
    head.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 192),
        num_classes: int = 10,
    ) -> None:
        layers: list[nn.Module] = []
        for before, width in pairwise((3, *widths)):
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.AdaptiveAvgPool2d(1))
        layers.append(nn.Flatten())
        layers.append(nn.Linear(widths[-1], num_classes))
        super().__init__(*layers)
        _he_convolutions(self)


class BasicBlock(nn.Module):
    """Residual block of He et al. 2016 (arXiv 1512.03385).

    (b, before, s, s) -> (b, width, s / stride, s / stride)
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = self.norm2(self.conv2(hidden))
        return F.relu(hidden + self.shortcut(x))


class SmallResNet(nn.Module):
    """ResNet for small images, (b, 3, s, s) -> (b, C).

    A 3x3 stem, then one basic block a stage; every stage but the first halves s.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64, 128),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks = [BasicBlock(widths[0], widths[0], stride=1)]
        for before, width in pairwise(widths):
            blocks.append(BasicBlock(before, width, stride=2))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)
        _he_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, (b, t, d) -> (b, t, d).

    Each is a GELU MLP behind a LayerNorm, with a skip connection.
    """

    def __init__(self, tokens: int, d: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.tokens = _gelu_mlp(tokens, token_hidden)
        self.channels = _gelu_mlp(d, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        transposed = self.norm1(x).transpose(1, 2)  # (b, d, t)
        x = x + self.tokens(transposed).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """MLP-Mixer of Tolstikhin et al. 2021 (arXiv 2105.01601), (b, 3, s, s) -> (b, C).

    The defaults are B/16 (59 M parameters) of the paper's table 1. Weights start as
    N(0, 1 / fan_in), biases at 0. The paper's head starts at zero, which makes every other block's
    Hessian vanish; here it starts like any other layer.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch: int = 16,
        layers: int = 12,
        d: int = 768,
        token_hidden: int = 384,
        channel_hidden: int = 3072,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch) ** 2
        self.patches = nn.Conv2d(3, d, patch, stride=patch)
        blocks = [MixerBlock(tokens, d, token_hidden, channel_hidden) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, num_classes)
        _normal_weights(self, lambda name, weight: weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens.mean(1))


class CausalAttention(nn.Module):
    """Causal self-attention with separate query, key and value, (b, t, d) -> (b, t, d).

    ``num_heads`` must divide d. ``qk_norm``: a LayerNorm over every head's queries and keys, which
    keeps the attention's logits from growing (Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, d: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.proj = nn.Linear(d, d)
        self.query_norm = nn.LayerNorm(d // num_heads) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(d // num_heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_norm(self._heads(self.query(x)))
        key = self.key_norm(self._heads(self.key(x)))
        value = self._heads(self.value(x))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, num_heads, t, d / num_heads)"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GPTBlock(nn.Module):
    """Pre-LayerNorm Transformer block, (b, t, d) -> (b, t, d)."""

    def __init__(self, d: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.attention = CausalAttention(d, num_heads, qk_norm)
        self.fc = nn.Linear(d, 4 * d)
        self.proj = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class NanoGPT(nn.Module):
    """Plain pre-LayerNorm GPT, (b, t <= context) -> logits (b, t, V).

    Learned positions, GELU, no dropout. Initialisation of GPT-2 (Radford et al. 2019, section 2.3):
    weights N(0, 0.02^2), the matrices that end a residual branch divided by sqrt(2 layers),
    biases 0. ``qk_norm``: see :class:`CausalAttention`.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int = 4,
        d: int = 128,
        num_heads: int = 4,
        tied: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(context, d)
        blocks = [GPTBlock(d, num_heads, qk_norm) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        last = 0.02 / (2 * layers) ** 0.5
        _normal_weights(self, lambda name, weight: last if name.endswith("proj.weight") else 0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


def _gelu_mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _he_convolutions(network: nn.Module) -> None:
    """He normal over the fan-out for every convolution, as torchvision's VGG and ResNet start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _normal_weights(network: nn.Module, std: Callable[[str, Tensor], float]) -> None:
    """Matrices N(0, std(name, matrix)^2), biases 0; the factors of a LayerNorm stay 1."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std(name, parameter))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
