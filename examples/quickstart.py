"""Train a small network in four stages that never wait for each other's gradients, beside plain backprop.

python examples/quickstart.py                     seconds on a CPU; the data are scikit-learn's handwritten digits
python examples/quickstart.py --out DIR           also writes plan.html, timeline.svg and trace.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that wait should sleep: awake, they take the time from those that compute wherever other work goes on.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

import autodecouple
import data
import models
from autodecouple.view.html import page
from autodecouple.view.svg import draw
from autodecouple.view.trace import trace_events

BATCH_SIZE = 64
Batches = torch.utils.data.DataLoader[tuple[torch.Tensor, torch.Tensor]]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    split = data.digits()
    print(f"digits: {len(split.train_x)} training images of 8x8 pixels, {len(split.test_x)} test images\n")

    # An ordinary network; nothing in it knows of stages. compile() finds where to cut it.
    model = network(args.seed)
    with autodecouple.compile(
        model, n_stages=args.stages, loss=args.loss, example_inputs=split.train_x[:BATCH_SIZE], seed=args.seed,
        optimizer=adam, scheduler=annealing(args.epochs, split), devices=["cpu"] * torch.get_num_threads(),
    ) as decoupled:  # fmt: skip
        print(f"{decoupled.plan}\n")
        seconds = train_decoupled(decoupled, loader(split, args.seed), args.epochs)
        timeline = last_epoch(decoupled.timeline, len(loader(split, args.seed)))
    rival = network(args.seed)
    rival_seconds = train_backprop(rival, loader(split, args.seed), args.epochs, annealing(args.epochs, split))

    print(f"\n{'':20}  test accuracy  seconds")
    for name, trained, spent, place in (
        (f"{args.stages} stages, {args.loss}", model, seconds, f"{timeline.num_lanes} lanes"),
        ("backprop", rival, rival_seconds, f"{torch.get_num_threads()} threads"),
    ):
        print(f"{name:20}  {accuracy(trained, split):13.1%}  {spent:7.1f}  on {place}")

    batches = len({span.batch for span in timeline.spans})
    predicted = autodecouple.simulate(decoupled.plan, batches=batches, cost=timeline)
    print(f"\nThe last epoch as it was measured:\n\n{timeline}")
    print(f"predicted from these medians: {predicted.makespan * 1e3:.0f} ms, bubble {predicted.bubble:.0%}\n")
    if args.out is None:
        print("--out DIR writes the plan (plan.html), this timeline (timeline.svg) and a Perfetto trace (trace.json)")
    else:
        write(args.out, decoupled.plan, timeline)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--loss", default="supcon", choices=["supcon", "deinforeg", "early_exit"])
    parser.add_argument("--out", type=Path, metavar="DIR", help="write drawings and a trace into this folder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.residual_cnn(num_classes=10)


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def annealing(epochs: int, split: data.Split) -> Callable[[torch.optim.Optimizer], Any]:
    steps = epochs * len(loader(split, seed=0))
    return lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)


def loader(split: data.Split, seed: int) -> Batches:
    shuffling = torch.Generator().manual_seed(seed)
    return data.batches(split.train_x, split.train_y, BATCH_SIZE, shuffle=True, generator=shuffling)


def train_decoupled(decoupled: autodecouple.Decoupled, batches: Batches, epochs: int) -> float:
    """The usual loop is the pipeline: train_step returns at once, and the stages work on different batches."""
    start = time.perf_counter()
    for epoch in range(epochs):
        for x, y in batches:
            step = decoupled.train_step(x, y)
        losses = "  ".join(f"{loss:6.3f}" for loss in step.losses)  # reading them waits for this batch
        print(f"epoch {epoch + 1}: losses of the stages {losses}")
    decoupled.synchronize()
    return time.perf_counter() - start


def train_backprop(model: nn.Module, batches: Batches, epochs: int, scheduler: Callable[[Any], Any]) -> float:
    """The same network, optimizer, batches and epochs, with one loss at the end."""
    optimizer, criterion = adam(list(model.parameters())), nn.CrossEntropyLoss()
    schedule = scheduler(optimizer)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in batches:
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, split: data.Split) -> float:
    return (model.eval()(split.test_x).argmax(1) == split.test_y).float().mean().item()


def last_epoch(timeline: autodecouple.Timeline, num_batches: int) -> autodecouple.Timeline:
    first = max(span.batch for span in timeline.spans) - num_batches + 1
    spans = tuple(span for span in timeline.spans if span.batch >= first)
    return dataclasses.replace(timeline, spans=spans)


def write(folder: Path, plan: autodecouple.Plan, timeline: autodecouple.Timeline) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.html").write_text(page(plan), encoding="utf-8")
    (folder / "timeline.svg").write_text(draw(timeline), encoding="utf-8")
    (folder / "trace.json").write_text(json.dumps(trace_events(timeline)), encoding="utf-8")
    print(f"wrote plan.html, timeline.svg and trace.json (for ui.perfetto.dev) into {folder}")


if __name__ == "__main__":
    main()
