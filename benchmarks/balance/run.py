"""How well known networks are balanced in four stages, at their full size, on fake tensors.

python benchmarks/balance/run.py [--only REGEX] [--stages 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from zoo.ops import transformers

import autodecouple
from autodecouple.targets import load

IMAGES = ((8, 3, 224, 224), "float32")
TOKENS = ((8, 128), "int64")
TORCHVISION = [
    "alexnet",
    "vgg11",
    "vgg16_bn",
    "resnet18",
    "resnet50",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_1_6gf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
]
TIMM = [
    "deit_small_patch16_224",
    "mixer_b16_224",
    "resnetv2_50",
    "hrnet_w18",
    "crossvit_tiny_240",
    "tnt_s_patch16_224",
    "nasnetalarge",
    "poolformer_s12",
    "coat_lite_tiny",
    "xcit_tiny_12_p16_224",
]
TRANSFORMERS = ["bert", "roberta", "distilbert", "electra", "albert", "mpnet", "deberta-v2"]
LANGUAGE_MODELS = ["gpt2", "opt", "gpt_neo", "gpt_neox", "llama", "bart", "t5"]


def main() -> None:
    args = parse()
    rows = []
    for name, example in networks():
        if re.search(args.only, name):
            rows.append(row := measure(name, example, args))
            print(f"{row['network']:36} {row['balance'] or '-':>6}  {row['note']}", flush=True)
    found = [row["balance"] for row in rows if row["balance"]]
    print(f"\nmedian {statistics.median(found):.3f}; at least 0.85: {sum(b >= 0.85 for b in found)} of {len(found)}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def networks() -> list[tuple[str, tuple[tuple[int, ...], str]]]:
    return [
        *((f"torchvision:{name}", ((8, 3, 299, 299), "float32") if "v3" in name and "ince" in name else IMAGES)
          for name in TORCHVISION),
        *((f"timm:{name}", ((8, 3, 240, 240), "float32") if "240" in name else IMAGES) for name in TIMM),
        *((f"hf:{name}", TOKENS) for name in TRANSFORMERS),
        *((f"lm:{name}", TOKENS) for name in LANGUAGE_MODELS),
    ]  # fmt: skip


def language_model(name: str) -> nn.Module:
    """One that says the next token, or for an encoder with a decoder the decoder's, without weights.

    What these networks do for classes looks for the last token, which only real data have.
    """
    config = transformers.CONFIG_MAPPING[name]()
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind).from_config(config)
    return model


def measure(name: str, example: tuple[tuple[int, ...], str], args: argparse.Namespace) -> dict[str, Any]:
    """The optimum over the legal cuts, and what takes most of the slowest stage."""
    shape, dtype = example
    values = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    model = language_model(name[3:]) if name.startswith("lm:") else load(name, weightless=True)
    names = ["input_ids", *["decoder_input_ids"] * name.endswith(("bart", "t5"))]
    inputs = dict.fromkeys(names, values) if name.startswith("lm:") else (values,)
    try:
        plan = autodecouple.plan(model, inputs, args.stages, tied="untie", devices=["cpu"])
    except Exception as error:
        return {"network": name, "balance": None, "note": str(error).splitlines()[0][:120]}
    slow = plan.bottleneck
    note = f"slowest: stage {slow.index}, {slow.costliest_node} takes {slow.costliest_flops / slow.flops:.0%} of it"
    return {"network": name, "balance": round(plan.balance, 3), "note": note}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
