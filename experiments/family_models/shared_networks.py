"""Pieces that several configurations are made of."""

from typing import Any

from torch import Tensor, nn

from family_models.setting import Setting, cross_entropy, lengths, tokens, vectors

CLASSES = 3


def classifier(model: nn.Module, batches: Any = None, **options: Any) -> Setting:
    batches = batches or vectors()
    return Setting(model, cross_entropy, batches, lengths(batches), options=options)


def mlp(activation: nn.Module, inputs: int = 6, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), activation, nn.Linear(width, CLASSES))


class Between(nn.Module):
    """A layer between an embedding of tokens and a head."""

    def __init__(self, layer: nn.Module, width: int = 8, vocabulary: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = layer
        self.head = nn.LazyLinear(vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        out = self.layer(self.embedding(ids))
        return self.head(out[0] if isinstance(out, tuple) else out)


def sequence(layer: nn.Module, **options: Any) -> Setting:
    model = Between(layer)
    batches = tokens()
    model(batches[0][0])  # gives the head its width
    return classifier(model, batches, **options)
