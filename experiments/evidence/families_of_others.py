"""The families on graphs and on pairs of views."""

import functools

from torch import nn

from evidence.networks.convolutions import PlainCNN
from evidence.networks.graphs_and_views import (
    GraphAttention,
    GraphConvolution,
    GraphIsomorphism,
    GraphNetwork,
    TokenEncoder,
    TwoViews,
    info_nce,
)
from evidence.pair import Pair, Traits, family
from evidence.sources import neighbouring_windows, patch_graphs, pool, views, word_graphs
from hessian_tools.problem.networks import MLP
from hessian_tools.training import Stream

PLAIN = Traits(is_transformer=False, is_text=False)
TEXT = Traits(is_transformer=False, is_text=True)
SIDE = 16
SIZE = 512  # of the vocabulary


def graph_network(first: nn.Module, kind: type[nn.Module], d: int, layers: int) -> nn.Module:
    return GraphNetwork(first, [kind(d) for _ in range(layers)], d)


def convolutions_on_patches() -> nn.Module:
    return graph_network(nn.Linear(4, 32), GraphConvolution, 32, 3)


def sums_on_patches() -> nn.Module:
    return graph_network(nn.Linear(4, 24), GraphIsomorphism, 24, 3)


def attention_on_words() -> nn.Module:
    return graph_network(nn.Embedding(SIZE, 32), GraphAttention, 32, 2)


@functools.cache
def image_views() -> Stream:
    return pool(views(SIDE), info_nce)


@functools.cache
def text_views() -> Stream:
    return pool(neighbouring_windows("bpe", 16, SIZE), info_nce)


PAIRS: list[Pair] = [
    *family(
        "graph",
        PLAIN,
        {
            "convolutions": (convolutions_on_patches, patch_graphs),
            "sums": (sums_on_patches, patch_graphs),
        },
    ),
    *family("graph", TEXT, {"attention-words": (attention_on_words, word_graphs)}),
    *family(
        "contrastive",
        PLAIN,
        {
            "mlp": (lambda: TwoViews(MLP((SIDE**2, 96, 32))), image_views),
            "cnn": (lambda: TwoViews(PlainCNN((8, 16, 16, 32), 32)), image_views),
        },
    ),
    *family(
        "contrastive",
        TEXT,
        {"text": (lambda: TwoViews(TokenEncoder(SIZE, 32), TokenEncoder(SIZE, 32)), text_views)},
    ),
]
