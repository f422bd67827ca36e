"""What training recipes do to a model: adapters, checkpointing, compilation, reparametrisation."""

import copy
import dataclasses
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from family_models.setting import (
    Setting,
    configuration,
    cross_entropy,
    images,
    lengths,
    own_loss,
    tokens,
    vectors,
)
from family_models.shared_networks import classifier, mlp
from family_models.transformers_text import (
    CAUSAL,
    built,
    eager_experts,
    labelled,
    text_batches,
)

CLASSES = 3


class Adapted(nn.Module):
    """A frozen linear layer and a trainable product of two thin ones (LoRA)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, rank) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class AdaptedLanguageModel(nn.Module):
    """Frozen embedding, adapted layers; checkpointed as recipes do it where asked for."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embedding = nn.Embedding(20, 8).requires_grad_(False)
        self.first, self.second = Adapted(8, 12), Adapted(12, 20)

    def inner(self, h: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(h)))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        if self.reentrant is None:
            return self.inner(h)
        return checkpoint(self.inner, h.requires_grad_(), use_reentrant=self.reentrant)


@configuration("adapters/own-lora")
def own_lora() -> Setting:
    return classifier(AdaptedLanguageModel(None), tokens())


@configuration("adapters/own-lora-checkpointed")
def own_lora_checkpointed() -> Setting:
    return classifier(AdaptedLanguageModel(False), tokens())


@configuration("adapters/own-lora-checkpointed-reentrant")
def own_lora_reentrant() -> Setting:
    return _refused(classifier(AdaptedLanguageModel(True), tokens()), "checkpoint")


def _peft() -> ModuleType:
    from hessian_tools.problem.vision import repair

    repair()  # peft imports transformers, which looks for torchvision
    return importlib.import_module("peft")


def _lora(use_dora: bool = False) -> nn.Module:
    peft = _peft()

    model = built(*CAUSAL["llama"])
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).eval()


@configuration("adapters/peft-lora")
def peft_lora() -> Setting:
    return _language(_lora())


@configuration("adapters/peft-dora")
def peft_dora() -> Setting:
    """It detaches a norm, so its gradient is not that of the loss."""
    return _refused(_language(_lora(use_dora=True)), "gradient")


@configuration("adapters/peft-lora-checkpointed")
def peft_checkpointed() -> Setting:
    model = _lora().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return _with(_language(model), redirected=False)


@configuration("adapters/peft-lora-checkpointed-reentrant")
def peft_reentrant() -> Setting:
    model = _lora().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return _with(_language(model), refusal="checkpoint", redirected=False)


@configuration("adapters/peft-prompt-tuning")
def prompt_tuning() -> Setting:
    peft = _peft()

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(built(*CAUSAL["gpt2"]), config).eval()
    return _language(model, shifted=False)  # the prompt predicts the first label


@configuration("adapters/peft-ia3")
def ia3() -> Setting:
    peft = _peft()

    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    return _language(peft.get_peft_model(built(*CAUSAL["llama"]), config).eval())


@configuration("checkpointed/hf-gpt2")
def gpt2_checkpointed() -> Setting:
    return _checkpointed("gpt2", False)


@configuration("checkpointed/hf-gpt2-reentrant")
def gpt2_reentrant() -> Setting:
    return _refused(_checkpointed("gpt2", True), "checkpoint")


@configuration("checkpointed/hf-llama")
def llama_checkpointed() -> Setting:
    return _checkpointed("llama", False)


@configuration("checkpointed/hf-mixtral")
def mixtral_checkpointed() -> Setting:
    return _checkpointed("mixtral", False)


