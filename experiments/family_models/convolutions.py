"""Own networks: convolutions, pooling, interpolation."""

from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration
from family_models.shared_networks import CLASSES, classifier


@configuration("convolution/one-dimensional-dilated")
def dilated() -> Setting:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, dilation=2, padding=2),
        nn.GELU(),
        nn.Conv1d(8, 8, 3, groups=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    batches = [(torch.randn(n, 3, 12), torch.randint(CLASSES, (n,))) for n in (5, 3)]
    return classifier(model, batches)


@configuration("convolution/three-dimensional")
def volumes() -> Setting:
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.SiLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(32, CLASSES)
    )
    batches = [(torch.randn(n, 1, 6, 6, 6), torch.randint(CLASSES, (n,))) for n in (4, 2)]
    return classifier(model, batches)


@configuration("convolution/unet-transposed-skips")
def unet() -> Setting:
    """A small U-Net that predicts noise, as diffusion models do."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(1, 8, 3, padding=1)
            self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.time = nn.Linear(2, 8)
            self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
            self.out = nn.Conv2d(16, 1, 3, padding=1)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            first = nn.functional.silu(self.inner(x))
            phase = torch.stack([time.sin(), time.cos()], -1)
            deep = self.norm(self.down(first)) + self.time(phase)[..., None, None]
            up = self.up(nn.functional.silu(deep))
            return self.out(torch.cat([first, up], 1))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        image, noise, time = batch
        a = torch.exp(-time)[:, None, None, None]
        return (model(a * image + (1 - a * a).sqrt() * noise, time) - noise).square().mean()

    batches = [
        (torch.randn(n, 1, 8, 8), torch.randn(n, 1, 8, 8), torch.rand(n) + 0.1) for n in (3, 2)
    ]
    return Setting(UNet(), loss, batches, [3.0, 2.0])


@configuration("convolution/interpolation-and-pooling")
def pooled() -> Setting:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 6, 3, padding="same", padding_mode="circular")
            self.second = nn.Conv2d(6, 6, 3)
            self.norm = nn.InstanceNorm2d(6, affine=True)
            self.head = nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.max_pool2d(torch.tanh(self.first(x)), 2)
            h = nn.functional.interpolate(h, scale_factor=1.5, mode="bilinear")
            h = self.norm(self.second(h))
            return self.head(nn.functional.adaptive_avg_pool2d(h, 2).flatten(1))

    batches = [(torch.randn(n, 1, 8, 8), torch.randint(CLASSES, (n,))) for n in (4, 2)]
    return classifier(Pooled(), batches)


@configuration("convolution/spatial-transformer")
def spatial() -> Setting:
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.where = nn.Linear(64, 6)
            self.head = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            upright = torch.eye(2, 3, dtype=x.dtype).flatten()
            theta = (0.1 * torch.tanh(self.where(x.flatten(1))) + 0.7 * upright).view(-1, 2, 3)
            grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
            return self.head(nn.functional.grid_sample(x, grid, align_corners=False).flatten(1))

    batches = [(torch.randn(n, 1, 8, 8), torch.randint(CLASSES, (n,))) for n in (4, 2)]
    return classifier(Spatial(), batches)
