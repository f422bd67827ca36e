"""The oracles: networks with a dense float64 Hessian, and losses whose Hessian is known."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.problem.vision import repair


def dense_hessian(problem: ht.Problem) -> Tensor:
    """(P, P) by plain double backward over the pooled loss, a row at a time.

    Shares no code with the engine.
    """
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    total = sum(problem.counts)

    def flat(pieces: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(parameters, pieces, strict=True)
        return torch.cat(
            [(torch.zeros_like(p) if piece is None else piece).flatten() for p, piece in pairs]
        )

    with problem.evaluating():
        pairs = zip(problem.batches, problem.counts, strict=True)
        loss = sum(problem.loss_fn(problem.model, batch) * (n / total) for batch, n in pairs)
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    return torch.stack(
        [
            flat(torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True))
            if entry.requires_grad
            else torch.zeros_like(gradient)
            for entry in gradient
        ]
    )


class LayerNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class ConvNet(nn.Module):
    def __init__(self, norm: type[nn.Module] | None = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = (
            nn.GroupNorm(3, 3) if norm is nn.GroupNorm else norm(3) if norm else nn.Identity()
        )
        self.last = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.norm(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class SilentlyWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):  # the derivative's own dependence on x is hidden from autograd
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class Cubed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2, dtype=torch.float64), function

    def forward(self, x):
        return self.function.apply(self.linear(x))


def _vectors(sizes: tuple[int, ...], features: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, features), torch.randint(classes, (n,))) for n in sizes]


def _tokens(sizes: tuple[int, ...], context: int, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    batches = []
    for n in sizes:
        tokens = torch.randint(vocabulary, (n, context + 1))
        targets = tokens[:, 1:].clone()
        targets[0, :3] = -100  # uneven: the mean is over the tokens that are left
        batches.append((tokens[:, :-1], targets))
    return batches


def gpt(
    vocabulary: int = 11, context: int = 6, d: int = 8, layers: int = 1, tied: bool = True
) -> nn.Module:
    return NanoGPT(vocabulary, context, layers=layers, d=d, num_heads=2, tied=tied)


def transformers() -> ModuleType:
    repair()  # beside a CPU-only torch, the registry's torchvision breaks transformers
    return importlib.import_module("transformers")


def hf_gpt2(attention: str = "sdpa") -> nn.Module:
    hf = transformers()
    config = hf.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel._from_config(config, attn_implementation=attention).eval()


def hf_bert() -> nn.Module:
    hf = transformers()
    config = hf.BertConfig(vocab_size=11, max_position_embeddings=8, pad_token_id=None, **HF_TINY)
    return hf.BertForMaskedLM(config).eval()


def hf_vit() -> nn.Module:
    hf = transformers()
    return hf.ViTForImageClassification(
        hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **HF_TINY)
    ).eval()


def hf_llama() -> nn.Module:
    hf = transformers()
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=11, max_position_embeddings=8, num_key_value_heads=1, **HF_TINY)
    ).eval()


HF_TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def _images(sizes: tuple[int, ...], side: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 1, side, side), torch.randint(4, (n,))) for n in sizes]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


# name -> (model, batches, Problem's keywords, error that float64 reaches: some models of
# transformers cast to float32 inside)
NETWORKS = {
    "mlp": (_mlp, lambda: _vectors((4, 7), 5, 3), {}, 1e-10),
    "layernorm": (LayerNormNet, lambda: _vectors((4, 7), 5, 3), {}, 1e-10),
    "batchnorm-batch": (ConvNet, lambda: _images((5, 3), 5), {"batch_stats": True}, 1e-10),
    "batchnorm-running": (ConvNet, lambda: _images((5, 3), 5), {"batch_stats": False}, 1e-10),
    "groupnorm": (lambda: ConvNet(nn.GroupNorm), lambda: _images((4,), 5), {}, 1e-10),
    "lstm": (Recurrent, lambda: [(torch.randn(3, 4, 3), torch.randint(2, (3,)))], {}, 1e-10),
    "gpt": (gpt, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-gpt2": (hf_gpt2, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-gpt2-eager": (lambda: hf_gpt2("eager"), lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-bert": (hf_bert, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-vit": (hf_vit, lambda: _images((3,), 8), {}, 1e-10),
    "hf-llama-gqa": (hf_llama, lambda: _tokens((2, 1), 6, 11), {}, 1e-5),
}


def network(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> ht.Problem:
    """The Problem of one of NETWORKS, the same at every call."""
    build, data, keywords, _ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = build().to(device, dtype), data()
    batches = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batches]
    return ht.Problem(model, ht.cross_entropy, batches, **keywords)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dense_gauss_newton(problem: ht.Problem) -> Tensor:
    """(P, P) J' H_z J, J by a backward pass for each output, H_z by torch's own of the loss alone.

    Shares no code with the engine.
    """
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    total = torch.zeros(size, size, dtype=torch.float64)
    for batch, weight in zip(problem.batches, problem.weights, strict=True):
        with problem.evaluating():
            outputs = problem.loss_fn.outputs(problem.model, batch)
            jacobian = torch.stack(
                [_flat_gradient(entry, parameters) for entry in outputs.flatten()]
            )

        def loss(flat: Tensor, batch: object = batch, shape: torch.Size = outputs.shape) -> Tensor:
            return problem.loss_fn.loss(flat.view(shape), batch)

        between = torch.autograd.functional.hessian(loss, outputs.detach().flatten())
        total += weight * jacobian.T @ between @ jacobian
    return total


def _flat_gradient(entry: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    pieces = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, pieces, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
    )
