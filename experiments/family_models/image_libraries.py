"""Networks of torchvision, timm and diffusers, made small by their own arguments.

Where a width cannot be chosen, all but a few layers are frozen: the whole network runs, and the
variables are few.
"""

from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, cross_entropy, images, only

CLASSES = 3
# name -> arguments of timm.create_model, side of the images, batch_stats where it matters
TIMM: dict[str, tuple[str, dict[str, Any], int, bool | None]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 16, "patch_size": 8},
        16,
        None,
    ),
    "vit-layer-scale-registers": (
        "vit_tiny_patch16_224",
        {
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 4,
            "img_size": 16,
            "patch_size": 8,
            "init_values": 0.1,
            "reg_tokens": 2,
            "qk_norm": True,
            "global_pool": "avg",
        },
        16,
        None,
    ),
    "deit3": (
        "deit3_small_patch16_224",
        {"embed_dim": 16, "depth": 1, "num_heads": 4, "img_size": 16, "patch_size": 8},
        16,
        None,
    ),
    "eva-rotary": (
        "eva02_tiny_patch14_224",
        {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 16, "patch_size": 8},
        16,
        None,
    ),
    "cait": (
        "cait_xxs24_224",
        {"embed_dim": 16, "depth": 1, "num_heads": 4, "img_size": 16, "patch_size": 8},
        16,
        None,
    ),
    "xcit": (
        "xcit_nano_12_p16_224",
        {"embed_dim": 16, "depth": 1, "num_heads": 4, "img_size": 32},
        32,
        False,
    ),
    "mixer": (
        "mlp_mixer.MlpMixer",
        {"embed_dim": 16, "num_blocks": 2, "img_size": 16, "patch_size": 8},
        16,
        None,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "img_size": 16, "window_size": 2},
        16,
        None,
    ),
    "resnet": (
        "resnet18",
        {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8), "stem_width": 4},
        32,
        True,
    ),
    "resnet-squeeze-excite": (
        "seresnet18",
        {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
        32,
        False,
    ),
    "resnetv2-weight-standardised": (
        "resnetv2.ResNetV2",
        {"layers": (1,), "channels": (32,), "stem_chs": 32, "bottle_ratio": 1.0},
        16,
        None,
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}, 32, None),
    "efficientnet": ("efficientnet_b0", {}, 32, False),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 64, True),
    "mobilenetv4": ("mobilenetv4_conv_small_050", {}, 32, False),
    "nfnet": ("nf_resnet26", {"width_factor": 0.1, "ch_div": 4}, 32, None),
    "metaformer": ("metaformer.MetaFormer", {"depths": (1, 1), "dims": (8, 8)}, 16, None),
    "levit": (
        "levit_128s",
        {
            "embed_dim": (16, 16, 16),
            "key_dim": 4,
            "num_heads": (2, 2, 2),
            "depth": (1, 1, 1),
            "img_size": 64,
        },
        64,
        True,
    ),
    "pvt-v2": (
        "pvt_v2_b0",
        {
            "depths": (1, 1, 1, 1),
            "embed_dims": (8, 8, 8, 8),
            "num_heads": (1, 2, 2, 2),
            "mlp_ratios": (1, 1, 1, 1),
        },
        32,
        None,
    ),
    "edgenext": (
        "edgenext_xx_small",
        {"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1), "heads": (2, 2, 2, 2)},
        64,
        None,
    ),
}
# whose widths cannot be chosen -> what is trainable of them
WIDE = {
    "efficientnet_b0": ("conv_stem", "blocks.1.0.se", "blocks.2.0.conv_dw", "classifier"),
    "mobilenetv3_small_050": ("conv_stem", "blocks.1.0", "classifier"),
    "mobilenetv4_conv_small_050": ("conv_stem", "blocks.1.0", "classifier"),
    "nf_resnet26": ("stem", "stages.0", "head"),
}


def _register() -> None:
    for name, row in TIMM.items():

        def builder(row: tuple[str, dict[str, Any], int, bool | None] = row) -> Setting:
            torchvision()  # timm looks for it
            import timm

            network, sizes, side, batch_stats = row
            module, _, name = network.rpartition(".")
            if module:
                made = getattr(getattr(timm.models, module), name)(num_classes=CLASSES, **sizes)
            else:
                made = timm.create_model(name, num_classes=CLASSES, **sizes)
            model = only(made, *WIDE[name]) if name in WIDE else made
            return classified(model.train(name == "levit_128s"), side, batch_stats)

        configuration(f"timm/{name}")(builder)


