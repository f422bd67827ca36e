"""Own networks: implicit layers, generated weights, generative models, decompositions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import (
    Setting,
    configuration,
    squared_error,
)
from family_models.shared_networks import CLASSES, classifier, mlp, sequence


@configuration("implicit/deep-equilibrium-fixed-iterations")
def equilibrium() -> Setting:
    class Equilibrium(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(6, 8)
            self.again = nn.Linear(8, 8, bias=False)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.zeros(len(x), 8, dtype=x.dtype)
            for _ in range(8):
                z = torch.tanh(self.inside(x) + 0.5 * self.again(z))
            return self.head(z)

    return classifier(Equilibrium())


@configuration("implicit/linear-solve")
def solved() -> Setting:
    class Solved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6) / 4)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            system = torch.eye(6, dtype=x.dtype) + self.matrix @ self.matrix.T
            logdet = torch.linalg.slogdet(system).logabsdet
            return self.head(torch.linalg.solve(system, x.T).T * torch.tanh(logdet))

    return classifier(Solved())


@configuration("implicit/cholesky-gaussian-process")
def gaussian_process() -> Setting:
    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Linear(6, 8)
            self.log_noise = nn.Parameter(torch.tensor(-1.0))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.features(x))
            noise = self.log_noise.exp() * torch.eye(len(x), dtype=x.dtype)
            return h @ h.T + noise

    def likelihood(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        factor = torch.linalg.cholesky(model(x))
        weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
        return 0.5 * y @ weights + factor.diagonal().log().sum()

    batch = (torch.randn(10, 6), torch.randn(10))
    return Setting(Kernel(), likelihood, [batch], [10.0])


@configuration("implicit/neural-ode-runge-kutta")
def neural_ode() -> Setting:
    class NeuralODE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 6))
            self.head = nn.Linear(6, CLASSES)

        def derivative(self, time: float, x: Tensor) -> Tensor:
            return self.field(torch.cat([x, torch.full_like(x[:, :1], time)], 1))

        def forward(self, x: Tensor) -> Tensor:
            step = 0.25
            for number in range(4):
                time = number * step
                a = self.derivative(time, x)
                b = self.derivative(time + step / 2, x + step / 2 * a)
                c = self.derivative(time + step / 2, x + step / 2 * b)
                d = self.derivative(time + step, x + step * c)
                x = x + step / 6 * (a + 2 * b + 2 * c + d)
            return self.head(x)

    return classifier(NeuralODE())


@configuration("generated/hypernetwork")
def hypernetwork() -> Setting:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Parameter(torch.randn(4))
            self.maker = nn.Linear(4, 6 * 8 + 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.maker(self.code).split([48, 8])
            return self.head(torch.tanh(nn.functional.linear(x, weight.view(8, 6), bias)))

    return classifier(Hyper())


@configuration("generated/hypernetwork-by-functional-call")
def functional() -> Setting:
    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.template = mlp(nn.Tanh(), width=4)
            self.code = nn.Parameter(torch.randn(4))
            self.maker = nn.Linear(4, sum(p.numel() for p in self.template.parameters()))
            self.template.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            named = dict(self.template.named_parameters())
            pieces = self.maker(self.code).split([p.numel() for p in named.values()])
            made = {n: v.view_as(p) for (n, p), v in zip(named.items(), pieces, strict=True)}
            return torch.func.functional_call(self.template, made, (x,))

    return classifier(Hyper())


@configuration("generative/normalising-flow")
def flow() -> Setting:
    class Coupling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(2)
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            volume = torch.zeros(len(x), dtype=x.dtype)
            for layer in self.layers:
                kept, moved = x.chunk(2, 1)
                scale, shift = layer(kept).chunk(2, 1)
                scale = torch.tanh(scale)
                x = torch.cat([moved * scale.exp() + shift, kept], 1)
                volume = volume + scale.sum(1)
            return x, volume

    def loss(model: nn.Module, batch: Any) -> Tensor:
        z, volume = model(batch[0])
        normal = torch.distributions.Normal(0.0, 1.0)
        return -(normal.log_prob(z).sum(1) + volume).mean()

    return Setting(Coupling(), loss, [(torch.randn(9, 6),), (torch.randn(4, 6),)], [9.0, 4.0])


@configuration("generative/variational-autoencoder-fixed-noise")
def vae() -> Setting:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
            self.decoder = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 8))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, noise = batch
        mean, log_variance = model.encoder(x).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * noise
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
        logits = model.decoder(z)
        fit = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        return (fit + divergence).mean()

    batches = [(torch.rand(n, 8), torch.randn(n, 3)) for n in (9, 4)]
    return Setting(Autoencoder(), loss, batches, [9.0, 4.0])


@configuration("generative/gaussian-mixture-density")
def mixture_density() -> Setting:
    model = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 9))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        logits, mean, log_scale = model(x).chunk(3, 1)
        normal = torch.distributions.Normal(mean, log_scale.exp())
        return -(logits.log_softmax(1) + normal.log_prob(y)).logsumexp(1).mean()

    batches = [(torch.randn(n, 2), torch.randn(n, 1)) for n in (9, 4)]
    return Setting(model, loss, batches, [9.0, 4.0])


@configuration("generative/vector-quantised-autoencoder")
def vector_quantised() -> Setting:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, 3)
            self.codes = nn.Embedding(5, 3)
            self.decoder = nn.Linear(3, 8)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        z = torch.tanh(model.encoder(batch[0]))
        nearest = torch.cdist(z.detach(), model.codes.weight.detach()).argmin(1)
        code = model.codes(nearest)
        return (model.decoder(code) - batch[0]).square().mean() + (code - z).square().mean()

    return Setting(Quantised(), loss, [(torch.randn(9, 8),), (torch.randn(4, 8),)], [9.0, 4.0])


@configuration("other/kolmogorov-arnold-splines")
def splines() -> Setting:
    class Splines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5, 8) / 4)
            self.head = nn.Linear(8, CLASSES)
            self.register_buffer("centres", torch.linspace(-2, 2, 5))

        def forward(self, x: Tensor) -> Tensor:
            basis = torch.exp(-(x[..., None] - self.centres).square())
            return self.head(torch.einsum("nic,ich->nh", basis, self.weight))

    return classifier(Splines())


@configuration("other/sinusoidal-representation")
def siren() -> Setting:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(3 * x)

    model = nn.Sequential(nn.Linear(2, 16), Sine(), nn.Linear(16, 16), Sine(), nn.Linear(16, 1))
    batches = [(torch.rand(n, 2), torch.randn(n, 1)) for n in (9, 4)]
    return Setting(model, squared_error, batches, [9.0, 4.0])


@configuration("other/state-space-scan")
def state_space() -> Setting:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_decay = nn.Parameter(torch.randn(8))
            self.inside = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            decay = torch.exp(-nn.functional.softplus(self.log_decay))
            state = torch.zeros_like(x[:, 0])
            states = []
            for step in self.inside(x).unbind(1):
                state = decay * state + step
                states.append(state)
            return torch.tanh(torch.stack(states, 1))

    return sequence(Scan())


@configuration("other/in-place-operations")
def in_place() -> Setting:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(nn.ReLU(inplace=True))
            self.shift = nn.Parameter(torch.randn(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            out = self.layers(x)
            out.add_(self.shift)
            out[:, 0].mul_(self.shift[1])
            return out

    return classifier(InPlace())


@configuration("other/sorting-and-top-k")
def sorting() -> Setting:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 12)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.head(h.sort(1).values.topk(4, 1).values)

    return classifier(Sorted())


@configuration("other/low-rank-by-svd")
def decomposed() -> Setting:
    class Decomposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))
            self.head = nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            u, s, vh = torch.linalg.svd(self.weight, full_matrices=False)
            return self.head(x @ (u * torch.tanh(s)) @ vh)

    return classifier(Decomposed())


@configuration("other/orthogonal-by-matrix-exponential")
def orthogonal() -> Setting:
    layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
    return classifier(nn.Sequential(layer, nn.Tanh(), nn.Linear(6, CLASSES)))


@configuration("other/relative-scale-of-attention-logits")
def learned_temperature() -> Setting:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)
            self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))

        def forward(self, x: Tensor) -> Tensor:
            q = nn.functional.normalize(self.q(x), dim=-1)
            k = nn.functional.normalize(self.k(x), dim=-1)
            return (self.log_scale.exp() * q @ k.mT).softmax(-1) @ x

    return sequence(Temperature())
