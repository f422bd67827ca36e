"""Families of blocks whose eigenvalues are known, for experiments on what probes and steps leave.

A family is a list of spectra, one a block. Eight are planted; two are the exact spectra of the
weight blocks of a small Transformer and a small ResNet at initialisation.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import hessian_tools as ht

Floats = NDArray[np.float64]
SIZE = 300  # of a planted block
LEAST = 100  # smaller blocks of the networks are exact in any run, and left out
SCALES = 10 ** np.linspace(0, -2.7, 6)


def planted() -> dict[str, list[Floats]]:
    """Eight families of six blocks of SIZE eigenvalues."""
    rng = np.random.default_rng(5)
    wishart = marchenko_pastur(rng)
    shapes = [
        wishart,
        0.3 * rng.standard_normal(SIZE),
        10 ** rng.normal(-1, 0.7, SIZE),
        0.05 * np.abs(rng.standard_normal(SIZE)),
        np.linspace(0.5, 1.5, SIZE),
        np.append(np.zeros(SIZE // 2), 10 ** rng.normal(-1, 0.3, SIZE // 2)),
    ]
    powers = [(1, 0.7), (0.5, 1), (0.3, 1.3), (1, 1.6), (0.1, 2), (2, 1)]
    normals = [(1, 0), (1, 1), (0.5, 0), (0.5, 1), (0.2, 0), (0.2, 2)]
    return {
        "mixed shapes": shapes,
        "network-like": [network_like(scale, seed) for seed, scale in enumerate(SCALES)],
        "one shape, scaled": [scale * wishart for scale in SCALES],
        "power laws": [s * np.arange(1.0, SIZE + 1) ** -a for s, a in powers],
        "one outlier each": [
            np.append(top, 1e-3 * rng.standard_normal(SIZE - 1))
            for top in (1, 0.8, 0.3, 0.2, 0.05, 0.5)
        ],
        "indefinite": [s * (rng.standard_normal(SIZE) + mean) for s, mean in normals],
        "identical, bulk": [wishart] * 6,
        "identical, network-like": [network_like(1, 0)] * 6,
    }


def marchenko_pastur(rng: np.random.Generator) -> Floats:
    """Eigenvalues of a Wishart matrix of twice as many samples as dimensions."""
    matrix = rng.standard_normal((SIZE, 2 * SIZE)) / np.sqrt(2 * SIZE)
    return np.linalg.eigvalsh(matrix @ matrix.T)


def network_like(scale: float, seed: int, outliers: int = 20) -> Floats:
    """A bulk of both signs around 1e-4, and outliers between 0.03 and 1."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([1, -0.3], SIZE - outliers)
    bulk = 1e-4 * 10 ** rng.normal(0, 0.7, SIZE - outliers) * signs
    return scale * np.append(bulk, 10 ** rng.uniform(-1.5, 0, outliers))


class Attention(nn.Module):
    """One pre-norm block with an embedding and a head."""

    def __init__(self, width: int = 12, vocabulary: int = 16, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.before_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) + self.position
        normal = self.before_attention(hidden)
        query, key, value = self.query(normal), self.key(normal), self.value(normal)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended)
        hidden = hidden + self.down(F.gelu(self.up(self.before_mlp(hidden))))
        return self.head(hidden)


class Residual(nn.Module):
    """Four convolutions, one skip connection, BatchNorm, and a head."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        inside = {"kernel_size": 3, "padding": 1, "bias": False}
        self.stem = nn.Conv2d(3, channels, **inside)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.first = nn.Conv2d(channels, channels, **inside)
        self.second = nn.Conv2d(channels, channels, **inside)
        self.down = nn.Conv2d(channels, channels, stride=2, **inside)
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.norms[0](self.stem(images)))
        inner = F.gelu(self.norms[1](self.first(hidden)))
        hidden = F.gelu(hidden + self.norms[2](self.second(inner)))
        pooled = F.adaptive_avg_pool2d(F.gelu(self.down(hidden)), 2)
        return self.head(pooled.flatten(1))


def networks() -> dict[str, ht.Problem]:
    """The two networks at initialisation, in float64, on random data."""
    torch.manual_seed(0)
    tokens = torch.randint(16, (16, 12))
    text = [(tokens, tokens.roll(-1, 1))]
    images = [(torch.randn(32, 3, 8, 8, dtype=torch.float64), torch.randint(10, (32,)))]

    def next_token(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return {
        "a Transformer": ht.Problem(Attention().double(), next_token, text),
        "a ResNet": ht.Problem(Residual().double(), ht.cross_entropy, images, batch_stats=True),
    }


def dense_blocks(problem: ht.Problem) -> dict[str, Floats]:
    """The weight blocks of at least LEAST rows, as matrices."""
    hessian = ht.HessianOperator(problem)
    found = {}
    for block in ht.partition(problem.model, "weights"):
        if block.numel >= LEAST:
            operator = hessian.stacked(block.as_cut())
            matrix = operator.matmat(torch.eye(block.numel, dtype=torch.float64)).numpy()
            found[block.name] = (matrix + matrix.T) / 2
    return found
