"""Language models of transformers, with attention kernels and experts as the library chooses them.

Each is a config class, a model class and a few sizes. Names of sizes differ between models; most
take those of LLaMA, and a config keeps what it does not know as attributes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, own_loss

VOCABULARY = 24
IGNORED = -100
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "use_cache": False,
    **TOKENS,
}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "embedding_size": 8,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "n_inner": 20,
    "use_cache": False,
    **TOKENS,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 1,
}
LATENT: dict[str, Any] = {  # DeepSeek's attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
FALCON = {key: size for key, size in LLAMA.items() if key != "head_dim"} | {"ffn_hidden_size": 20}
ONE: dict[str, Any] = {"num_hidden_layers": 1}

# name -> (prefix of the config's class, suffix of the model's, or its name, sizes)
# next-token prediction
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt-bigcode": ("GPTBigCode", "ForCausalLM", GPT2),
    "gpt-neo": (
        "GPTNeo",
        "ForCausalLM",
        {**LLAMA, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", LLAMA),
    "gpt-j": ("GPTJ", "ForCausalLM", {**GPT2, "rotary_dim": 4}),
    "codegen": ("CodeGen", "ForCausalLM", {**GPT2, "rotary_dim": 4}),
    "ctrl": ("CTRL", "LMHeadModel", {**GPT2, "dff": 20}),
    "openai-gpt": ("OpenAIGPT", "LMHeadModel", GPT2),
    "xglm": (
        "XGLM",
        "ForCausalLM",
        {**LLAMA, "d_model": 16, "ffn_dim": 20, "num_layers": 2, "attention_heads": 4},
    ),
    "biogpt": ("BioGpt", "ForCausalLM", LLAMA),
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "mistral-sliding-window": ("Mistral", "ForCausalLM", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2", "ForCausalLM", LLAMA),
    "qwen3": ("Qwen3", "ForCausalLM", LLAMA),
    "qwen3-next": (
        "Qwen3Next",
        "ForCausalLM",
        {
            **LLAMA,
            **EXPERTS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gemma": ("Gemma", "ForCausalLM", LLAMA),
    "gemma2-softcap": ("Gemma2", "ForCausalLM", {**LLAMA, "query_pre_attn_scalar": 4}),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", {**LLAMA, "query_pre_attn_scalar": 4}),
    "phi": ("Phi", "ForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}),
    "phi3-fused-projections": ("Phi3", "ForCausalLM", LLAMA),
    "falcon": ("Falcon", "ForCausalLM", FALCON),
    "falcon-alibi": ("Falcon", "ForCausalLM", {**FALCON, "alibi": True, "multi_query": False}),
    "bloom": ("Bloom", "ForCausalLM", {**LLAMA, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "Mpt",
        "ForCausalLM",
        {
            **LLAMA,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 16,
            "expansion_ratio": 1,
        },
    ),
    "opt-relu": ("OPT", "ForCausalLM", {**LLAMA, "ffn_dim": 20, "word_embed_proj_dim": 16}),
    "stablelm": ("StableLm", "ForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2", "ForCausalLM", LLAMA),
    "olmo": ("Olmo", "ForCausalLM", LLAMA),
    "olmo2": ("Olmo2", "ForCausalLM", LLAMA),
    "cohere": ("Cohere", "ForCausalLM", LLAMA),
    "granite": ("Granite", "ForCausalLM", LLAMA),
    "glm": ("Glm", "ForCausalLM", LLAMA),
    "nemotron-squared-relu": ("Nemotron", "ForCausalLM", LLAMA),
    "persimmon": ("Persimmon", "ForCausalLM", LLAMA),
    "smollm3": ("SmolLM3", "ForCausalLM", LLAMA),
    "diffllama": ("DiffLlama", "ForCausalLM", LLAMA),
    "mixtral": ("Mixtral", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "qwen2-moe": ("Qwen2Moe", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "qwen3-moe": ("Qwen3Moe", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "olmoe": ("Olmoe", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "granite-moe": ("GraniteMoe", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "phimoe": ("Phimoe", "ForCausalLM", {**LLAMA, **EXPERTS}),
    "gpt-oss-sinks": (
        "GptOss",
        "ForCausalLM",
        {**LLAMA, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "deepseek-v2-latent-attention": (
        "DeepseekV2",
        "ForCausalLM",
        {**LLAMA, **EXPERTS, **LATENT, "num_key_value_heads": 4},
    ),
    "deepseek-v3-latent-attention": (
        "DeepseekV3",
        "ForCausalLM",
        {**LLAMA, **EXPERTS, **LATENT, "num_key_value_heads": 4},
    ),
    "mamba": ("Mamba", "ForCausalLM", {**LLAMA, "state_size": 4, "time_step_rank": 2}),
    "falcon-mamba": ("FalconMamba", "ForCausalLM", {**LLAMA, "state_size": 4, "time_step_rank": 2}),
    "mamba2": (
        "Mamba2",
        "ForCausalLM",
        {
            **LLAMA,
            **ONE,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 4,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "jamba": (
        "Jamba",
        "ForCausalLM",
        {
            **LLAMA,
            **EXPERTS,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2",
        "ForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "attention_head_dim": 8,
            "mamba_d_state": 4,
            "mamba_headdim": 4,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 2,
            "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "hybrid"],
        },
    ),
    "bamba": (
        "Bamba",
        "ForCausalLM",
        {
            **LLAMA,
            "mamba_d_state": 4,
            "mamba_d_head": 4,
            "mamba_n_heads": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
            "attn_layer_indices": [1],
        },
    ),
    "rwkv": ("Rwkv", "ForCausalLM", {**LLAMA, "attention_hidden_size": 16, "context_length": 16}),
    "recurrent-gemma": (
        "RecurrentGemma",
        "ForCausalLM",
        {
            **LLAMA,
            "lru_width": 16,
            "attention_window_size": 4,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "lfm2-short-convolutions": (
        "Lfm2",
        "ForCausalLM",
        {**LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "glm4-moe": (
        "Glm4Moe",
        "ForCausalLM",
        {**LLAMA, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        "ForCausalLM",
        {**LLAMA, **EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    "jetmoe": ("JetMoe", "ForCausalLM", {**LLAMA, **EXPERTS, "kv_channels": 4}),
    "dbrx": (
        "Dbrx",
        "ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 16,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2},
            "use_cache": False,
        },
    ),
    "llama4-chunked-attention": (
        "Llama4Text",
        "Llama4ForCausalLM",
        {**LLAMA, **EXPERTS, "intermediate_size_mlp": 20, "attention_chunk_size": 4},
    ),
    "minimax-lightning-attention": (
        "MiniMax",
        "ForCausalLM",
        {
            **LLAMA,
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
    ),
    "apertus-xielu": ("Apertus", "ForCausalLM", LLAMA),
    "exaone4": ("Exaone4", "ForCausalLM", {**LLAMA, "sliding_window": 4}),
    "minicpm3-latent-attention": (
        "MiniCPM3",
        "ForCausalLM",
        {**LLAMA, **LATENT, "num_key_value_heads": 4},
    ),
    "nanochat": ("NanoChat", "ForCausalLM", LLAMA),
    "olmo-hybrid": (
        "OlmoHybrid",
        "ForCausalLM",
        {
            **LLAMA,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "nemotron-h": (
        "NemotronH",
        "ForCausalLM",
        {
            **LLAMA,
            "ssm_state_size": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "xlnet": ("XLNet", "LMHeadModel", {**GPT2, "d_model": 16, "d_inner": 20}),
}
# name -> the same; every label counts
MASKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForMaskedLM", BERT),
    "roberta": ("Roberta", "ForMaskedLM", {**BERT, "max_position_embeddings": 18}),
    "albert-shared-layers": ("Albert", "ForMaskedLM", BERT),
    "electra": ("Electra", "ForMaskedLM", BERT),
    "distilbert": (
        "DistilBert",
        "ForMaskedLM",
        {**BERT, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 4},
    ),
    "deberta": (
        "Deberta",
        "ForMaskedLM",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deberta-v2": (
        "DebertaV2",
        "ForMaskedLM",
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "mpnet": ("MPNet", "ForMaskedLM", BERT),
    "convbert": ("ConvBert", "ForMaskedLM", {**BERT, "conv_kernel_size": 3}),
    "squeezebert": (
        "SqueezeBert",
        "ForMaskedLM",
        {
            **BERT,
            "embedding_size": 16,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
    "modernbert": (
        "ModernBert",
        "ForMaskedLM",
        {**BERT, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "roformer": ("RoFormer", "ForMaskedLM", {**BERT, "embedding_size": 16}),
    "fnet-fourier": ("FNet", "ForMaskedLM", BERT),
    "nystromformer": (
        "Nystromformer",
        "ForMaskedLM",
        {**BERT, "segment_means_seq_len": 8, "num_landmarks": 4, "conv_kernel_size": 3},
    ),
    "funnel": (
        "Funnel",
        "ForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": 16,
            "n_head": 4,
            "d_head": 4,
            "d_inner": 20,
            "num_decoder_layers": 1,
        },
    ),
    "longformer": (
        "Longformer",
        "ForMaskedLM",
        {**BERT, "attention_window": 4, "max_position_embeddings": 18},
    ),
    "big-bird": (
        "BigBird",
        "ForMaskedLM",
        {**BERT, "attention_type": "original_full"},
    ),
    "perceiver": (
        "Perceiver",
        "ForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_latents": 8,
            "num_latents": 4,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "max_position_embeddings": 8,
            "qk_channels": 8,
            "v_channels": 8,
        },
    ),
    "ernie": ("Ernie", "ForMaskedLM", BERT),
    "eurobert": ("EuroBert", "ForMaskedLM", LLAMA),
    "megatron-bert": ("MegatronBert", "ForMaskedLM", BERT),
    "mobilebert": (
        "MobileBert",
        "ForMaskedLM",
        {**BERT, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    ),
    "nomic-bert": ("NomicBert", "ForMaskedLM", BERT),
    "xlm-roberta": ("XLMRoberta", "ForMaskedLM", {**BERT, "max_position_embeddings": 18}),
}
ENCODER_DECODER: dict[str, Any] = {
    **LLAMA,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
SEQUENCE_TO_SEQUENCE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5-relu": ("T5", "ForConditionalGeneration", ENCODER_DECODER),
    "t5-gated-gelu": (
        "T5",
        "ForConditionalGeneration",
        {**ENCODER_DECODER, "feed_forward_proj": "gated-gelu"},
    ),
    "bart": ("Bart", "ForConditionalGeneration", ENCODER_DECODER),
    "mbart": ("MBart", "ForConditionalGeneration", ENCODER_DECODER),
    "pegasus": ("Pegasus", "ForConditionalGeneration", ENCODER_DECODER),
    "marian": ("Marian", "MarianMTModel", ENCODER_DECODER),
    "switch-transformers-experts": (
        "SwitchTransformers",
        "ForConditionalGeneration",
        {
            **ENCODER_DECODER,
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 16,
        },
    ),
}


def built(prefix: str, suffix: str, sizes: dict[str, Any]) -> nn.Module:
    """The model as transformers makes it, in the mode for evaluation."""
    from hessian_tools.problem.vision import repair

    repair()
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**sizes)
    network = getattr(transformers, f"{prefix}{suffix}", None) or getattr(transformers, suffix)
    return network(config).eval()


def eager_experts(model: nn.Module) -> None:
    """The referee's experts one by one: grouped products have no float64."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def text_batches(masked_share: float = 0.4) -> list[dict[str, Tensor]]:
    """Two batches of two sequences; labels are missing in the second."""
    batches = []
    for share in (0.0, masked_share):
        ids = torch.randint(3, VOCABULARY, (2, 8))
        labels = ids.masked_fill(torch.rand(ids.shape) < share, IGNORED)
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def labelled(labels: Tensor, shifted: bool) -> float:
    """How many labels a loss is a mean over."""
    return float((labels[:, int(shifted) :] != IGNORED).sum())