_register()


def torchvision() -> Any:
    from hessian_tools.problem.vision import torchvision

    return torchvision()


def classified(model: nn.Module, side: int, batch_stats: bool | None = None) -> Setting:
    options = {} if batch_stats is None else {"batch_stats": batch_stats}
    sizes = (6, 4) if batch_stats else (3, 2)
    return Setting(
        model, cross_entropy, images(sizes, side), list(map(float, sizes)), options=options
    )


@configuration("torchvision/resnet-batch-statistics")
def resnet() -> Setting:
    models = torchvision().models.resnet
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).eval()
    # late layers only: a step of earlier ones would cross kinks of a million ReLUs
    return classified(only(model, "layer4.0.bn1", "layer4.0.bn2", "fc"), 64, True)


@configuration("torchvision/resnet-running-statistics")
def resnet_running() -> Setting:
    models = torchvision().models.resnet
    model = models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES).eval()
    return classified(only(model, "conv1", "bn1", "layer1.0.bn1", "layer4.0.bn2", "fc"), 32, False)


@configuration("torchvision/vgg")
def vgg() -> Setting:
    models = torchvision().models.vgg
    features = models.make_layers([4, "M", 8, "M", 8, "M"])
    with torch.device("meta"):  # its classifier has 10^8 parameters
        model = models.VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)
    model.features, model.avgpool = features, nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return classified(model.eval(), 16)


@configuration("torchvision/vgg-batch-norm")
def vgg_bn() -> Setting:
    models = torchvision().models.vgg
    layers = models.make_layers([4, "M", 8, "M"], batch_norm=True)
    model = nn.Sequential(layers, nn.Flatten(), nn.Linear(128, CLASSES)).eval()
    return classified(model, 16, True)


@configuration("torchvision/alexnet")
def alexnet() -> Setting:
    model = torchvision().models.AlexNet(num_classes=CLASSES).eval()
    return classified(only(model, "features.0.bias", "features.3.bias", "classifier.6"), 64)


@configuration("torchvision/squeezenet")
def squeezenet() -> Setting:
    model = torchvision().models.squeezenet.SqueezeNet("1_1", num_classes=CLASSES).eval()
    return classified(only(model, "features.0", "features.3", "classifier"), 32)


@configuration("torchvision/mobilenet-v2")
def mobilenet_v2() -> Setting:
    settings = [[1, 8, 1, 1], [2, 8, 1, 2], [2, 8, 1, 2]]
    model = torchvision().models.MobileNetV2(CLASSES, 0.25, settings).eval()
    return classified(model, 16, True)


@configuration("torchvision/mobilenet-v3")
def mobilenet_v3() -> Setting:
    models = torchvision().models.mobilenetv3
    layer = models.InvertedResidualConfig
    layers = [
        layer(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        layer(8, 3, 16, 8, True, "HS", 2, 1, 1.0),
    ]
    return classified(models.MobileNetV3(layers, 16, num_classes=CLASSES).eval(), 16, True)


@configuration("torchvision/efficientnet")
def efficientnet() -> Setting:
    models = torchvision().models.efficientnet
    layer = models.MBConvConfig
    layers = [layer(1, 3, 1, 8, 8, 1, 1.0, 1.0), layer(2, 3, 2, 8, 8, 1, 1.0, 1.0)]
    model = models.EfficientNet(layers, 0.0, num_classes=CLASSES, last_channel=16).eval()
    return classified(model, 16, True)


@configuration("torchvision/densenet")
def densenet() -> Setting:
    sizes = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "bn_size": 2}
    model = torchvision().models.DenseNet(num_classes=CLASSES, **sizes).eval()
    return classified(model, 32, True)


@configuration("torchvision/densenet-checkpointed")
def densenet_checkpointed() -> Setting:
    sizes = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "bn_size": 2}
    model = torchvision().models.DenseNet(num_classes=CLASSES, memory_efficient=True, **sizes)
    return classified(model.eval(), 32, False)


@configuration("torchvision/swin")
def swin() -> Setting:
    return classified(_swin(), 16)


