"""Language models without attention: recurrent, state-space, convolutional.

Letters: b examples, t tokens, d width, n states of a channel, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageModel(nn.Module):
    """Embedding, layers (b, t, d) -> (b, t, d), head: (b, t) -> logits (b, t, V)."""

    def __init__(self, vocabulary: int, d: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(d, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens)))


class Recurrent(nn.Module):
    """One of torch's recurrent layers, without its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def recurrent(vocabulary: int, kind: type[nn.RNNBase], d: int, layers: int = 1) -> LanguageModel:
    """Of ``kind``: nn.LSTM, nn.GRU or nn.RNN."""
    made = kind(d, d, num_layers=layers, batch_first=True)
    return LanguageModel(vocabulary, d, [Recurrent(made)])


class Skipped(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, d: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class DiagonalStateSpace(nn.Module):
    """A linear recurrence a channel with n real decays, as a convolution (S4D: Gu et al. 2022).

    The kernel of a channel is sum_n c_n exp(-a_n step k) at lag k. (b, t, d) -> (b, t, d).
    """

    def __init__(self, d: int, states: int = 8) -> None:
        super().__init__()
        rates = torch.arange(1.0, states + 1)
        self.log_rates = nn.Parameter(rates.log().expand(d, -1).clone())
        self.log_step = nn.Parameter(torch.empty(d).uniform_(-4.6, -0.7))  # 0.01 to 0.5
        self.readout = nn.Parameter(torch.randn(d, states) / states**0.5)
        self.direct = nn.Parameter(torch.ones(d))
        self.mix = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        lags = torch.arange(length, device=x.device)
        step = self.log_step.exp()[:, None]
        decays = self.log_rates.exp() * step  # (d, n)
        powers = torch.exp(-decays[..., None] * lags)
        kernel = torch.einsum("dn,dnt->dt", self.readout * step, powers)
        padded = F.pad(x.mT, (length - 1, 0))  # causal
        mixed = F.conv1d(padded, kernel.flip(1)[:, None], groups=len(kernel)).mT
        return self.mix(F.gelu(mixed + self.direct * x))


class GatedScan(nn.Module):
    """A recurrence whose decays depend on the input (minGRU: Feng et al. 2024, arXiv 2410.01201).

    h_t = (1 - z_t) h_{t-1} + z_t v_t, step by step. (b, t, d) -> (b, t, d).
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.mix = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.gate(x))
        values = gates * self.value(x)
        state = torch.zeros_like(x[:, 0])
        states = []
        for gate, value in zip(gates.unbind(1), values.unbind(1), strict=True):
            state = (1 - gate) * state + value
            states.append(state)
        return self.mix(torch.stack(states, 1))


class CausalConvolution(nn.Module):
    """Dilated, padded in front; ``gated`` with a second one's sigmoid (Dauphin et al. 2017)."""

    def __init__(self, d: int, kernel: int, dilation: int = 1, gated: bool = False) -> None:
        super().__init__()
        self.padding = (kernel - 1) * dilation
        self.gated = gated
        self.convolution = nn.Conv1d(d, 2 * d if gated else d, kernel, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.convolution(F.pad(x.mT, (self.padding, 0))).mT
        return F.glu(convolved, -1) if self.gated else F.relu(convolved)


def temporal_convolutions(vocabulary: int, d: int, dilations: tuple[int, ...]) -> LanguageModel:
    """The residual stack of Bai et al. 2018 (arXiv 1803.01271), with LayerNorm."""
    layers: list[nn.Module] = [
        Skipped(d, CausalConvolution(d, 3, dilation)) for dilation in dilations
    ]
    return LanguageModel(vocabulary, d, layers)


def gated_convolutions(vocabulary: int, d: int, layers: int) -> LanguageModel:
    """The gated convolutional language model of Dauphin et al. 2017, with skips."""
    made: list[nn.Module] = [Skipped(d, CausalConvolution(d, 4, gated=True)) for _ in range(layers)]
    return LanguageModel(vocabulary, d, made)


def plain_convolutions(vocabulary: int, d: int, layers: int) -> LanguageModel:
    """No skips, no norms."""
    made: list[nn.Module] = [CausalConvolution(d, 3) for _ in range(layers)]
    return LanguageModel(vocabulary, d, made)


def state_space(vocabulary: int, d: int, layers: int) -> LanguageModel:
    """Diagonal state spaces, each followed by an MLP."""
    made: list[nn.Module] = []
    for _ in range(layers):
        mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        made += [Skipped(d, DiagonalStateSpace(d)), Skipped(d, mlp)]
    return LanguageModel(vocabulary, d, made)


def gated_scan(vocabulary: int, d: int, layers: int) -> LanguageModel:
    made: list[nn.Module] = [Skipped(d, GatedScan(d)) for _ in range(layers)]
    return LanguageModel(vocabulary, d, made)
