"""One small Transformer whose parts are chosen by arguments, for text, and for images as tokens.

Letters: b examples, t tokens, d width, h heads, V vocabulary, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Design:
    """How a Transformer is made.

    Attributes:
        post_norm: LayerNorm after the sum, as Vaswani et al. 2017 have it, not before the branch.
        qk_norm: LayerNorm of every head's queries and keys.
        key_heads: heads of keys and values, shared by groups of queries' heads; None: as many.
        experts: of which each token takes ``chosen``; 0: one MLP for all.
        causal: each token sees those before it.
        std: of the first weights; None: Xavier's, as torch's own Transformer starts.
    """

    d: int = 32
    heads: int = 4
    layers: int = 2
    post_norm: bool = False
    qk_norm: bool = False
    key_heads: int | None = None
    experts: int = 0
    chosen: int = 1
    tied: bool = True
    causal: bool = True
    std: float | None = 0.02


class Attention(nn.Module):
    """Self-attention with separate query, key and value, (b, t, d) -> (b, t, d)."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        d, heads = design.d, design.heads
        self.size = d // heads
        self.causal = design.causal
        self.groups = heads // (design.key_heads or heads)
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d // self.groups)
        self.value = nn.Linear(d, d // self.groups)
        self.proj = nn.Linear(d, d)
        self.query_norm = nn.LayerNorm(self.size) if design.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(self.size) if design.qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_norm(self._heads(self.query(x)))
        key = self.key_norm(self._heads(self.key(x))).repeat_interleave(self.groups, 1)
        value = self._heads(self.value(x)).repeat_interleave(self.groups, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)


class Experts(nn.Module):
    """A mixture of MLPs, of which every token takes the ``chosen`` its router ranks highest.

    All are computed and all but the chosen weighed by 0, which is cheap at this size. Their weights
    are the router's probabilities (Shazeer et al. 2017; Fedus et al. 2021 for one).
    """

    def __init__(self, d: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(d, experts, bias=False)
        self.fc = nn.Parameter(torch.empty(experts, d, 2 * d))
        self.proj = nn.Parameter(torch.empty(experts, 2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        least = gates.topk(self.chosen, dim=-1).values[..., -1:]
        gates = gates * (gates >= least)
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, self.fc))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.proj, gates)


class MLPBlock(nn.Sequential):
    def __init__(self, d: int) -> None:
        super().__init__(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))


class Layer(nn.Module):
    """Attention, then MLP or experts, each with a skip."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        d = design.d
        self.post_norm = design.post_norm
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.attention = Attention(design)
        self.mlp = Experts(d, design.experts, design.chosen) if design.experts else MLPBlock(d)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens to logits, (b, t) -> (b, t, V), with learned positions.

    ``positions``: the most tokens.
    """

    def __init__(self, vocabulary: int, positions: int, design: Design | None = None) -> None:
        super().__init__()
        design = design or Design()
        self.tokens = nn.Embedding(vocabulary, design.d)
        self.positions = nn.Embedding(positions, design.d)
        self.layers = nn.Sequential(*[Layer(design) for _ in range(design.layers)])
        self.norm = nn.Identity() if design.post_norm else nn.LayerNorm(design.d)
        self.head = nn.Linear(design.d, vocabulary, bias=False)
        start(self, design.std)
        if design.tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.layers(x)))


class VisionTransformer(nn.Module):
    """Images as tokens of patches, (b, 3, s, s) -> (b, C): the mean token's logits."""

    def __init__(self, side: int, patch: int, design: Design, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, design.d, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((side // patch) ** 2, design.d))
        self.layers = nn.Sequential(*[Layer(design) for _ in range(design.layers)])
        self.norm = nn.LayerNorm(design.d)
        self.head = nn.Linear(design.d, classes)
        start(self, design.std)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


class EncoderDecoder(nn.Module):
    """torch's own encoder and decoder: (hidden (b, t), shifted (b, t)) -> logits (b, t, V).

    One layer each. ``norm_first``: pre-norm.
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        d: int = 32,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        shape = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        encoder_layer = nn.TransformerEncoderLayer(d, 4, 4 * d, **shape)
        decoder_layer = nn.TransformerDecoderLayer(d, 4, 4 * d, **shape)
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(positions, d)
        self.encoder = nn.TransformerEncoder(
            encoder_layer, 1, nn.LayerNorm(d), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder_layer, 1, nn.LayerNorm(d))
        self.head = nn.Linear(d, vocabulary)
        start(self, None)

    def forward(self, hidden: Tensor, shifted: Tensor) -> Tensor:
        length = hidden.shape[1]
        places = self.positions(torch.arange(length, device=hidden.device))
        later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        read = self.encoder(self.tokens(hidden) + places)
        written = self.decoder(self.tokens(shifted) + places, read, tgt_mask=later)
        return self.head(written)


def start(network: nn.Module, std: float | None) -> None:
    """Weights N(0, std^2) or Xavier's, biases 0; the factors of a LayerNorm stay 1."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        elif std is None and not name.startswith(("tokens", "positions")):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.normal_(parameter, std=std or 0.02)
