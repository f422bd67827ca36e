"""Own networks: layers in a row, activations, norms, parameters of every kind."""

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, cross_entropy, lengths, tokens, vectors
from family_models.shared_networks import CLASSES, classifier, mlp


@configuration("mlp/relu")
def mlp_relu() -> Setting:
    return classifier(mlp(nn.ReLU()))


@configuration("mlp/smooth")
def mlp_smooth() -> Setting:
    return classifier(mlp(nn.Tanh()))


@configuration("mlp/many-activations")
def activations() -> Setting:
    kinds = (
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.Softplus(),
        nn.ELU(),
        nn.SELU(),
        nn.CELU(),
        nn.LogSigmoid(),
        nn.Softsign(),
        nn.Tanhshrink(),
    )
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind)]
    return classifier(nn.Sequential(*layers, nn.Linear(6, CLASSES)))


@configuration("mlp/kinked-activations")
def kinked() -> Setting:
    kinds = (
        nn.LeakyReLU(0.1),
        nn.PReLU(6),
        nn.ReLU6(),
        nn.Hardtanh(-2, 2),
        nn.Hardswish(),
        nn.Softshrink(0.1),
        nn.Hardsigmoid(),
        nn.Hardshrink(0.05),
    )
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind)]
    return classifier(nn.Sequential(*layers, nn.Linear(6, CLASSES)))


@configuration("mlp/gated-units")
def gated() -> Setting:
    return classifier(nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, CLASSES)))


@configuration("mlp/norms")
def norms() -> Setting:
    layers = (
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.RMSNorm(8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Linear(8, CLASSES),
    )
    return classifier(nn.Sequential(nn.Linear(6, 8), *layers))


@configuration("mlp/batch-norm-batch-statistics")
def batch_norm() -> Setting:
    return classifier(_normed(), batch_stats=True)


@configuration("mlp/batch-norm-running-statistics")
def batch_norm_running() -> Setting:
    return classifier(_normed(), batch_stats=False)


@configuration("mlp/batch-norm-in-training-mode-running-statistics")
def batch_norm_training() -> Setting:
    return classifier(_normed().train(), batch_stats=False)


def _normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    model(torch.randn(20, 6) * 2 + 1)  # running statistics that differ from those of the data
    return model.eval()


@configuration("mlp/ensemble-by-vmap")
def ensemble() -> Setting:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 6, 8) / 2)
            self.second = nn.Parameter(torch.randn(4, 8, CLASSES) / 2)

        def forward(self, x: Tensor) -> Tensor:
            def member(first: Tensor, second: Tensor) -> Tensor:
                return torch.tanh(x @ first) @ second

            return torch.vmap(member)(self.first, self.second).mean(0)

    return classifier(Ensemble())


@configuration("mlp/scalar-parameter")
def scalar() -> Setting:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.5))
            self.layers = mlp(nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.log_scale.exp() * self.layers(x)

    return classifier(Scaled())


@configuration("mlp/empty-parameter")
def empty() -> Setting:
    model = mlp(nn.Tanh())
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 4)))
    return classifier(model)


@configuration("mlp/unused-parameter")
def unused() -> Setting:
    model = mlp(nn.Tanh())
    model.register_parameter("unused", nn.Parameter(torch.randn(5)))
    return classifier(model)


@configuration("mlp/tied-weights")
def tied() -> Setting:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.middle = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.middle(self.embedding(ids))))

    return classifier(Tied(), tokens())


@configuration("mlp/float64")
def double() -> Setting:
    batches = [(x.double(), y) for x, y in vectors()]
    setting = classifier(mlp(nn.Tanh()).double(), batches)
    return Setting(setting.model, setting.loss, batches, setting.counts, accuracy="float64")


@configuration("mlp/complex-parameters")
def complex_parameters() -> Setting:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.to(self.w.dtype) @ self.w).abs().square().tanh())

    batches = vectors()
    return Setting(Complex(), cross_entropy, batches, lengths(batches), refusal="complex")


@configuration("mlp/fourier-transform-inside")
def fourier() -> Setting:
    """Real parameters, complex numbers on the way: a Fourier neural operator's layer."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real = nn.Parameter(torch.randn(5) / 2)
            self.imaginary = nn.Parameter(torch.randn(5) / 2)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            modes = torch.fft.rfft(x) * torch.complex(self.real, self.imaginary)
            return self.head(torch.tanh(torch.fft.irfft(modes, n=8)))

    return classifier(Spectral(), vectors(features=8))


@configuration("mlp/quantised-dynamically")
def quantised() -> Setting:
    model = torch.ao.quantization.quantize_dynamic(mlp(nn.Tanh()), {nn.Linear})
    batches = vectors()
    return Setting(model, cross_entropy, batches, lengths(batches), refusal="no parameter")


@configuration("mlp/hard-quantised-straight-through")
def straight_through() -> Setting:
    """Rounded weights whose gradient is passed on: not the gradient of the loss, but symmetric."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight
            passed = weight + ((4 * weight).round() / 4 - weight).detach()
            return self.head(torch.tanh(nn.functional.linear(x, passed, self.layer.bias)))

    batches = vectors()
    return Setting(Rounded(), cross_entropy, batches, lengths(batches), refusal="gradient")
