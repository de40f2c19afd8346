"""Families of torchvision: classification, segmentation, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, Inputs, floats, generator, images
from zoo.ops import torchvision

models = torchvision.models
resnet = models.resnet

CLASSIFIERS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (63, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "efficientnet_v2_s": (32, {}),
    "googlenet": (64, {"init_weights": False}),
    "inception_v3": (96, {"init_weights": False, "aux_logits": False}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {"width_mult": 0.5}),
    "mobilenet_v3_small": (32, {}),
    "regnet_x_400mf": (32, {}),
    "regnet_y_400mf": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (32, {}),
}
"""By torchvision's name: size of the image, arguments of the factory."""


def _vit() -> nn.Module:
    return models.VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


def _convnext() -> nn.Module:
    widths = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    config = [models.convnext.CNBlockConfig(*width) for width in widths]
    return models.ConvNeXt(config, stochastic_depth_prob=0.1, num_classes=5)


def _densenet() -> nn.Module:
    return models.DenseNet(8, (2, 2, 2, 2), 16, drop_rate=0.1, num_classes=5, memory_efficient=True)


def _swin(version: str) -> nn.Module:
    swin = models.swin_transformer
    block, merge = {
        "": (swin.SwinTransformerBlock, swin.PatchMerging),
        "v2": (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    }[version]
    return models.SwinTransformer(
        [4, 4], 8, [2, 2, 1], [1, 2, 2], [4, 4], num_classes=5, block=block, downsample_layer=merge
    )


def _vgg() -> nn.Module:
    with torch.device("meta"):  # for its classifier of 120 M parameters
        model = models.VGG(nn.Identity(), num_classes=5, init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=True)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 5))
    return model


def _maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 8, 4, [8, 16, 16], [1, 1, 1], 8, 0.2, num_classes=5)


def _resnet(block: str, layers: tuple[int, ...] = (1, 1, 1, 1), **options: Any) -> nn.Module:
    return models.ResNet(getattr(resnet, block), list(layers), num_classes=5, **options)


def _segmenter(kind: str, aux: bool) -> nn.Module:
    """A head of torchvision's on a small ResNet, with an auxiliary classifier or without."""
    segmentation = models.segmentation
    layers = {"layer4": "out", "layer3": "aux"} if aux else {"layer4": "out"}
    backbone = models._utils.IntermediateLayerGetter(_resnet("BasicBlock"), layers)
    side = segmentation.fcn.FCNHead(256, 3) if aux else None
    if kind == "fcn":
        return segmentation.fcn.FCN(backbone, segmentation.fcn.FCNHead(512, 3), side)
    return segmentation.deeplabv3.DeepLabV3(backbone, segmentation.deeplabv3.DeepLabHead(512, 3), side)


def _lraspp() -> nn.Module:
    return models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def _fpn() -> nn.Module:
    """Features of four sizes, as a dict."""
    return models.detection.backbone_utils.BackboneWithFPN(
        _resnet("BasicBlock"), {"layer2": "a", "layer3": "b", "layer4": "c"}, [128, 256, 512], 16
    )


def _video_resnet(kind: str) -> nn.Module:
    video = models.video.resnet
    simple, flat, factored = video.Conv3DSimple, video.Conv3DNoTemporal, video.Conv2Plus1D
    makers = {"r3d": [simple] * 4, "mc3": [simple, *[flat] * 3], "r2plus1d": [factored] * 4}[kind]
    stem = video.R2Plus1dStem if kind == "r2plus1d" else video.BasicStem
    return models.video.VideoResNet(video.BasicBlock, makers, [1, 1, 1, 1], stem, num_classes=5)


def _mvit() -> nn.Module:
    def block(heads: int, width: int, out: int, stride: int) -> Any:
        return models.video.mvit.MSBlockConfig(heads, width, out, [3, 3, 3], [3, 3, 3], [1, stride, stride], [1, 2, 2])

    blocks = [block(1, 16, 32, 1), block(2, 32, 32, 2), block(2, 32, 32, 1), block(2, 32, 32, 1)]
    return models.video.MViT((32, 32), 4, blocks, True, True, True, True, num_classes=5)


def _swin3d() -> nn.Module:
    return models.video.SwinTransformer3d([2, 4, 4], 8, [2, 2], [1, 2], [2, 4, 4], num_classes=5)


def _raft() -> nn.Module:
    raft = models.optical_flow.raft
    norm = nn.InstanceNorm2d
    corr = raft.CorrBlock(num_levels=2, radius=1)
    motion = raft.MotionEncoder(
        in_channels_corr=corr.out_channels, corr_layers=(16,), flow_layers=(16, 8), out_channels=16
    )
    recurrent = raft.RecurrentBlock(input_size=motion.out_channels + 8, hidden_size=16, kernel_size=(3,), padding=(1,))
    update = raft.UpdateBlock(
        motion_encoder=motion, recurrent_block=recurrent, flow_head=raft.FlowHead(in_channels=16, hidden_size=16)
    )
    return models.optical_flow.RAFT(
        feature_encoder=raft.FeatureEncoder(layers=(8, 8, 16, 16, 16), norm_layer=norm),
        context_encoder=raft.FeatureEncoder(layers=(8, 8, 16, 16, 24), norm_layer=nn.BatchNorm2d),
        corr_block=corr,
        update_block=update,
        mask_predictor=raft.MaskPredictor(in_channels=16, hidden_size=16),
    )


def _two_frames(rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    first = torch.randn(rows, 3, 128, 128, generator=generator(rows))
    return first, first.roll(2, -1), 2


def _built() -> dict[str, tuple[Inputs, Callable[[], nn.Module]]]:
    clip = floats(3, 4, 32, 32)
    return {
        "convnext": (images(32), _convnext),
        "densenet_checkpointed": (images(32), _densenet),
        "maxvit": (images(64), _maxvit),
        "resnet_basic": (images(32), partial(_resnet, "BasicBlock", (2, 2, 1, 1))),
        "resnet_bottleneck": (images(32), partial(_resnet, "Bottleneck", zero_init_residual=True)),
        "resnext": (images(32), partial(_resnet, "Bottleneck", groups=8, width_per_group=4)),
        "swin": (images(32), partial(_swin, "")),
        "swin_v2": (images(32), partial(_swin, "v2")),
        "vgg": (images(32), _vgg),
        "vit": (images(32), _vit),
        "fcn": (images(32), partial(_segmenter, "fcn", False)),
        "fcn_aux": (images(32), partial(_segmenter, "fcn", True)),
        "deeplabv3": (images(32), partial(_segmenter, "deeplabv3", False)),
        "deeplabv3_aux": (images(32), partial(_segmenter, "deeplabv3", True)),
        "lraspp": (images(32), _lraspp),
        "fpn": (images(32), _fpn),
        "r3d": (clip, partial(_video_resnet, "r3d")),
        "mc3": (clip, partial(_video_resnet, "mc3")),
        "r2plus1d": (clip, partial(_video_resnet, "r2plus1d")),
        "mvit": (clip, _mvit),
        "swin3d": (clip, _swin3d),
        "raft": (_two_frames, _raft),
    }


QUICK = frozenset(("vgg", "fpn"))


def entries() -> list[Entry]:
    classifiers = {
        name: (images(size), partial(models.get_model, name, num_classes=5, **options))
        for name, (size, options) in CLASSIFIERS.items()
    }
    return [
        Entry(f"torchvision/{name}", "torchvision", make, inputs, quick=name in QUICK)
        for name, (inputs, make) in {**classifiers, **_built()}.items()
    ]
