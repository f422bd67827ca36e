"""Tiny models of the architectures that partitions must be right for: random weights, nothing
downloaded."""

import torch
from torch import nn

from hessian_tools.problem.vision import torchvision
from problems import transformers

D, HEADS, KV, F, V = 32, 4, 2, 48, 64  # width, heads, key/value heads, MLP width, vocabulary
SIZES = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "intermediate_size": F,
}
VOCABULARY = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
UNTIED = {"tie_word_embeddings": False}


def hf(model: str, **config: object) -> nn.Module:
    family = model.split("For")[0].removesuffix("LMHeadModel")
    return getattr(transformers(), model)(getattr(transformers(), f"{family}Config")(**config))


def gpt2() -> nn.Module:
    return hf(
        "GPT2LMHeadModel",
        n_embd=D,
        n_layer=2,
        n_head=HEADS,
        n_positions=16,
        n_inner=F,
        **VOCABULARY,
    )


def bert() -> nn.Module:
    return hf("BertForMaskedLM", **SIZES, **VOCABULARY)


def bert_classifier() -> nn.Module:
    return hf("BertForSequenceClassification", **SIZES, **VOCABULARY, num_labels=2)


def vit() -> nn.Module:
    return hf("ViTForImageClassification", **SIZES, image_size=8, patch_size=4, num_labels=5)


def llama() -> nn.Module:
    return hf("LlamaForCausalLM", **SIZES, **VOCABULARY, **UNTIED, num_key_value_heads=HEADS)


def qwen3() -> nn.Module:
    return hf(
        "Qwen3ForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=KV, head_dim=16, **UNTIED
    )


def gemma() -> nn.Module:
    return hf("GemmaForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=1, head_dim=12)


def phi3() -> nn.Module:
    return hf("Phi3ForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=KV, **UNTIED)


def neox() -> nn.Module:
    return hf("GPTNeoXForCausalLM", **SIZES, **VOCABULARY, **UNTIED)


def mixtral() -> nn.Module:
    return hf(
        "MixtralForCausalLM",
        **SIZES,
        **VOCABULARY,
        **UNTIED,
        num_key_value_heads=KV,
        num_local_experts=3,
    )


def gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf(
        "GptOssForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=KV, head_dim=8, **experts
    )


def t5() -> nn.Module:
    sizes = {"d_model": D, "d_kv": 12, "d_ff": F, "num_layers": 2, "num_heads": HEADS}
    return hf("T5ForConditionalGeneration", **sizes, vocab_size=V, decoder_start_token_id=0)


def mamba() -> nn.Module:
    return hf(
        "MambaForCausalLM",
        **VOCABULARY,
        hidden_size=D,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=3,
    )


def resnet() -> nn.Module:
    models = torchvision().models.resnet
    return models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=5)


def convnext() -> nn.Module:
    models = torchvision().models.convnext
    return models.ConvNeXt(
        [models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)], num_classes=5
    )


def swin() -> nn.Module:
    models = torchvision().models.swin_transformer
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, HEADS], [4, 4], num_classes=5)


ARCHITECTURES = {
    build.__name__: build
    for build in (
        gpt2, bert, bert_classifier, vit, llama, qwen3, gemma, phi3, neox, mixtral, gpt_oss, t5, mamba, resnet,
        convnext, swin,
    )
}  # fmt: skip


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward."""
    ids = torch.arange(10).view(2, 5)
    if name in ("resnet", "convnext", "swin", "vit"):
        side = 8 if name == "vit" else 32
        image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        return {"pixel_values" if name == "vit" else {"resnet": "x"}.get(name, ""): image}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