@configuration("torchvision/swin-v2")
def swin_v2() -> Setting:
    models = torchvision().models.swin_transformer
    parts = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
    return classified(_swin(**parts), 16)


@configuration("torchvision/vit")
def vit() -> Setting:
    model = torchvision().models.VisionTransformer(16, 8, 2, 4, 16, 20, num_classes=CLASSES)
    return classified(model.eval(), 16)


@configuration("torchvision/maxvit")
def maxvit() -> Setting:
    model = torchvision().models.MaxVit(
        input_size=(16, 16),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 8],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        squeeze_ratio=0.25,
        expansion_ratio=1,
        mlp_ratio=1,
    )
    return classified(model.eval(), 16, True)


@configuration("torchvision/convnext")
def convnext() -> Setting:
    models = torchvision().models.convnext
    blocks = [models.CNBlockConfig(8, 12, 1), models.CNBlockConfig(12, None, 1)]
    return classified(models.ConvNeXt(blocks, num_classes=CLASSES).eval(), 16)


@configuration("torchvision/regnet")
def regnet() -> Setting:
    models = torchvision().models.regnet
    sizes = models.BlockParams.from_init_params(4, 8, 4.0, 2.5, 4, se_ratio=0.25)
    return classified(models.RegNet(sizes, num_classes=CLASSES, stem_width=8).eval(), 32, True)


@configuration("torchvision/shufflenet")
def shufflenet() -> Setting:
    model = torchvision().models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=CLASSES)
    return classified(model.eval(), 32, True)


@configuration("torchvision/mnasnet")
def mnasnet() -> Setting:
    model = torchvision().models.MNASNet(0.1, num_classes=CLASSES).eval()
    return classified(only(model, "layers.0", "layers.8", "classifier"), 32, False)


@configuration("torchvision/googlenet")
def googlenet() -> Setting:
    model = torchvision().models.GoogLeNet(CLASSES, aux_logits=False, init_weights=False).eval()
    return classified(only(model, "conv1", "inception3a.branch1.conv", "fc"), 32, False)


@configuration("torchvision/deeplab-segmentation")
def segmentation() -> Setting:
    """Logits (N, C, L, L) against targets (N, L, L), by torchvision's dictionary of outputs."""
    models = torchvision().models
    backbone = nn.Sequential()
    backbone.add_module("first", nn.Conv2d(3, 8, 3, stride=2, padding=1))
    backbone.add_module("second", nn.Sequential(nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)))
    layers = models._utils.IntermediateLayerGetter(backbone, {"second": "out"})
    head = models.segmentation.fcn.FCNHead(8, CLASSES)
    model = models.segmentation.FCN(layers, head).eval()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0])["out"], batch[1])

    batches = [(torch.randn(n, 3, 8, 8), torch.randint(CLASSES, (n, 8, 8))) for n in (3, 2)]
    return Setting(model, loss, batches, [3.0, 2.0], options={"batch_stats": True})


@configuration("diffusers/unet-noise-prediction")
def unet() -> Setting:
    torchvision()
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        noisy = 0.8 * batch["image"] + 0.6 * batch["noise"]
        return (model(noisy, batch["time"]).sample - batch["noise"]).square().mean()

    batches = [
        {
            "image": torch.randn(n, 1, 8, 8),
            "noise": torch.randn(n, 1, 8, 8),
            "time": torch.randint(1000, (n,)),
        }
        for n in (3, 2)
    ]
    return Setting(model, loss, batches, [3.0, 2.0])


@configuration("diffusers/diffusion-transformer")
def diffusion_transformer() -> Setting:
    torchvision()
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        norm_num_groups=1,
        num_embeds_ada_norm=10,
    ).eval()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        noisy, time, label, noise = batch
        return (model(noisy, time, label).sample - noise).square().mean()

    batch = (
        torch.randn(3, 2, 4, 4),
        torch.randint(10, (3,)),
        torch.randint(5, (3,)),
        torch.randn(3, 2, 4, 4),
    )
    return Setting(model, loss, [batch], [3.0])


def _swin(**parts: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "patch_size": [2, 2],
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [2, 2],
        "window_size": [2, 2],
        "mlp_ratio": 1.0,
        "num_classes": CLASSES,
        "stochastic_depth_prob": 0.0,
    }
    return torchvision().models.SwinTransformer(**sizes, **parts).eval()
