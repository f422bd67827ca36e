"""The oracles: networks small enough for a dense float64 Hessian, and losses whose Hessian is known in closed form."""

import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.networks import NanoGPT
from hessian_tools.vision import repair


def dense_hessian(problem: ht.Problem) -> Tensor:
    """(P, P) by plain double backward, a row at a time, over the pooled loss: shares no code with the engine."""
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    total = sum(problem.counts)
    with problem.evaluating():
        losses = [problem.loss_fn(problem.model, batch) * (n / total) for batch, n in zip(problem.batches, problem.counts)]
        gradients = torch.autograd.grad(sum(losses), parameters, create_graph=True, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])
    rows = []
    for entry in flat:
        if not entry.requires_grad:
            rows.append(torch.zeros(len(flat), dtype=flat.dtype))
            continue
        row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for p, r in zip(parameters, row)]))
    return torch.stack(rows)


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
        self.norm = nn.GroupNorm(3, 3) if norm is nn.GroupNorm else norm(3) if norm else nn.Identity()
        self.last = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.norm(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


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


def gpt(vocabulary: int = 11, context: int = 6, d: int = 8, layers: int = 2, tied: bool = True) -> nn.Module:
    return NanoGPT(vocabulary, context, layers=layers, d=d, num_heads=2, tied=tied)


def transformers() -> ModuleType:
    repair()  # beside a CPU-only torch, the registry's torchvision breaks transformers
    return importlib.import_module("transformers")


def hf_gpt2() -> nn.Module:
    hf = transformers()
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, use_cache=False, **_dropout("pdrop"))
    )


def hf_bert() -> nn.Module:
    hf = transformers()
    return hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                   max_position_embeddings=8, pad_token_id=None)
    ).eval()  # fmt: skip


def hf_vit() -> nn.Module:
    hf = transformers()
    return hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
                  num_channels=1, num_labels=4)
    ).eval()  # fmt: skip


def hf_llama() -> nn.Module:
    hf = transformers()
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=12, max_position_embeddings=8, use_cache=False)
    ).eval()  # fmt: skip


def _dropout(kind: str) -> dict[str, float]:
    return {f"attn_{kind}": 0.0, f"resid_{kind}": 0.0, f"embd_{kind}": 0.0}


# name -> (model builder, batches builder, Problem's keywords, what float64 reaches: transformers casts to float32 inside some)
NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), lambda: _vectors((4, 7), 5, 3), {}, 1e-10),
    "layernorm": (LayerNormNet, lambda: _vectors((4, 7), 5, 3), {}, 1e-10),
    "batchnorm-batch": (ConvNet, lambda: [(torch.randn(n, 1, 5, 5), torch.randint(4, (n,))) for n in (5, 3)],
                        {"batch_stats": True}, 1e-10),
    "batchnorm-running": (ConvNet, lambda: [(torch.randn(n, 1, 5, 5), torch.randint(4, (n,))) for n in (5, 3)],
                          {"batch_stats": False}, 1e-10),
    "groupnorm": (lambda: ConvNet(nn.GroupNorm), lambda: [(torch.randn(4, 1, 5, 5), torch.randint(4, (4,)))], {}, 1e-10),
    "lstm": (Recurrent, lambda: [(torch.randn(3, 4, 3), torch.randint(2, (3,)))], {}, 1e-10),
    "gpt": (gpt, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-gpt2": (hf_gpt2, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-bert": (hf_bert, lambda: _tokens((2, 1), 6, 11), {}, 1e-10),
    "hf-vit": (hf_vit, lambda: [(torch.randn(3, 1, 8, 8), torch.randint(4, (3,)))], {}, 1e-10),
    "hf-llama-gqa": (hf_llama, lambda: _tokens((2, 1), 6, 11), {}, 1e-5),
}  # fmt: skip


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
