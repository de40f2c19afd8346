"""Architectures of transformers that see, hear, or read and see: tiny configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, generator
from zoo.ops import transformers
from zoo.transformers_models import config, text

FOUR = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}

IMAGES: dict[str, dict[str, Any]] = {
    "beit": {},
    "convnext": {**FOUR, "patch_size": None},
    "convnextv2": {**FOUR, "patch_size": None},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "hidden_size": None},
    "data2vec-vision": {},
    "dinov2": {},
    "dinov2_with_registers": {},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "depth_divisor": 4},
    "focalnet": {"embed_dim": 8, "depths": [1, 1, 2, 1], "patch_size": 4, "hidden_sizes": None},
    "hiera": {"image_size": [32, 32], "patch_size": None, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2],
              "num_query_pool": 2, "masked_unit_size": [4, 4], "num_layers": None, "hidden_size": None},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"image_size": 64, "patch_size": 2, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2,
                  "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "intermediate_size": None},
    "poolformer": {**FOUR, "patch_size": None},
    "pvt": {**FOUR, "num_attention_heads": [1, 2, 3, 4], "patch_size": None, "num_encoder_blocks": 4, "image_size": 64},
    "regnet": {**FOUR, "embedding_size": 8, "groups_width": 8},
    "resnet": {**FOUR, "embedding_size": 8},
    "segformer": {**FOUR, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
    "swiftformer": {"depths": [1, 1, 2, 1], "embed_dims": [8, 16, 24, 32], "drop_path_rate": 0.1},
    "swin": {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2, "patch_size": 4,
             "hidden_size": None, "num_attention_heads": None},
    "swinv2": {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2, "patch_size": 4,
               "hidden_size": None, "num_attention_heads": None},
    "vit": {},
}  # fmt: skip

LEVIT = {"image_size": 64, "patch_size": None, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2],
         "depths": [1, 1, 1], "key_dim": [4, 4, 4]}  # fmt: skip

CONVOLUTIONS = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
}
WAVES: dict[str, Any] = {
    **CONVOLUTIONS,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "mask_time_length": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
AUDIO: dict[str, dict[str, Any]] = {
    "data2vec-audio": {**WAVES, "conv_pos_kernel_size": 3},
    "hubert": WAVES,
    "sew": {**WAVES, "squeeze_factor": 2},
    "unispeech": WAVES,
    "unispeech-sat": WAVES,
    "wav2vec2": WAVES,
    "wav2vec2-conformer": WAVES,
    "wavlm": WAVES,
}
RANDOM = {"layerdrop": 0.1, "apply_spec_augment": True, "mask_time_prob": 0.1}
"""How wav2vec2 trains by default: layers left out and time steps masked by Python's and numpy's random numbers."""

QUICK = frozenset(("image/vit",))


def _pixels(rows: int, size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator(rows))}


def _wave(rows: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(rows, 800, generator=generator(rows))}


def _spectrum(rows: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(rows, 16, 40, generator=generator(rows))}


def _frames(rows: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(rows, 64, 16, generator=generator(rows))}


def _text_and_image(rows: int) -> dict[str, Tensor]:
    return {**text(rows), **_pixels(rows)}


def _series(rows: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(rows, 32, 2, generator=generator(rows))}


def _make(auto: str, kind: str, options: dict[str, Any]) -> nn.Module:
    made, build = config(kind, **options), getattr(transformers, auto)
    model: nn.Module = build.from_config(made) if auto.startswith("Auto") else build(made)
    return model


def _clip(kind: str) -> nn.Module:
    parts = {f"{part}_config": config(f"{kind}_{part}_model").to_dict() for part in ("text", "vision")}
    made = transformers.CONFIG_MAPPING[kind](**parts, **({"projection_dim": 16} if kind == "clip" else {}))
    model: nn.Module = transformers.AutoModel.from_config(made)
    return model


def _whisper() -> nn.Module:
    made = config("whisper", num_mel_bins=16, max_source_positions=20, classifier_proj_size=16, max_target_positions=16)
    model: nn.Module = transformers.WhisperForAudioClassification(made)
    return model


def _spectrogram() -> nn.Module:
    made = config("audio-spectrogram-transformer", max_length=64, num_mel_bins=16, frequency_stride=8, time_stride=8)
    model: nn.Module = transformers.ASTForAudioClassification(made)
    return model


def _detr() -> nn.Module:
    backbone = config("resnet", **FOUR, embedding_size=8, out_features=["stage4"])
    made = config("detr", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                  backbone_config=backbone, num_queries=6)  # fmt: skip
    model: nn.Module = transformers.DetrForObjectDetection(made)
    return model


def _captioner() -> nn.Module:
    made = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(config("vit"), config("gpt2"))
    model: nn.Module = transformers.VisionEncoderDecoderModel(config=made)
    return model


def _caption(rows: int) -> dict[str, Tensor]:
    return {**_pixels(rows), "decoder_input_ids": text(rows)["input_ids"]}


def _patch_series() -> nn.Module:
    made = config("patchtst", context_length=32, patch_length=4, patch_stride=4, num_input_channels=2,
                  prediction_length=4, patch_size=None, loss="mse")  # fmt: skip
    model: nn.Module = transformers.PatchTSTForPrediction(made)
    return model


def _others() -> dict[str, tuple[Callable[[int], Any], Callable[[], nn.Module]]]:
    segformer = {**IMAGES["segformer"], "image_size": None}
    return {
        "image/deit": (_pixels, partial(_make, "DeiTForImageClassificationWithTeacher", "deit", {})),
        "image/levit": (
            partial(_pixels, size=64),
            partial(_make, "LevitForImageClassificationWithTeacher", "levit", LEVIT),
        ),
        "segment/segformer": (_pixels, partial(_make, "AutoModelForSemanticSegmentation", "segformer", segformer)),
        "audio/whisper": (_spectrum, _whisper),
        "audio/spectrogram": (_frames, _spectrogram),
        "audio/wav2vec2_random": (_wave, partial(_make, "AutoModelForAudioClassification", "wav2vec2", WAVES | RANDOM)),
        "clip": (_text_and_image, partial(_clip, "clip")),
        "siglip": (_text_and_image, partial(_clip, "siglip")),
        "detr": (partial(_pixels, size=64), _detr),
        "captioner": (_caption, _captioner),
        "vilt": (_text_and_image, partial(_make, "AutoModel", "vilt", {})),
        "series/patchtst": (_series, _patch_series),
    }


def entries() -> list[Entry]:
    image_sizes = {kind: partial(_pixels, size=options.get("image_size", 32)) for kind, options in IMAGES.items()}
    tables = {
        **{
            f"image/{kind}": (
                _pixels if kind == "hiera" else image_sizes[kind],
                partial(_make, "AutoModelForImageClassification", kind, options),
            )
            for kind, options in IMAGES.items()
        },
        **{
            f"audio/{kind}": (_wave, partial(_make, "AutoModelForAudioClassification", kind, options))
            for kind, options in AUDIO.items()
        },
        **_others(),
    }
    tied, modes = {"captioner": "untie"}, {"audio/wav2vec2_random": "eval"}
    return [
        Entry(name, "transformers", make, inputs, name in QUICK, tied.get(name, "together"), modes.get(name, "train"))
        for name, (inputs, make) in tables.items()
    ]
