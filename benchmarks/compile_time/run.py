"""How long capture, plan and code of large networks take: BERT-base and ResNet-152 with random weights.

python benchmarks/compile_time/run.py [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from zoo.ops import torchvision, transformers

import autodecouple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name, make in {"bert-base": bert, "resnet152": resnet152}.items():
        rounds = [measure(*make()) for _ in range(args.rounds)]
        medians = {step: statistics.median(found[step] for found in rounds) for step in rounds[0]}
        results[name] = medians
        total = medians["capture"] + medians["plan"] + medians["build"]
        steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in medians.items())
        print(f"{name}: {total:.1f} s from the model to its stages ({steps})", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def bert() -> tuple[nn.Module, Any]:
    tokens = torch.randint(1000, (8, 128))
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def resnet152() -> tuple[nn.Module, Any]:
    return torchvision.models.resnet152(), (torch.randn(8, 3, 224, 224),)


def measure(model: nn.Module, example: Any) -> dict[str, float]:
    """Seconds of each step; "plan again" is another number of stages from the same capture."""
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[step] = time.perf_counter() - start
        return found

    graph = timed("capture", lambda: autodecouple.capture(model, example))
    timed("plan", lambda: autodecouple.plan(graph, n_stages=4))
    decoupled = timed("build", lambda: autodecouple.compile(graph, 4, devices=["cpu"], schedule="sequential"))
    timed("plan again", lambda: autodecouple.plan(graph, n_stages=8))
    decoupled.close()
    return seconds


if __name__ == "__main__":
    main()
