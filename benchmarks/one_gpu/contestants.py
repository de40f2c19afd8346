"""Who trains on the one device: backprop as it is, compiled and checkpointed, and autodecouple's stages on one lane.

A contestant is built from a network and gives functions: `step` trains on the next batch, or starts to, and `finish`
waits until the device has done it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import autodecouple
from tools.networks import Batch, Network, in_a_row, sgd

STAGES = (1, 2, 4, 8)
BACKENDS = ("eager", "compile", "cuda_graphs")
BASE = "backprop"


@dataclass(frozen=True)
class Running:
    """A contestant at work."""

    step: Callable[[], Any]
    finish: Callable[[], Any]
    close: Callable[[], Any]


@dataclass(frozen=True)
class Ground:
    """Where all train, and on what; compiler: the backend of torch.compile; look: what on_nonfinite is for ours."""

    device: torch.device
    network: Network
    compiler: str = "inductor"
    look: str = "ignore"

    def batches(self) -> list[Batch]:
        return [(x.to(self.device), y.to(self.device)) for x, y in self.network.batches()]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Build = Callable[[Ground], Running]


def backprop(ground: Ground, wrap: Callable[[Ground, nn.Module], Callable[..., Any]]) -> Running:
    """The loop as anybody would write it."""
    model = ground.network.build().to(ground.device)
    forward, criterion, optimizer = wrap(ground, model), nn.CrossEntropyLoss(), sgd(model.parameters())
    batches = itertools.cycle(ground.batches())

    def step() -> None:
        x, y = next(batches)
        criterion(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Running(step, ground.wait, lambda: None)


def plain(ground: Ground, model: nn.Module) -> Callable[..., Any]:
    return model


def compiled(ground: Ground, model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend=ground.compiler)


def checkpointed(ground: Ground, model: nn.Module) -> Callable[..., Any]:
    """The square root of the layers as segments: of each the input is kept, and the rest is computed again."""
    row = in_a_row(model)
    segments = max(1, round(len(row) ** 0.5))

    def forward(x: torch.Tensor) -> Any:
        return checkpoint_sequential(row, segments, x, use_reentrant=False)

    return forward


def decoupled(ground: Ground, n_stages: int, backend: str) -> Running:
    """All stages on one lane, which reads its losses a few batches late."""
    found = autodecouple.compile(
        ground.network.build().to(ground.device),
        n_stages,
        example_inputs=ground.batches()[0][0],
        optimizer=sgd,
        devices=[str(ground.device)],
        executor="streams",
        backend={"backend": ground.compiler} if backend == "compile" else backend,
        on_nonfinite=ground.look,
    )
    batches = itertools.cycle(ground.batches())
    return Running(lambda: found.train_step(*next(batches)), found.synchronize, found.close)


def contestants(stages: Sequence[int] = STAGES) -> dict[str, Build]:
    """By name, backprop first."""
    made: dict[str, Build] = {
        BASE: functools.partial(backprop, wrap=plain),
        "backprop_compiled": functools.partial(backprop, wrap=compiled),
        "backprop_checkpointed": functools.partial(backprop, wrap=checkpointed),
    }
    for backend, count in itertools.product(BACKENDS, stages):
        made[f"{backend}_{count}"] = functools.partial(decoupled, n_stages=count, backend=backend)
    return made
