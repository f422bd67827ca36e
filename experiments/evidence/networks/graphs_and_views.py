"""Networks on graphs, and pairs of encoders that are trained to agree.

Letters: b examples, k nodes, f features, d width, C classes, t tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.problem.batches import Batch
from hessian_tools.problem.losses import Loss

TEMPERATURE = 0.2


class GraphNetwork(nn.Module):
    """Layers over (nodes, adjacency), then the mean node's logits, (b, C).

    Args:
        first: nodes as they come -> (b, k, d).
    """

    def __init__(self, first: nn.Module, layers: list[nn.Module], d: int, classes: int = 10):
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(d, classes)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = self.first(nodes)
        for layer in self.layers:
            x = layer(x, adjacency)
        return self.head(x.mean(1))


class GraphConvolution(nn.Module):
    """Mean of the neighbours, then a linear map and ReLU (Kipf & Welling 2017)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, d)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return F.relu(self.linear(adjacency @ x))


class GraphIsomorphism(nn.Module):
    """An MLP of a node and its neighbours' sum, with a skip (Xu et al. 2019)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight_of_node = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        summed = (adjacency > 0).to(x.dtype) @ x
        return x + self.mlp((1 + self.weight_of_node) * x + summed)


class GraphAttention(nn.Module):
    """Neighbours weighed by a learned score of both ends (Velickovic et al. 2018), one head."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.value = nn.Linear(d, d)
        self.to_score = nn.Linear(d, 1)
        self.from_score = nn.Linear(d, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        values = self.value(x)
        scores = F.leaky_relu(self.to_score(values) + self.from_score(values).mT, 0.2)
        weights = scores.masked_fill(adjacency == 0, float("-inf")).softmax(-1)
        return F.elu(weights @ values)


class TokenEncoder(nn.Module):
    """Mean embedding through an MLP, (b, t) -> (b, d)."""

    def __init__(self, vocabulary: int, d: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.tokens(tokens).mean(1))


class TwoViews(nn.Module):
    """Unit embeddings of two views, by one encoder or one each, (b, 2, d)."""

    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first
        self.second = second or first

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        made = torch.stack([self.first(first), self.second(second)], 1)
        return F.normalize(made, dim=2)


def logits_of_views(model: nn.Module, batch: Batch) -> Tensor:
    """(b, b) similarities of every first view with every second, over the temperature."""
    made = model(*batch)
    return made[:, 0] @ made[:, 1].mT / TEMPERATURE


def agreement(logits: Tensor, batch: Batch) -> Tensor:
    """InfoNCE both ways: each view is to be told from those of the batch's other examples."""
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.mT, targets)) / 2


# convex in its outputs, so that the Gauss-Newton matrix is positive semidefinite
info_nce = Loss(logits_of_views, agreement)
