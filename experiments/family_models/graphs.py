"""Own networks: graphs as objects, tuples and dataclasses, sparse matrices, embeddings."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, cross_entropy, lengths, tokens
from family_models.shared_networks import CLASSES, classifier


class Graph:
    """One graph: node features, adjacency, labels; ``repr`` tells shapes only."""

    def __init__(self, x: Tensor, adjacency: Tensor, y: Tensor) -> None:
        self.x = x
        self.adjacency = adjacency
        self.y = y

    def __repr__(self) -> str:
        return f"Graph(x={list(self.x.shape)})"


@dataclass
class EdgeList:
    """The same as edges."""

    x: Tensor
    edges: Tensor  # (2, number of edges)
    y: Tensor


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(adjacency @ torch.tanh(self.first(adjacency @ x)))


def _graphs(*sizes: int) -> list[Graph]:
    graphs = []
    for n in sizes:
        adjacency = (torch.rand(n, n) < 0.3).float() + torch.eye(n)
        adjacency = adjacency / adjacency.sum(1, keepdim=True)
        graphs.append(Graph(torch.randn(n, 5), adjacency, torch.randint(CLASSES, (n,))))
    return graphs


def _graph_loss(model: nn.Module, graph: Any) -> Tensor:
    return nn.functional.cross_entropy(model(graph.x, graph.adjacency), graph.y)


@configuration("graph/objects-dense-adjacency")
def graph_objects() -> Setting:
    graphs = _graphs(12, 7, 7)
    counted = {"num_examples": lambda graph: len(graph.y)}
    return Setting(GraphNetwork(), _graph_loss, graphs, [12.0, 7.0, 7.0], options=counted)


@configuration("graph/objects-sparse-adjacency")
def graph_sparse_objects() -> Setting:
    graphs = [Graph(g.x, g.adjacency.to_sparse(), g.y) for g in _graphs(12, 7, 7)]
    counted = {"num_examples": lambda graph: len(graph.y)}
    return Setting(GraphNetwork(), _graph_loss, graphs, [12.0, 7.0, 7.0], options=counted)


def _graph_tuples(layout: str) -> Setting:
    convert = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr, "dense": lambda t: t}[layout]
    batches = [((g.x, convert(g.adjacency)), g.y) for g in _graphs(12, 7)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(model(*inputs), targets)

    return Setting(GraphNetwork(), loss, batches, [12.0, 7.0])


@configuration("graph/tuples-dense-adjacency")
def graph_dense() -> Setting:
    return _graph_tuples("dense")


@configuration("graph/tuples-sparse-coo")
def graph_coo() -> Setting:
    return _graph_tuples("coo")


@configuration("graph/tuples-sparse-csr")
def graph_csr() -> Setting:
    return _graph_tuples("csr")


@configuration("graph/dataclasses-of-edges-scatter")
def graph_edges() -> Setting:
    class MessagePassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.message = nn.Linear(10, 8)
            self.update = nn.Linear(13, CLASSES)

        def forward(self, graph: EdgeList) -> Tensor:
            source, target = graph.edges
            pairs = torch.cat([graph.x[source], graph.x[target]], -1)
            messages = torch.tanh(self.message(pairs))
            summed = messages.new_zeros(len(graph.x), 8).index_add(0, target, messages)
            return self.update(torch.cat([graph.x, summed], -1))

    def loss(model: nn.Module, graph: EdgeList) -> Tensor:
        return nn.functional.cross_entropy(model(graph), graph.y)

    graphs = [EdgeList(g.x, g.adjacency.nonzero().T, g.y) for g in _graphs(12, 7)]
    counted = {"num_examples": lambda graph: len(graph.y)}
    return Setting(MessagePassing(), loss, graphs, [12.0, 7.0], options=counted)


@configuration("graph/attention-over-edges")
def graph_attention() -> Setting:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Linear(5, 8)
            self.score = nn.Linear(16, 1)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            source, target = edges
            h = self.value(x)
            score = self.score(torch.cat([h[source], h[target]], -1))[:, 0]
            raised = nn.functional.elu(score).exp()
            total = raised.new_zeros(len(x)).scatter_add(0, target, raised)
            weighted = h[source] * (raised / total[target])[:, None]
            return self.head(torch.tanh(torch.zeros_like(h).index_add(0, target, weighted)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        (x, edges), targets = batch
        return nn.functional.cross_entropy(model(x, edges), targets)

    batches = [((g.x, g.adjacency.nonzero().T), g.y) for g in _graphs(12, 7)]
    counted = {"num_examples": lambda batch: len(batch[1])}
    return Setting(Attention(), loss, batches, [12.0, 7.0], options=counted)


@configuration("embedding/sparse-gradients")
def sparse_embedding() -> Setting:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Tanh(), nn.Linear(8, 20))
    return classifier(model, tokens())


@configuration("embedding/bags")
def bags() -> Setting:
    model = nn.Sequential(nn.EmbeddingBag(20, 8, mode="mean"), nn.Tanh(), nn.Linear(8, CLASSES))
    batches = [(torch.randint(20, (n, 4)), torch.randint(CLASSES, (n,))) for n in (6, 3)]
    return Setting(model, cross_entropy, batches, [6.0, 3.0], refusal="embedding_bag")


@configuration("embedding/padding-index")
def padding_index() -> Setting:
    """The padding row gets no gradient, so the gradient is not the loss's wherever it is read."""
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Tanh(), nn.Linear(8, 20))
    batches = tokens()
    batches[0][0][:, -2:] = 0
    return Setting(model, cross_entropy, batches, lengths(batches), refusal="gradient")


@configuration("embedding/renormalised-rows")
def renormalised() -> Setting:
    """``max_norm`` writes to the weights in the forward pass: no function of the weights."""
    batches = tokens()
    return Setting(
        nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Tanh(), nn.Linear(8, 20)),
        cross_entropy,
        batches,
        lengths(batches),
        refusal="max_norm",
    )
