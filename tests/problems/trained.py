"""Problems to train on whose best rates are known."""

import torch
from torch import Tensor, nn

from hessian_tools.training.sources import WholeBatches
from hessian_tools.training.stream import Stream


class Bowl(nn.Module):
    """A parameter w (2,) of ones, whose loss is h |w|^2 / 2."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64) * (1 + seed))


def bowl_loss(model: Bowl, batch: Tensor) -> Tensor:
    return batch.mean() * model.w.square().sum() / 2


def bowl_stream(curvature: float = 1.0) -> Stream:
    """h is in every batch: plain gradient descent is there in one step of rate 1/h."""
    batches = [torch.full((1,), curvature, dtype=torch.float64)] * 3
    return Stream(WholeBatches(batches), None, bowl_loss, described="a bowl")


class Valley(nn.Module):
    """A parameter w (20,) of ones."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(20, dtype=torch.float64))


def valley_loss(model: Valley, batch: Tensor) -> Tensor:
    """1 + h sum_i k_i w_i^2 / 2, with k from 1e-3 to 1: no rate is there in one step."""
    curvatures = torch.logspace(-3, 0, 20, dtype=torch.float64)
    return 1 + batch.mean() * (curvatures * model.w.square()).sum() / 2


def valley_stream(curvature: float = 1.0) -> Stream:
    batches = [torch.full((1,), curvature, dtype=torch.float64)]
    return Stream(WholeBatches(batches), None, valley_loss, described="a valley")


def classifier(seed: int = 0) -> nn.Module:
    """A small network for inputs (b, 6) and three classes, with dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def points(count: int = 120) -> tuple[Tensor, Tensor]:
    """A batch of three noisy clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 6, generator=generator)
    return centres[labels] + torch.randn(count, 6, generator=generator), labels
