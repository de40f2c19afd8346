"""One training run of one method: all but the method is the same for all of them."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import autodecouple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare
from accuracy.data import Batch, Data
from accuracy.memory import kept_by, peak_bytes
from accuracy.recipes import Recipe

BACKPROP = "bp"


@dataclass(frozen=True)
class Result:
    """What one run gave.

    accuracy:   on the test rows after the last epoch: no epoch is chosen
    accuracies: after every epoch where that was asked for, else the last alone
    losses:     mean over the last epoch, of each stage
    seconds:    of training, without capture, tests and the step whose memory is measured; one stage after the other
    peak_bytes: of the second step, with weights, heads and states of optimizers (see `accuracy.memory`)
    head_share: of the heads in all FLOPs of training
    trained:    parameters, heads included; parameters: of the model alone
    """

    method: str
    n_stages: int
    seed: int
    accuracy: float
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    seconds: float
    peak_bytes: int
    head_share: float
    trained: int
    parameters: int


@dataclass
class Learner:
    """A model, and what trains it on a batch and gives the loss of each stage.

    number, seconds, peak_bytes: what it has seen and taken so far
    """

    model: nn.Module
    device: torch.device
    step: Callable[[Tensor, Tensor], Sequence[float]]
    optimizers: Sequence[Optimizer]
    head_share: float = 0.0
    number: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def epoch(self, batches: Iterator[Batch]) -> tuple[float, ...]:
        """The mean loss of each stage."""
        start = time.perf_counter()
        losses = [self._step(x, y) for x, y in batches]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return tuple(math.fsum(each) / len(losses) for each in zip(*losses, strict=True))

    def _step(self, x: Tensor, y: Tensor) -> Sequence[float]:
        self.number += 1
        if self.number != 2:  # the first one makes the states of the optimizers
            return self.step(x, y)
        kept = [*self.model.buffers(), *(tensor for each in self.optimizers for tensor in kept_by(each))]
        losses: list[float] = []
        start = time.perf_counter()
        self.peak_bytes = peak_bytes(lambda: losses.extend(self.step(x, y)), kept, self.device)
        self.seconds -= time.perf_counter() - start
        return losses


def train(
    recipe: Recipe,
    data: Data,
    method: str,
    n_stages: int = 4,
    seed: int = 0,
    *,
    each_epoch: bool = False,
    watch: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> Result:
    """Train a recipe's network from the same weights, on the same batches, as by any other method.

    method:     "bp" is a plain torch loop; else an objective, with fields where wished: "downstream:blocks=3"
    each_epoch: test after every epoch
    watch:      called once with the model, before its first step: for hooks of parameters, say
    options:    fields of the objective
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data.to(device)
    torch.manual_seed(seed)
    model = recipe.model(data).to(device, memory_format=torch.channels_last if data.train_x.ndim == 4 else None)
    n_stages = 1 if method == BACKPROP else n_stages
    with _learner(recipe, data, model, method, n_stages, seed, options) as learner:
        if watch is not None:
            watch(model)
        accuracies: list[float] = []
        losses: tuple[float, ...] = ()
        for batches in data.epochs(recipe.epochs, recipe.batch, seed, recipe.augment):
            losses = learner.epoch(batches)
            if each_epoch:
                accuracies.append(test(model, data))
    accuracies = accuracies or [test(model, data)]
    trained = sum(len_of(optimizer) for optimizer in learner.optimizers)
    costs = learner.seconds, learner.peak_bytes, learner.head_share, trained, sum(p.numel() for p in model.parameters())
    return Result(method, n_stages, seed, accuracies[-1], tuple(accuracies), losses, *costs)


def test(model: nn.Module, data: Data) -> float:
    """Share of the test rows that the model's own output gets right."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test_batches())
    model.train(was_training)
    return hits / len(data.test_y)


def len_of(optimizer: Optimizer) -> int:
    """Numbers that it trains."""
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])


@contextmanager
def _learner(
    recipe: Recipe, data: Data, model: nn.Module, method: str, n_stages: int, seed: int, options: dict[str, Any]
) -> Iterator[Learner]:
    if method == BACKPROP:
        yield _backprop(recipe, data, model)
        return
    _, objective = compare.method(method)
    assert objective is not None
    device = str(data.train_x.device)
    cut_at = recipe.cut_at if len(recipe.cut_at) == n_stages - 1 else ()
    with autodecouple.compile(
        model, n_stages, dataclasses.replace(objective, **options), example_inputs=data.train_x[: recipe.batch],
        optimizer=recipe.make_optimizer, scheduler=lambda of: recipe.make_schedule(of, len(data.train_y)),
        schedule="sequential", devices=[device], cut_at=cut_at, seed=seed,
    ) as decoupled:  # fmt: skip
        stages = decoupled.plan.stages
        share = sum(stage.head_flops for stage in stages) / sum(stage.flops for stage in stages)

        def step(x: Tensor, y: Tensor) -> Sequence[float]:
            with _precision(recipe, x.device):
                return [loss for loss in decoupled.train_step(x, y).losses if loss is not None]

        yield Learner(model, data.train_x.device, step, decoupled.optimizers, share)
        decoupled.synchronize()


def _backprop(recipe: Recipe, data: Data, model: nn.Module) -> Learner:
    optimizer = recipe.make_optimizer(model.parameters())
    scheduler = recipe.make_schedule(optimizer, len(data.train_y))
    model.train()

    def step(x: Tensor, y: Tensor) -> Sequence[float]:
        optimizer.zero_grad()
        with _precision(recipe, x.device):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return [loss.item()]

    return Learner(model, data.train_x.device, step, [optimizer])


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """For one step: what autocast has cast of the weights it keeps until it is left."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
