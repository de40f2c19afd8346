"""How much faster two CPU lanes train the same stages than one thread does, one stage after the other.

python benchmarks/two_lanes/run.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autodecouple

LANES = 2
WAYS = ("inline", "streams", "backprop")


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # of inline and backprop, and of each lane
    x = torch.randn(args.batch_size, args.width, generator=torch.Generator().manual_seed(0))
    y = torch.randint(10, (args.batch_size,), generator=torch.Generator().manual_seed(1))
    models = {way: network(args) for way in WAYS}
    with decoupled(models["inline"], args, x, "inline") as inline, decoupled(
        models["streams"], args, x, "streams"
    ) as streams:  # fmt: skip
        print(inline.plan, "\n")
        trainers = {"inline": stages(inline), "streams": stages(streams), "backprop": backprop(models["backprop"])}
        rounds = measure(trainers, x, y, args)
        outcome = summary(rounds, inline.plan, args)
        outcome["equal_parameters"] = same(inline.model, streams.model)
    print(report(outcome))
    if args.json:
        args.json.write_text(json.dumps(outcome | {"rounds": rounds}, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2, help="of each stage")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="of each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def network(args: argparse.Namespace) -> nn.Module:
    """Layers of one width, so that stages of equal cost exist."""
    torch.manual_seed(0)
    layers = [(nn.Linear(args.width, args.width), nn.ReLU()) for _ in range(args.stages * args.layers)]
    return nn.Sequential(*(layer for pair in layers for layer in pair), nn.Linear(args.width, 10))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01)


def decoupled(model: nn.Module, args: argparse.Namespace, x: torch.Tensor, executor: str) -> autodecouple.Decoupled:
    """A linear classifier as head: what is measured is the pipeline."""
    loss = autodecouple.EarlyExit(hidden=None)
    return autodecouple.compile(
        model, args.stages, loss, example_inputs=x, optimizer=sgd, devices=["cpu"] * LANES, executor=executor
    )


Train = Callable[[torch.Tensor, torch.Tensor, int], None]
"""Trains on a batch (inputs, target) so many times."""


def stages(found: autodecouple.Decoupled) -> Train:
    def train(x: torch.Tensor, y: torch.Tensor, batches: int) -> None:
        for _ in range(batches):
            found.train_step(x, y)
        found.synchronize()

    return train


def backprop(model: nn.Module) -> Train:
    optimizer, criterion = sgd(list(model.parameters())), nn.CrossEntropyLoss()

    def train(x: torch.Tensor, y: torch.Tensor, batches: int) -> None:
        for _ in range(batches):
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def measure(
    trainers: dict[str, Train], x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Seconds per batch of each way, in turns, so that whatever else the machine does meets all of them."""
    for train in trainers.values():
        train(x, y, 3)
    return [
        {way: seconds(train, x, y, args.batches) / args.batches for way, train in trainers.items()}
        for _ in range(args.rounds)
    ]


def seconds(train: Train, x: torch.Tensor, y: torch.Tensor, batches: int) -> float:
    start = time.perf_counter()
    train(x, y, batches)
    return time.perf_counter() - start


def summary(rounds: list[dict[str, float]], plan: autodecouple.Plan, args: argparse.Namespace) -> dict[str, Any]:
    ratios = [found["inline"] / found["streams"] for found in rounds]
    return {
        "seconds_per_batch": {way: statistics.median(found[way] for found in rounds) for way in WAYS},
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "limit": limit(plan, args.batches),
        "balance": plan.balance,
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__},
    }


def limit(plan: autodecouple.Plan, batches: int) -> float:
    """What the schedule allows, filling and draining included, if a lane lost nothing to the other."""
    one_by_one, streamed = (autodecouple.simulate(plan, rule, batches).makespan for rule in ("sequential", "streaming"))
    return one_by_one / streamed


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def report(outcome: dict[str, Any]) -> str:
    times, (low, high) = outcome["seconds_per_batch"], outcome["ratios"]
    lines = [f"{way:9} {times[way] * 1e3:8.1f} ms a batch" for way in WAYS]
    lines.append(f"streaming on {LANES} lanes is {outcome['ratio']:.2f}x as fast as inline ({low:.2f} to {high:.2f})")
    lines.append(f"the schedule allows {outcome['limit']:.2f}x")
    lines.append(f"parameters after it: {'equal to the last bit' if outcome['equal_parameters'] else 'DIFFERENT'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
