"""One model of every module of timm, made small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from zoo.entry import Entry, images
from zoo.ops import timm

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
WIDTHS = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
EMBED = {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 24, 32)}
HEADS = {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}

BY_NAME: dict[str, tuple[int, dict[str, Any]]] = {
    "lowformer_b0": (64, {"width_list": (8, 8, 16, 16, 32), "head_widths": (32, 32)}),
    "beit_base_patch16_224": (32, VIT),
    "test_byobnet": (64, {}),
    "cait_xxs24_224": (32, VIT),
    "coat_tiny": (32, {"img_size": 32, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 2}),
    "coat_lite_tiny": (32, {"img_size": 32, "embed_dims": (16, 24, 32, 32), "serial_depths": (1,) * 4}),
    "convit_tiny": (32, {**VIT, "embed_dim": 16, "local_up_to_layer": 2}),
    "test_convnext": (32, {}),
    "cpubone_nano": (64, {"width_list": (8, 8, 16, 16, 32), "head_widths": (32, 32)}),
    "crossvit_tiny_240": (48, {"img_size": 48, "embed_dim": (16, 32), "img_scale": (1.0, 2 / 3), "patch_size": (12, 16),
                               "depth": ((1, 2, 0), (1, 2, 0)), "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}),
    "csatv2": (64, {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "cspnext_tiny": (64, {"widen_factor": 0.125}),
    "davit_tiny": (64, {**HEADS, "window_size": 2}),
    "deepseek_vit_412m": (48, {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "deit_tiny_distilled_patch16_224": (32, VIT),
    "deit3_small_patch16_224": (32, VIT),
    "densenet121": (64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {"channels": (8, 8, 16, 16, 32, 32)}),
    "dpn48b": (64, {"k_r": 16, "groups": 4, "k_sec": (1, 1, 2, 1), "inc_sec": (4, 4, 8, 8)}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32)}),
    "efficientformerv2_s0": (64, {"img_size": 64, **EMBED, "num_vit": 1, "mlp_ratios": 2}),
    "test_efficientnet": (64, {}),
    "efficientvim_m1": (64, {"embed_dim": (16, 24, 32), "state_dim": (9, 4, 1)}),
    "efficientvit_b0": (64, {"head_widths": (32, 32)}),
    "efficientvit_m0": (112, {"img_size": 112, "embed_dim": (16, 32, 48), "key_dim": (4, 4, 4)}),
    "vit_tiny_patch16_dinov3_qkvb": (32, VIT),
    "eva02_tiny_patch14_224": (32, VIT),
    "fasternet_t0": (64, {"embed_dim": 8, "feature_dim": 32, "depths": (1, 1, 2, 1)}),
    "fastvit_t8": (64, {"layers": (1, 1, 2, 1), "embed_dims": (8, 16, 32, 64)}),
    "gemma4_vit_167m": (48, {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2,
                             "head_dim": 16, "intermediate_size": 64, "position_embedding_size": 64}),
    "ghostnet_050": (64, {}),
    "ghostnetv3_050": (64, {}),
    "hardcorenas_b": (64, {}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 8, "stages": (1, 1, 2, 1)}),
    "sam2_hiera_tiny": (64, {"embed_dim": 8, "stages": (1, 1, 2, 1), "global_att_blocks": (3,),
                             "window_spec": (4, 4, 2, 2)}),
    "iformer_t": (64, {"dims": (16, 16, 32, 32), "depths": (1, 1, 6, 3), "attn_groups": (0, 0, 1, 1)}),
    "inception_next_atto": (64, WIDTHS),
    "inception_resnet_v2": (75, {}),
    "inception_v3": (75, {}),
    "inception_v4": (75, {}),
    "lcnetv2_small": (64, {"scale": 0.25, "head_hidden_size": 32}),
    "levit_128s": (64, {"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 8}),
    "test_mambaout": (64, {}),
    "test_coatnet": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "mobilenetv3_small_050": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "nasnetalarge": (64, {"stem_size": 8, "num_features": 192}),
    "nextvit_small": (64, {"stem_chs": (8, 8, 8), "depths": (2, 2, 5, 2)}),
    "test_nfnet": (64, {}),
    "pit_ti_distilled_224": (64, {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 2, 1)}),
    "pvt_v2_b0": (64, {"embed_dims": (8, 16, 20, 32)}),
    "qwen3_vit_88m": (64, {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2,
                           "pos_embed_grid_size": 8}),
    "rdnet_tiny": (64, {"growth_rates": (8,) * 7, "num_blocks_list": (1,) * 7, "num_init_features": 16}),
    "regnetx_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m1": (64, {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1)}),
    "res2next50": (64, {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}),
    "resnest14d": (64, {"channels": (8, 16, 24, 32), "stem_width": 8}),
    "test_resnet": (64, {}),
    "resnetv2_18": (64, {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_chs": 8}),
    "rexnet_100": (64, {"width_mult": 0.5}),
    "legacy_seresnet18": (64, {"layers": (1, 1, 1, 1), "inplanes": 64}),
    "sequencer2d_s": (56, {"img_size": 56, "layers": (1, 1, 2, 1), "embed_dims": (16,) * 4, "hidden_sizes": (4,) * 4}),
    "shvit_s1": (64, {"embed_dim": (16, 24, 32), "partial_dim": (8, 8, 8), "depth": (1, 1, 2)}),
    "skresnet18": (64, {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (8, 16, 24, 32)}),
    "swin_tiny_patch4_window7_224": (32, {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 2, 1),
                                          "num_heads": (1, 2, 2, 4)}),
    "swinv2_tiny_window8_256": (32, {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 2, 1),
                                     "num_heads": (1, 2, 2, 4)}),
    "swinv2_cr_tiny_224": (32, {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2, 2, 1),
                                "num_heads": (1, 2, 2, 4)}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "embed_dim": 32, "inner_dim": 8, "depth": 4, "num_heads_inner": 2,
                               "num_heads_outer": 2}),
    "tresnet_m": (64, {"layers": (1, 1, 1, 1), "width_factor": 0.25}),
    "twins_svt_small": (32, {"img_size": 32, "patch_size": 4, **HEADS, "depths": (2, 2, 2, 2), "wss": (4, 2, 2, 1)}),
    "twins_pcpvt_small": (32, {"img_size": 32, "patch_size": 4, **HEADS, "depths": (1, 1, 2, 1)}),
    "visformer_tiny": (64, {"img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 2, 1), "num_heads": 2}),
    "test_vit": (32, {"img_size": 32, "patch_size": 8}),
    "vit_tiny_r_s16_p8_224": (128, {"img_size": 128, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "test_vit_relpos": (32, {"img_size": 32, "patch_size": 8, "depth": 4}),
    "samvit_base_patch16_224": (64, {**VIT, "img_size": 64, "window_size": 4, "global_attn_indexes": (1, 3)}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "legacy_xception": (75, {}),
    "xcit_nano_12_p8_224": (32, {**VIT, "num_heads": 4}),
}  # fmt: skip
"""By timm's name: size of the image, arguments of the factory."""


