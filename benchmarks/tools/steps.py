"""A training step as a function without arguments, and how long one takes."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import autodecouple
from autodecouple.executors import Step as Running
from tools.networks import Batch, sgd

Step = Callable[[], Any]
"""Trains on the next batch, or starts to and waits for an earlier one."""


def seconds_per_batch(step: Step, warm_up: int, batches: int) -> float:
    """Seconds of one step in the steady state: between the ends of the last step of the warm-up and of the last."""
    for _ in range(warm_up):
        step()
    start = time.perf_counter()
    for _ in range(batches):
        step()
    return (time.perf_counter() - start) / batches


def backprop(model: nn.Module, batches: Sequence[Batch], micro_batches: int = 1) -> Step:
    """The loop as anybody would write it; micro-batches add up their gradients before one update."""
    optimizer, criterion, stream = sgd(model.parameters()), nn.CrossEntropyLoss(), itertools.cycle(batches)

    def step() -> None:
        x, y = next(stream)
        for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (criterion(model(part_x), part_y) * (len(part_y) / len(y))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoupled(found: autodecouple.Decoupled, batches: Sequence[Batch], behind: int = 4) -> Step:
    """The loop that keeps the pipeline full: it reads the losses of a few batches ago, and so waits for those.

    caller   s0 s1 s2 s3 s4 s5 s6        step 6 returns when batch 2 is trained on every stage: a pipeline that
    lane 1         b0 b1 b2 ...          takes batches faster than it trains them gains nothing in the measurement
    """
    stream, running = itertools.cycle(batches), deque[Running]()

    def step() -> None:
        running.append(found.train_step(*next(stream)))
        if len(running) > behind:
            _ = running.popleft().losses

    return step


def train(found: autodecouple.Decoupled, batches: Sequence[Batch], count: int) -> int:
    """Train on so many batches to their end; returns the number of the first of them."""
    stream = itertools.cycle(batches)
    running = [found.train_step(*next(stream)) for _ in range(count)]
    found.synchronize()
    return running[0].batch
