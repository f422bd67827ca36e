"""Images, speech, pairs of both, time series: models of transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, own_loss
from family_models.transformers_text import ENCODER_DECODER, TOKENS, VOCABULARY, built

CLASSES = 3
SIDE = 16
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "num_labels": CLASSES,
    "mlp_ratio": 1,
}
STAGES: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 8,
    "embedding_size": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "hidden_sizes": [8, 12],
    "num_stages": 2,
    "num_encoder_blocks": 2,
    "num_labels": CLASSES,
    "drop_path_rate": 0.0,
}
# name -> (prefix of the config's class, suffix of the model's, sizes, batch_stats where it matters)
CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any], bool | None]] = {
    "vit": ("ViT", "ForImageClassification", VIT, None),
    "deit": ("DeiT", "ForImageClassification", VIT, None),
    "beit-relative-positions": (
        "Beit",
        "ForImageClassification",
        {**VIT, "use_relative_position_bias": True},
        None,
    ),
    "dinov2": ("Dinov2", "ForImageClassification", VIT, None),
    "dinov2-registers": ("Dinov2WithRegisters", "ForImageClassification", VIT, None),
    "ijepa": ("IJepa", "ForImageClassification", VIT, None),
    "swin": ("Swin", "ForImageClassification", STAGES, None),
    "swinv2": ("Swinv2", "ForImageClassification", STAGES, None),
    "convnext": ("ConvNext", "ForImageClassification", STAGES, None),
    "convnextv2": ("ConvNextV2", "ForImageClassification", STAGES, None),
    "poolformer": (
        "PoolFormer",
        "ForImageClassification",
        {**STAGES, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]},
        None,
    ),
    "pvt": (
        "Pvt",
        "ForImageClassification",
        {
            **STAGES,
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "sequence_reduction_ratios": [2, 1],
            "mlp_ratios": [1, 1],
        },
        None,
    ),
    "segformer": (
        "Segformer",
        "ForImageClassification",
        {
            **STAGES,
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "mlp_ratios": [1, 1],
        },
        None,
    ),
    "focalnet": (
        "FocalNet",
        "ForImageClassification",
        {**STAGES, "focal_levels": [1, 1], "focal_windows": [3, 3]},
        None,
    ),
    "regnet": ("RegNet", "ForImageClassification", {**STAGES, "groups_width": 4}, True),
    "resnet": ("ResNet", "ForImageClassification", {**STAGES, "layer_type": "basic"}, False),
    "mobilenet-v1": (
        "MobileNetV1",
        "ForImageClassification",
        {**STAGES, "depth_multiplier": 0.02, "min_depth": 4},
        True,
    ),
    "levit": (
        "Levit",
        "ForImageClassification",
        {
            "num_labels": CLASSES,
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "mlp_ratio": [1, 1, 1],
            "attention_ratio": [1, 1, 1],
        },
        True,
    ),
    "mobilevit": (
        "MobileViT",
        "ForImageClassification",
        {
            "num_labels": CLASSES,
            "image_size": 32,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 8, 8, 8, 8],
            "num_attention_heads": 2,
            "mlp_ratio": 1.0,
            "expand_ratio": 1.0,
        },
        True,
    ),
}
TRAINING = ("levit",)  # which keeps tensors of one graph for the next in the mode for evaluation


def _register() -> None:
    for name, row in CLASSIFIERS.items():

        def builder(
            name: str = name, row: tuple[str, str, dict[str, Any], bool | None] = row
        ) -> Setting:
            prefix, suffix, sizes, batch_stats = row
            side = sizes["image_size"]
            counts = [6, 4] if batch_stats else [3, 2]
            batches = [
                {"pixel_values": torch.randn(n, 3, side, side), "labels": _labels(n)}
                for n in counts
            ]
            options = {} if batch_stats is None else {"batch_stats": batch_stats}
            model = built(prefix, suffix, sizes)
            if name in TRAINING:
                model.train()
            return _own(model, batches, counts, options)

        configuration(f"hf/{name}")(builder)


_register()


@configuration("hf/vit-mae-fixed-noise")
def vit_mae() -> Setting:
    sizes = {
        **VIT,
        "decoder_hidden_size": 8,
        "decoder_intermediate_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    model = built("ViTMAE", "ForPreTraining", sizes)
    batches = [{"pixel_values": torch.randn(3, 3, SIDE, SIDE), "noise": torch.rand(3, 4)}]
    return Setting(model, own_loss, batches, [3.0])


@configuration("hf/clip")
def clip() -> Setting:
    return _pairs("CLIP")


@configuration("hf/siglip")
def siglip() -> Setting:
    return _pairs("Siglip")


@configuration("hf/whisper")
def whisper() -> Setting:
    sizes = {**ENCODER_DECODER, "num_mel_bins": 4, "max_source_positions": 8}
    model = built("Whisper", "ForConditionalGeneration", sizes)
    batches = [
        {"input_features": torch.randn(2, 4, 16), "labels": torch.randint(3, VOCABULARY, (2, 5))}
    ]
    return _own(model, batches, [10], {})


@configuration("hf/wav2vec2")
def wav2vec2() -> Setting:
    return _speech("Wav2Vec2")


@configuration("hf/hubert")
def hubert() -> Setting:
    return _speech("Hubert")


@configuration("hf/audio-spectrogram-transformer")
def spectrogram() -> Setting:
    sizes = {
        **VIT,
        "max_length": 16,
        "num_mel_bins": 8,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
    }
    model = built("AST", "ForAudioClassification", sizes)
    batches = [{"input_values": torch.randn(3, 16, 8), "labels": _labels(3)}]
    return _own(model, batches, [3], {})


@configuration("hf/patchtst")
def patchtst() -> Setting:
    sizes = {
        "num_input_channels": 2,
        "context_length": 16,
        "prediction_length": 4,
        "patch_length": 4,
        "patch_stride": 4,
        "d_model": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "ffn_dim": 8,
        "loss": "mse",
    }
    model = built("PatchTST", "ForPrediction", sizes)
    batches = [
        {"past_values": torch.randn(n, 16, 2), "future_values": torch.randn(n, 4, 2)}
        for n in (3, 2)
    ]
    return Setting(model, own_loss, batches, [3.0, 2.0], options={"batch_stats": False})


@configuration("hf/decision-transformer")
def decision_transformer() -> Setting:
    sizes = {
        "state_dim": 3,
        "act_dim": 2,
        "hidden_size": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "max_ep_len": 8,
        "n_inner": 16,
        "n_embd": 16,
        **TOKENS,
    }
    model = built("DecisionTransformer", "Model", sizes)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(**batch).action_preds - batch["actions"]).square().mean()

    batch = {
        "states": torch.randn(2, 4, 3),
        "actions": torch.randn(2, 4, 2),
        "rewards": torch.randn(2, 4, 1),
        "returns_to_go": torch.randn(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    }
    return Setting(model, loss, [batch], [2.0])


@configuration("hf/bert-sequence-classifier-padded")
def bert_padded() -> Setting:
    from family_models.transformers_text import BERT

    model = built("Bert", "ForSequenceClassification", {**BERT, "num_labels": CLASSES})
    batches = []
    for n in (4, 2):
        ids = torch.randint(1, VOCABULARY, (n, 7))
        mask = (torch.arange(7) < torch.randint(3, 8, (n, 1))).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": _labels(n)})
    return _own(model, batches, [4, 2], {})


def _own(
    model: nn.Module, batches: list[Any], counts: list[int], options: dict[str, Any]
) -> Setting:
    import hessian_tools as ht

    return Setting(
        model, own_loss, batches, list(map(float, counts)), given=ht.huggingface, options=options
    )


def _pairs(prefix: str) -> Setting:
    """Images and texts against one another: the loss exists on whole batches only."""
    sizes = {key: size for key, size in VIT.items() if key != "num_labels"}
    text = {
        **sizes,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8,
        "projection_size": 8,
        "projection_dim": 8,
        **TOKENS,
    }
    if prefix == "Siglip":
        text["projection_size"] = 16  # the two towers' widths must agree
    config = {
        "text_config": text,
        "vision_config": {**sizes, "projection_dim": 8},
        "projection_dim": 8,
    }
    model = built(prefix, "Model", config)
    ids = torch.cat([torch.randint(3, VOCABULARY, (3, 5)), torch.full((3, 1), 2)], 1)
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, SIDE, SIDE)}
    return Setting(model, _contrastive, [batch], [3.0])


def _contrastive(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_loss=True).loss


def _speech(prefix: str) -> Setting:
    sizes = {
        **VIT,
        "vocab_size": VOCABULARY,
        "conv_dim": [8, 8],
        "conv_stride": [4, 2],
        "conv_kernel": [8, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "classifier_proj_size": 8,
        "apply_spec_augment": False,
        **TOKENS,
    }
    model = built(prefix, "ForSequenceClassification", sizes)  # positions by weight_norm
    batches = [{"input_values": torch.randn(2, 64), "labels": _labels(2)}]
    return _own(model, batches, [2], {})


def _labels(count: int) -> Tensor:
    return torch.randint(CLASSES, (count,))