def _hrnet() -> nn.Module:
    stages = {
        f"stage{count}": {
            "num_modules": 1,
            "num_branches": count,
            "block_type": "BOTTLENECK" if count == 1 else "BASIC",
            "num_blocks": (1,) * count,
            "num_channels": (8, 16, 24, 32)[:count],
            "fuse_method": "SUM",
        }
        for count in (1, 2, 3, 4)
    }
    return timm.models.HighResolutionNet({"stem_width": 8, **stages, "final_layer": {}}, num_classes=5)


def _attending(layer: str, **options: Any) -> nn.Module:
    """A ResNet whose later blocks attend: halo, lambda or bottleneck attention."""
    blocks = [
        timm.models.ByoBlockCfg(type=kind, d=1, c=width, s=stride, gs=0, br=0.25)
        for kind, width, stride in (("bottle", 32, 1), ("self_attn", 64, 2), ("bottle", 64, 1), ("self_attn", 64, 1))
    ]
    config = timm.models.ByoModelCfg(
        tuple(blocks), stem_chs=16, stem_type="tiered", self_attn_layer=layer, self_attn_kwargs=options
    )
    if layer == "bottleneck":
        config = replace(config, fixed_input_size=True, attn_layer="eca")
    return timm.models.ByobNet(config, num_classes=5, img_size=64)


def _cspnet() -> nn.Module:
    cspnet = timm.models.cspnet
    stages = cspnet.CspStagesCfg(
        depth=(1, 1, 2, 1), out_chs=(16, 24, 32, 48), expand_ratio=(2.0, 1.0), bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5), down_growth=True, block_type="dark",
    )  # fmt: skip
    return timm.models.CspNet(cspnet.CspModelCfg(cspnet.CspStemCfg(out_chs=16), stages), num_classes=5)


def _mobilenetv5() -> nn.Module:
    arch = [
        ["er_r1_k3_s2_e4_c16"],
        ["uir_r1_a3_k5_s2_e4_c16", "uir_r1_a5_k0_s1_e2_c16"],
        ["uir_r1_a5_k5_s2_e4_c32", "mqa_r1_k3_h2_s2_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
        ["uir_r1_a5_k5_s2_e4_c32", "mqa_r1_k3_h2_s1_d8_c32", "uir_r1_a0_k0_s1_e2_c32"],
    ]
    blocks = timm.models._efficientnet_builder.decode_arch_def(arch)
    return timm.models.MobileNetV5(blocks, num_classes=5, num_features=32, msfa_output_resolution=4)


def _selecsls() -> nn.Module:
    features = [(32, 0, 16, 16, True, 2), (16, 16, 16, 24, False, 1), (24, 0, 24, 24, True, 2),
                (24, 24, 24, 32, False, 1)]  # fmt: skip
    config = {
        "block": timm.models.selecsls.SelecSlsBlock,
        "features": features,
        "head": [(32, 48, 3, 2)],
        "num_features": 48,
        "feature_info": [],
    }
    return timm.models.SelecSls(config, num_classes=5)


def _vitamin() -> nn.Module:
    vitamin = timm.models.vitamin
    config = vitamin.VitCfg(
        (8, 16, 32), (1, 1, 1), 8, vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), head_type="1d"
    )
    return timm.create_model(
        "vitamin_small_224", img_size=64, embed_dim=32, depth=4, num_heads=2, embed_cfg=config, num_classes=5
    )