class Checkpointed(nn.Module):
    """Its inner layers in a checkpoint."""

    def __init__(self, inner: nn.Module, head: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.head = head
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@configuration("checkpointed/linear")
def checkpointed_linear() -> Setting:
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return classifier(Checkpointed(inner, nn.Linear(8, CLASSES)))


@configuration("checkpointed/linear-reentrant-cut-off")
def checkpointed_reentrant() -> Setting:
    """Data need no gradient, so a reentrant checkpoint cuts its own layers off in training.

    The Hessian of the loss, which is what the package promises, has them all the same.
    """
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    setting = classifier(Checkpointed(inner, nn.Linear(8, CLASSES), reentrant=True))

    def plain(model: nn.Module) -> nn.Module:
        twin = copy.deepcopy(model)
        twin.reentrant = False
        return twin

    return _with(setting, refusal="checkpoint", plain=plain)


@configuration("checkpointed/batch-norm-batch-statistics")
def checkpointed_norm() -> Setting:
    inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
    return classifier(Checkpointed(inner, nn.Linear(8, CLASSES)), batch_stats=True)


@configuration("checkpointed/batch-norm-running-statistics")
def checkpointed_running() -> Setting:
    inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
    return classifier(Checkpointed(inner, nn.Linear(8, CLASSES)), batch_stats=False)


@configuration("checkpointed/fused-attention")
def checkpointed_attention() -> Setting:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return attention(q, k, v)[:, 0]

    batches = [(torch.randn(n, 5, 4), torch.randint(CLASSES, (n, 5))) for n in (4, 2)]
    return classifier(Checkpointed(Heads(), nn.Linear(8, CLASSES)), batches)


@configuration("checkpointed/lstm")
def checkpointed_lstm() -> Setting:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    batches = [(torch.randn(n, 5, 4), torch.randint(CLASSES, (n, 5))) for n in (4, 2)]
    return classifier(Checkpointed(Recurrent(), nn.Linear(8, CLASSES)), batches)


@configuration("compiled/mlp-aot-eager")
def compiled_mlp() -> Setting:
    return _compiled(classifier(mlp(nn.Tanh())), "aot_eager")


@configuration("compiled/mlp-eager")
def compiled_eager() -> Setting:
    return _compiled(classifier(mlp(nn.Tanh())), "eager")


@configuration("compiled/in-place-method")
def compiled_in_place() -> Setting:
    """``model.compile()`` keeps the module, and compiles its call."""
    setting = classifier(mlp(nn.Tanh()))
    setting.model.compile(backend="aot_eager")
    return setting  # deepcopy leaves the compiled call behind


@configuration("compiled/convolutional-batch-norm")
def compiled_convolution() -> Setting:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    setting = classifier(model, images((4, 3), 8), batch_stats=True)
    return _compiled(setting, "aot_eager")


@configuration("compiled/hf-gpt2")
def compiled_gpt2() -> Setting:
    return _compiled(_language(built(*CAUSAL["gpt2"])), "aot_eager")


@configuration("compiled/loss-function")
def compiled_loss() -> Setting:
    setting = classifier(mlp(nn.Tanh()))
    given = torch.compile(cross_entropy, backend="aot_eager")
    return dataclasses.replace(setting, given=given)


@configuration("scripted/torchscript-trace")
def traced() -> Setting:
    original = mlp(nn.Tanh())
    setting = classifier(torch.jit.trace(original, vectors()[0][0]))

    # a copy of the trace has no leaves to differentiate; the original shares its parameters
    def plain(model: nn.Module) -> nn.Module:
        return copy.deepcopy(original)

    return _with(setting, plain=plain)


@configuration("reparametrised/weight-norm")
def weight_norm() -> Setting:
    layer = parametrizations.weight_norm(nn.Linear(6, 8))
    return classifier(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES)))


@configuration("reparametrised/weight-norm-convolution")
def weight_norm_convolution() -> Setting:
    layer = parametrizations.weight_norm(nn.Conv2d(3, 6, 3), dim=1)
    model = nn.Sequential(
        layer, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    return classifier(model, images((4, 2), 6))


@configuration("reparametrised/weight-norm-old-hook")
def weight_norm_hook() -> Setting:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        layer = torch.nn.utils.weight_norm(nn.Linear(6, 8))
        setting = classifier(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES)))
    with torch.no_grad():  # the hook's weight carries a graph, which deepcopy refuses
        layer.weight = layer.weight.detach()
    return setting


@configuration("reparametrised/spectral-norm")
def spectral_norm() -> Setting:
    layer = parametrizations.spectral_norm(nn.Linear(6, 8))
    return classifier(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES)).eval())


@configuration("reparametrised/spectral-norm-in-training-mode")
def spectral_norm_training() -> Setting:
    """A power iteration each call: no function of the weights alone."""
    layer = parametrizations.spectral_norm(nn.Linear(6, 8), n_power_iterations=1)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES))
    return _refused(classifier(model), "gradient")


@configuration("reparametrised/own-symmetric")
def symmetric() -> Setting:
    class Symmetric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu() + x.triu(1).mT

    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return classifier(nn.Sequential(layer, nn.Tanh(), nn.Linear(6, CLASSES)))


