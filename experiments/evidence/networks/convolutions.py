"""Convolutional networks for images, (b, c, s, s) -> (b, C), and for maps, -> (b, channels, s, s).

Letters: b examples, c channels, s image side, C classes, w width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # of GroupNorm


class LeNet(nn.Sequential):
    """After LeCun et al. 1998: tanh and mean pooling; (b, 1, 28, 28) -> (b, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 84),
            nn.Tanh(),
            nn.Linear(84, 10),
        )


class PlainCNN(nn.Sequential):
    """3x3 convolutions and ReLU without any normalisation; every second one halves the side."""

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(pairwise((1, *widths))):
            layers += [nn.Conv2d(before, width, 3, stride=1 + number % 2, padding=1), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
        super().__init__(*layers, *pooled)


class Residual(nn.Module):
    """x + f(x), or a shortcut of x where the shape changes."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.inner(x)


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(GROUPS, width)


def _resnet_block(before: int, width: int, norm: str, is_first_norm: bool) -> nn.Module:
    stride = 1 if before == width else 2
    first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
    second = nn.Conv2d(width, width, 3, padding=1, bias=False)
    shortcut = None if before == width else nn.Conv2d(before, width, 1, stride, bias=False)
    if is_first_norm:  # He et al. 2016b, "Identity mappings"
        layers = [_norm(norm, before), nn.ReLU(), first, _norm(norm, width), nn.ReLU(), second]
        return Residual(nn.Sequential(*layers), shortcut)
    layers = [first, _norm(norm, width), nn.ReLU(), second, _norm(norm, width)]
    return nn.Sequential(Residual(nn.Sequential(*layers), shortcut), nn.ReLU())


class ResNet(nn.Sequential):
    """Basic blocks, one a width; a change of width halves the side.

    Args:
        norm: "batch" or "group".
        is_first_norm: norm and ReLU before the convolutions, not after.
    """

    def __init__(
        self,
        widths: Sequence[int],
        norm: str,
        is_first_norm: bool = False,
        classes: int = 10,
        channels: int = 3,
    ) -> None:
        stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        blocks = [_resnet_block(*pair, norm, is_first_norm) for pair in pairwise(widths)]
        before_blocks = [stem] if is_first_norm else [stem, _norm(norm, widths[0]), nn.ReLU()]
        after_blocks = [_norm(norm, widths[-1]), nn.ReLU()] if is_first_norm else []
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
        super().__init__(*before_blocks, *blocks, *after_blocks, *head)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (b, c, s, s)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXt(nn.Sequential):
    """After Liu et al. 2022 (arXiv 2201.03545), patches of two pixels.

    Args:
        kernel: side of the depthwise convolutions.
        layer_scale: what their branches start multiplied by, a factor a channel; None: nothing.
    """

    def __init__(
        self,
        widths: Sequence[int],
        kernel: int = 5,
        layer_scale: float | None = None,
        classes: int = 10,
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 2, stride=2), ChannelNorm(widths[0])]
        for before, width in pairwise((widths[0], *widths)):
            if before != width:
                layers += [ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2)]
            layers.append(Residual(_convnext_branch(width, kernel, layer_scale)))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1])]
        super().__init__(*layers, *head, nn.Linear(widths[-1], classes))


class ChannelScale(nn.Module):
    """A factor a channel."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.full((width, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.factors * x


def _convnext_branch(width: int, kernel: int, layer_scale: float | None) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width),
        ChannelNorm(width),
        nn.Conv2d(width, 4 * width, 1),
        nn.GELU(),
        nn.Conv2d(4 * width, width, 1),
    ]
    if layer_scale is not None:
        layers.append(ChannelScale(width, layer_scale))
    return nn.Sequential(*layers)


class MobileNet(nn.Sequential):
    """Depthwise-separable convolutions with BatchNorm.

    Args:
        expansion: inverted residuals that widen by it (Sandler et al. 2018, arXiv 1801.04381); 0:
            the plain pairs of convolutions of Howard et al. 2017 (arXiv 1704.04861).
        squeeze: with squeeze-and-excitation (Hu et al. 2018).
    """

    def __init__(
        self,
        widths: Sequence[int],
        expansion: int = 0,
        squeeze: bool = False,
        classes: int = 10,
    ) -> None:
        layers = [*_convolved(3, widths[0], 3, 1)]
        for before, width in pairwise(widths):
            if expansion:
                layers.append(_inverted(before, width, expansion, squeeze))
            else:
                stride = 1 if before == width else 2
                layers += [*_convolved(before, before, 3, stride, before)]
                layers += [*_convolved(before, width, 1, 1)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
        super().__init__(*layers, *head)


def _convolved(before: int, width: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
    )


class Excitation(nn.Module):
    """Channels weighed by what their means say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(width, width // 4)
        self.wide = nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.wide(F.relu(self.narrow(x.mean((2, 3))))))
        return x * gates[..., None, None]


def _inverted(before: int, width: int, expansion: int, squeeze: bool) -> nn.Module:
    inner = expansion * before
    stride = 1 if before == width else 2
    branch = nn.Sequential(
        _convolved(before, inner, 1, 1),
        _convolved(inner, inner, 3, stride, inner),
        Excitation(inner) if squeeze else nn.Identity(),
        nn.Conv2d(inner, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )
    return Residual(branch) if before == width else branch


class UNet(nn.Module):
    """Down and up again with skips (Ronneberger et al. 2015), (b, 1, s, s) -> (b, channels, s, s).

    Three levels of 3x3 convolutions with GroupNorm and SiLU. ``channels``: of the output.
    """

    def __init__(self, width: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.first = _smooth(1, width)
        self.second = _smooth(width, 2 * width, stride=2)
        self.deepest = _smooth(2 * width, 2 * width, stride=2)
        self.up_second = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2)
        self.joined_second = _smooth(4 * width, 2 * width)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined_first = _smooth(2 * width, width)
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        up = self.up_second(self.deepest(second))
        up = self.joined_second(torch.cat([second, up], 1))
        up = self.up_first(up)
        return self.head(self.joined_first(torch.cat([first, up], 1)))


def _smooth(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, width), nn.SiLU())


class ConvolutionalAutoencoder(nn.Sequential):
    """Strided convolutions and transposed ones, (b, 1, s, s) -> (b, 1, s, s)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, width // 2, 1),
            nn.ConvTranspose2d(width // 2, 2 * width, 2, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 1, 2, stride=2),
        )