def _xception() -> nn.Module:
    blocks = [{"in_chs": a, "out_chs": b, "stride": s} for a, b, s in ((64, 32, 2), (32, 48, 2), (48, 48, 1))]
    return timm.models.XceptionAligned([*blocks, {"in_chs": 48, "out_chs": 64, "no_skip": True, "stride": 1}], 5)


def _volo() -> nn.Module:
    model: nn.Module = timm.models.VOLO(
        (1, 1, 1, 1), 64, num_classes=5, embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), stem_hidden_dim=8
    )
    return model


def _mixer(block: str, **options: Any) -> Callable[[], nn.Module]:
    layer = getattr(timm.models.mlp_mixer, block)
    return partial(
        timm.models.MlpMixer, 5, img_size=32, patch_size=8, num_blocks=4, embed_dim=32, block_layer=layer, **options
    )


def _classes() -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    models = timm.models
    meta = models.metaformer
    mvit = models.mvitv2.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=8, num_heads=1)
    naflex = models.naflexvit.NaFlexVitCfg(patch_size=8, embed_dim=32, depth=4, num_heads=2, global_pool="avg")
    hgnet = {"stem_type": "v2", "stem_chs": (8, 16), "stage1": (16, 8, 16, 1, False, False, 3, 2),
             "stage2": (16, 8, 24, 1, True, False, 3, 2), "stage3": (24, 16, 32, 1, True, True, 5, 2),
             "stage4": (32, 16, 48, 1, True, True, 5, 2)}  # fmt: skip
    return {
        "byoanet_bottleneck": (64, partial(_attending, "bottleneck", dim_head=8)),
        "byoanet_halo": (64, partial(_attending, "halo", block_size=4, halo_size=1)),
        "byoanet_lambda": (64, partial(_attending, "lambda", r=3)),
        "convmixer": (32, partial(models.ConvMixer, dim=16, depth=4, kernel_size=3, patch_size=4, num_classes=5)),
        "cspnet": (64, _cspnet),
        "focalnet": (64, partial(models.FocalNet, num_classes=5, embed_dim=8, depths=(1, 1, 2, 1))),
        "gcvit": (64, partial(models.GlobalContextVit, num_classes=5, img_size=64, embed_dim=8, depths=(1, 1, 2, 1),
                              num_heads=(1, 2, 2, 4))),
        "hgnetv2": (64, partial(models.HighPerfGpuNet, hgnet, num_classes=5, head_hidden_size=32, use_lab=True)),
        "hrnet": (64, _hrnet),
        "poolformer": (64, partial(models.MetaFormer, num_classes=5, **WIDTHS, use_mlp_head=False)),
        "caformer": (64, partial(models.MetaFormer, num_classes=5, depths=(1, 1, 2, 1), dims=(32, 32, 64, 64),
                                 token_mixers=[meta.SepConv, meta.SepConv, meta.Attention, meta.Attention],
                                 norm_layers=[meta.LayerNorm2dNoBias] * 2 + [meta.LayerNormNoBias] * 2)),
        "mlp_mixer": (32, _mixer("MixerBlock")),
        "gmlp": (32, _mixer("SpatialGatingBlock", mlp_ratio=2, mlp_layer=models.mlp_mixer.GatedMlp)),
        "resmlp": (32, _mixer("ResBlock", mlp_ratio=2)),
        "mobilenetv5": (64, _mobilenetv5),
        "mvitv2": (64, partial(models.MultiScaleVit, mvit, img_size=(64, 64), num_classes=5)),
        "naflexvit": (32, partial(models.NaFlexVit, naflex, num_classes=5)),
        "nest": (32, partial(models.Nest, img_size=32, embed_dims=(16, 32, 32), num_heads=(2, 2, 2), depths=(1, 1, 2),
                             patch_size=2, num_classes=5)),
        "selecsls": (64, _selecsls),
        "tiny_vit": (64, partial(models.TinyVit, num_classes=5, **HEADS, window_sizes=(2,) * 4, depths=(1, 1, 2, 1))),
        "vgg": (64, partial(models.VGG, (8, "M", 16, "M", 16, "M", 32, 32, "M"), 5, mlp_ratio=0.01,
                            norm_layer=nn.BatchNorm2d)),
        "vitamin": (64, _vitamin),
        "volo": (64, _volo),
        "xception_aligned": (64, _xception),
    }  # fmt: skip


QUICK = frozenset(("resnetv2_18", "deit_tiny_distilled_patch16_224", "vgg"))


def entries() -> list[Entry]:
    by_name = {
        name: (size, partial(timm.create_model, name, num_classes=5, **options))
        for name, (size, options) in BY_NAME.items()
    }
    return [
        Entry(f"timm/{name}", "timm", make, images(size), quick=name in QUICK)
        for name, (size, make) in {**by_name, **_classes()}.items()
    ]