def _setting(
    prefix: str, suffix: str, sizes: dict[str, Any], shifted: bool, masked_share: float = 0.4
) -> Setting:
    import hessian_tools as ht

    batches = text_batches(masked_share)
    return Setting(
        built(prefix, suffix, sizes),
        own_loss,
        batches,
        [labelled(batch["labels"], shifted) for batch in batches],
        given=ht.huggingface,
        prepare=eager_experts,
    )


def _register(
    table: dict[str, tuple[str, str, dict[str, Any]]],
    shifted: Callable[[str], bool],
    masked_share: float = 0.4,
) -> None:
    for name, row in table.items():

        def builder(
            row: tuple[str, str, dict[str, Any]] = row, shift: bool = shifted(name)
        ) -> Setting:
            return _setting(*row, shift, masked_share)

        configuration(f"hf/{name}")(builder)


_register(CAUSAL, lambda name: name != "xlnet")  # which predicts the label of its own place
_register(MASKED, lambda name: False)
# missing labels become padding tokens of the decoder's input
_register(SEQUENCE_TO_SEQUENCE, lambda name: False, masked_share=0.0)


@configuration("hf/bart-missing-labels")
def bart_missing() -> Setting:
    """The decoder reads padding, whose row of the embedding gets no gradient."""
    setting = _setting(*SEQUENCE_TO_SEQUENCE["bart"], shifted=False)
    return dataclasses.replace(setting, refusal="gradient")
