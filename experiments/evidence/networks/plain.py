"""Networks without convolutions or attention: linear ones, autoencoders, byte-wise MLPs.

Letters: b examples, t tokens, d width, V vocabulary, C classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """Softmax regression on the token before: (b, t) -> logits (b, t, V)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocabulary, vocabulary)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)


class BagOfTokens(nn.Module):
    """Softmax regression on how often tokens came in the window so far: (b, t) -> (b, t, V)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocabulary, vocabulary)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.logits(tokens).cumsum(1) / count.sqrt()[:, None] + self.bias


class BagOfWindow(nn.Module):
    """Softmax regression on how often tokens are in the window: (b, t) -> logits (b, C)."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocabulary, classes)
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).sum(1) / tokens.shape[1] ** 0.5 + self.bias


class NormalisedMLP(nn.Sequential):
    """An MLP with a LayerNorm before every activation, (b, ...) -> (b, sizes[-1])."""

    def __init__(self, sizes: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, width in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, width), nn.LayerNorm(width), nn.GELU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))


class TokenMLP(nn.Module):
    """The neural language model of Bengio et al. 2003, (b, t) -> logits (b, t, V).

    The last ``reach`` tokens' embeddings, side by side, through one hidden layer.
    """

    def __init__(self, vocabulary: int, reach: int = 6, d: int = 16, hidden: int = 96) -> None:
        super().__init__()
        self.reach = reach
        self.tokens = nn.Embedding(vocabulary, d)
        self.hidden = nn.Linear(reach * d, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = nn.functional.pad(self.tokens(tokens), (0, 0, self.reach - 1, 0))
        windows = embedded.unfold(1, self.reach, 1).flatten(2)
        return self.head(torch.tanh(self.hidden(windows)))


class Autoencoder(nn.Sequential):
    """Narrowing and widening again, (b, ...) -> (b, sizes[0])."""

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, width in pairwise([*sizes, *sizes[-2::-1]]):
            layers += [nn.Linear(before, width), activation()]
        super().__init__(*layers[:-1])
