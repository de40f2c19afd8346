"""A small GPT-2 on plain text: the loss of local objectives beside backprop's.

python benchmarks/language/run.py [--methods bp downstream early_exit] [--steps 200] [--json FILE]

The text is the reference of the Python language that the standard library carries, letter by letter. Every method has
the same initial weights, batches, optimizer and learning rates.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

import autodecouple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from zoo.ops import transformers

LENGTH, ROWS, TESTS = 64, 16, 20


@dataclass(frozen=True)
class Result:
    """loss: nats per letter on text held out; seconds: of training, on one thread; share: heads' part of the FLOPs."""

    method: str
    loss: float
    seconds: float
    share: float


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["bp", "downstream", "early_exit"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    letters, codes = text()
    results = []
    for method in args.methods:
        torch.manual_seed(args.seed)
        model = gpt(letters, args.layers, args.width)
        results.append(run(method, model, codes, args.steps, args.stages))
        print(results[-1], flush=True)
    print(f"\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2), encoding="utf-8")
    return results


def text() -> tuple[int, Tensor]:
    """The number of different letters, and the whole text in their numbers."""
    whole = "\n".join(pydoc_data.topics.topics.values())
    letters = {letter: index for index, letter in enumerate(sorted(set(whole)))}
    return len(letters), torch.tensor([letters[letter] for letter in whole])


def gpt(letters: int, layers: int, width: int) -> nn.Module:
    sizes = {"vocab_size": letters, "n_positions": LENGTH, "n_embd": width, "n_layer": layers, "n_head": 4}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # a text is seen less than once
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, tie_word_embeddings=False))


def batches(codes: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows (N, T) at random places, and the letters that follow each of theirs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(codes) - LENGTH - 1, (ROWS,), generator=generator)
        windows = torch.stack([codes[start : start + LENGTH + 1] for start in starts])
        yield windows[:, :-1], windows[:, 1:]


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3)


def run(method: str, model: nn.Module, codes: Tensor, steps: int, stages: int) -> Result:
    """Train on the first nine tenths of the text, test on the last."""
    held_out = len(codes) // 10
    train, test = codes[:-held_out], codes[-held_out:]

    def scheduler(of: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(of, 3e-3, total_steps=steps + 1)

    learn = backprop if method == "bp" else decoupled
    seconds, share = learn(method, model, batches(train, steps, 1), scheduler, stages)
    return Result(method, evaluate(model, test), seconds, share)


Scheduler = Callable[[torch.optim.Optimizer], OneCycleLR]


def backprop(
    method: str, model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], scheduler: Scheduler, stages: int
) -> tuple[float, float]:
    model.train()
    update = optimizer(list(model.parameters()))
    rate = scheduler(update)
    start = time.perf_counter()
    for x, y in data:
        update.zero_grad()
        F.cross_entropy(model(x).logits.transpose(1, 2), y).backward()
        update.step()
        rate.step()
    return time.perf_counter() - start, 0.0


def decoupled(
    method: str, model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], scheduler: Scheduler, stages: int
) -> tuple[float, float]:
    x, _ = next(batches(torch.arange(2 * LENGTH) % 7, 1, 0))
    how = {"optimizer": optimizer, "scheduler": scheduler, "schedule": "sequential", "devices": ["cpu"]}
    with autodecouple.compile(model, stages, method, example_inputs=x, **how) as pipeline:
        start = time.perf_counter()
        for x, y in data:
            pipeline.train_step(x, y)
        pipeline.synchronize()
        seconds = time.perf_counter() - start
        flops = [(stage.head_flops, stage.flops) for stage in pipeline.plan.stages]
        print(pipeline.plan)
    return seconds, sum(head for head, _ in flops) / sum(total for _, total in flops)


def evaluate(model: nn.Module, codes: Tensor) -> float:
    """Nats per letter."""
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x).logits.transpose(1, 2), y).item() for x, y in batches(codes, TESTS, 2)]
    return math.fsum(losses) / len(losses)


def table(results: list[Result]) -> str:
    lines = [f"| `{r.method}` | {r.loss:.3f} | {r.seconds:.0f} | {r.share:.0%} |" for r in results]
    return "\n".join(["| method | loss | seconds | heads' share of FLOPs |", "|---|---:|---:|---:|", *lines])


if __name__ == "__main__":
    main()