@configuration("pruned/unstructured")
def pruned() -> Setting:
    model = mlp(nn.Tanh())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with torch.no_grad():  # the masked weight carries a graph, which deepcopy refuses
        model[0].weight = model[0].weight.detach()
    return classifier(model)


@configuration("pruned/made-permanent")
def pruned_permanent() -> Setting:
    model = mlp(nn.Tanh())
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.remove(model[0], "weight")
    return classifier(model)


@configuration("frozen/last-layer-only")
def last_layer() -> Setting:
    model = mlp(nn.Tanh())
    model[0].requires_grad_(False)
    return classifier(model)


@configuration("frozen/biases-only")
def biases_only() -> Setting:
    model = mlp(nn.Tanh())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    return classifier(model)


class Mixed(nn.Module):
    """Its layers run in bfloat16, the output comes back in the input's precision."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x).to(x.dtype if x.is_floating_point() else torch.float32)


@configuration("autocast/inside-the-model")
def autocast_inside() -> Setting:
    return _with(classifier(Mixed(mlp(nn.Tanh()))), accuracy="bfloat16")


@configuration("autocast/inside-a-convolutional-model")
def autocast_convolution() -> Setting:
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    return _with(classifier(Mixed(body), images((4, 2), 8)), accuracy="bfloat16")


@configuration("autocast/in-the-loss")
def autocast_loss() -> Setting:
    def given(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(model, batch)

    return _with(classifier(mlp(nn.Tanh())), given=given, accuracy="bfloat16")


@configuration("autocast/bfloat16-parameters")
def bfloat16() -> Setting:
    batches = [(x.bfloat16(), y) for x, y in vectors()]
    model = mlp(nn.Tanh()).bfloat16()
    return Setting(model, cross_entropy, batches, lengths(batches), accuracy="bfloat16")


@configuration("autocast/float16-parameters")
def float16() -> Setting:
    batches = [(x.half(), y) for x, y in vectors()]
    model = mlp(nn.Tanh()).half()
    return Setting(model, cross_entropy, batches, lengths(batches), refusal="float16")


@configuration("random/dropout-active")
def dropout() -> Setting:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    return _refused(classifier(model.train()), "dropout")


@configuration("random/dropout-in-evaluation")
def dropout_off() -> Setting:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, CLASSES))
    return classifier(model.eval())


@configuration("custom/autograd-function-twice-differentiable")
def custom_function() -> Setting:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return upstream * 3 * x * x

    return classifier(_with_function(Cube))


@configuration("custom/autograd-function-once-differentiable")
def once_function() -> Setting:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return upstream * 3 * x * x

    return _refused(classifier(_with_function(Cube)), "Cube")


@configuration("custom/gradient-scaled-in-backward")
def reversed_gradient() -> Setting:
    """Gradient reversal (domain adaptation): the gradient is not that of the loss."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            return -upstream

    return _refused(classifier(_with_function(Reversed)), "gradient")


@configuration("custom/backward-hook-on-a-module")
def hooked() -> Setting:
    model = mlp(nn.Tanh())
    model[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    return classifier(model)


@configuration("custom/data-parallel-wrapper")
def wrapped() -> Setting:
    return classifier(nn.DataParallel(mlp(nn.Tanh())))


def _with_function(function: Any) -> nn.Module:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(function.apply(self.first(x))))

    return Between()


def _language(model: nn.Module, shifted: bool = True) -> Setting:
    import hessian_tools as ht

    batches = text_batches()
    counts = [labelled(batch["labels"], shifted) for batch in batches]
    return Setting(model, own_loss, batches, counts, given=ht.huggingface, prepare=eager_experts)


def _checkpointed(name: str, reentrant: bool) -> Setting:
    model = built(*CAUSAL[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    # what is computed again in the backward pass is beyond the reach of a mode for functions
    return _with(_language(model), redirected=False)


def _compiled(setting: Setting, backend: str) -> Setting:
    """The package is given the compiled module, the referee what it was compiled from."""
    compiled = torch.compile(setting.model, backend=backend)
    return _with(setting, model=compiled, plain=lambda model: copy.deepcopy(model._orig_mod))


def _refused(setting: Setting, word: str) -> Setting:
    return _with(setting, refusal=word)


def _with(setting: Setting, **changes: Any) -> Setting:
    return dataclasses.replace(setting, **changes)
