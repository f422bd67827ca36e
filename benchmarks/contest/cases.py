"""What every contender computes with: networks, real data, and how much of each job. Knobs on top.

Everyone gets the same weights, batches, mean cross-entropy and weight matrices, whole tensors of
two or more dimensions (fused query/key/value tensors stay fused, as no peer can cut them). Models
are in eval mode: no dropout, BatchNorm by running statistics, which at initialisation are mean 0
and variance 1, so that every contender can run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.problem import data, networks, vision, zoo

SEED = 0
LAYERS, WIDTH, HEADS, TOKENIZER = 6, 256, 4, "byte"  # the GPT; "byte" has 257 tokens, "bpe" 8192
CONTEXT, SEQUENCES = 128, 4
GPT2_CONTEXT, GPT2_SEQUENCES = 16, 2
IMAGES, RESNET_IMAGES, IMAGE_SIZE = 64, 32, 32


@dataclass(frozen=True)
class Work:
    """How much of each job is done on one model: k probes and m Lanczos steps."""

    probes: int = 8  # of job a8
    density: tuple[int, int] = (4, 25)  # (k, m) of job c; 100 products are PyHessian's default
    blockwise: tuple[int, int] = (2, 6)  # (k, m) of job d
    sample: tuple[int, int] = (
        1,
        1,
    )  # what is run of d by contenders whose every product starts anew
    blocks: int | None = None  # weight matrices of jobs b and d, evenly spaced; None: all


@dataclass(frozen=True)
class Case:
    """One network ready for all contenders. ``work`` is None for cases that only test
    correctness.
    """

    name: str
    description: str
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    weights: tuple[str, ...]  # names of the weight matrices of jobs b and d
    num_matrices: int  # that the model has
    work: Work | None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def problem(self) -> ht.Problem:
        has_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        return ht.Problem(
            self.model, ht.cross_entropy, self.batches, batch_stats=False if has_norm else None
        )


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., C), or of a transformers output that has them, over
    targets (...).
    """
    return F.cross_entropy(getattr(outputs, "logits", outputs).flatten(0, -2), targets.flatten())


def _zoo(name: str, **knobs: int) -> tuple[nn.Module, list, str]:
    made = zoo.load(name, seed=SEED, **knobs)
    text = zoo.SPECS[name].description
    if made.batch_stats is not None:  # the zoo's own choice is the other one
        text = f"{text.rpartition(', ')[0]}, BatchNorm by running statistics"
    return (
        made.model,
        made.batches,
        f"{text}; {knobs['num_examples']} examples of {made.settings['data']}",
    )


def _gpt(layers: int, width: int, context: int, sequences: int) -> tuple[nn.Module, list, str]:
    vocabulary = data.TOKENIZERS[TOKENIZER].size
    torch.manual_seed(SEED)
    model = networks.NanoGPT(vocabulary, context, layers, width, HEADS, tied=False).eval()
    tokens = data.text_tokens(TOKENIZER)
    batches = data.language_batches(
        tokens, num_examples=sequences, batch_size=sequences, context=context, seed=SEED
    )
    text = f"GPT of {layers} layers, d={width}, {HEADS} heads, untied, vocabulary {vocabulary}"
    return (
        model,
        batches,
        f"{text}; {sequences} sequences of {context} {TOKENIZER} tokens of the plays",
    )


def _uneven() -> tuple[nn.Module, list, str]:
    model, batches, _ = _zoo("mlp", num_examples=33, batch_size=32)
    return model, batches, "the MLP on batches of 32 and 1 images"


def _ignored() -> tuple[nn.Module, list, str]:
    """No LayerNorm here, which would hide one fault behind another."""
    torch.manual_seed(SEED)
    vocabulary = data.TOKENIZERS["byte"].size
    model = nn.Sequential(
        nn.Embedding(vocabulary, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, vocabulary)
    )
    batches = data.language_batches(
        data.text_tokens("byte"), num_examples=4, batch_size=2, context=32, seed=SEED
    )
    for (_, targets), ignored in zip(batches, (28, 4), strict=True):
        targets[:, -ignored:] = -100
    return model.eval(), batches, "two batches of tokens, 28 and 4 of every 32 targets ignored"


Build = Callable[[], tuple[nn.Module, list, str]]
GPT2_TEXT = {"context": GPT2_CONTEXT, "num_examples": GPT2_SEQUENCES}
MODELS: dict[str, tuple[Build, Work]] = {
    "mlp": (
        partial(_zoo, "mlp", num_examples=IMAGES),
        Work(density=(4, 40), blockwise=(4, 40), sample=(4, 40)),
    ),
    "resnet18": (
        partial(_zoo, "resnet18", image_size=IMAGE_SIZE, num_examples=RESNET_IMAGES),
        Work(),
    ),
    "gpt": (partial(_gpt, LAYERS, WIDTH, CONTEXT, SEQUENCES), Work()),
    "gpt2": (
        partial(_zoo, "gpt2", **GPT2_TEXT),
        Work(probes=2, density=(1, 8), blockwise=(1, 3), blocks=4),
    ),
}
SPECIAL: dict[str, Build] = {"uneven": _uneven, "ignored": _ignored}
_TINY = Work(probes=2, density=(2, 3), blockwise=(2, 3), blocks=3)
SMOKE: dict[str, tuple[Build, Work]] = {
    "mlp": (partial(_zoo, "mlp", num_examples=4), _TINY),
    "resnet18": (partial(_zoo, "resnet-nano", image_size=16, num_examples=2), _TINY),
    "gpt": (partial(_gpt, 2, 32, 8, 2), _TINY),
    "gpt2": (partial(_zoo, "gpt2-nano", context=8, num_examples=1), _TINY),
}


def preload(names: list[str]) -> None:
    """Imports and reads what the named models need, so that a process that builds them finds it
    there.
    """
    vision.repair()
    if "resnet18" in names:
        vision.torchvision()
    if "gpt2" in names:
        from transformers import GPT2LMHeadModel  # noqa: F401

        data.text_tokens(zoo.SPECS["gpt2"].tokenizer)


def build(name: str, device: str, dtype: torch.dtype, smoke: bool) -> Case:
    """The named case, the same in every process."""
    make, work = (SPECIAL[name], None) if name in SPECIAL else (SMOKE if smoke else MODELS)[name]
    model, batches, description = make()
    model = model.to(device, dtype).requires_grad_()
    batches = [
        (x.to(device, dtype if x.is_floating_point() else None), y.to(device)) for x, y in batches
    ]
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    count = min(work.blocks or len(matrices), len(matrices)) if work else 3
    # evenly spaced, from the middle of each stretch: the first and last are no typical ones
    weights = [matrices[int((i + 0.5) * len(matrices) / count)] for i in range(count)]
    return Case(name, description, model, batches, tuple(weights), len(matrices), work)
