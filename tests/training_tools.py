"""Small models that are captured once per session, and what tests of training compare."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import autodecouple
from autodecouple import pipeline
from autodecouple.decoupled import Decoupled
from autodecouple.executors.job import Job
from autodecouple.plans import TensorSpec
from autodecouple.schedules.actions import Action

CLASSES = 4
NUM_BLOCKS = 6
Batch = tuple[Tensor, Tensor]


def _conv_block(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def make_model(kind: str) -> nn.Sequential:
    """Six blocks and a classifier.

    "dropout" and "norm": convolutions with BatchNorm, with and without dropout, on (N, 1, 4, 4); "plain": float64
    perceptron without either, on (N, 5)
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "plain":
            blocks = [nn.Sequential(nn.Linear(6 if i else 5, 6), nn.Tanh()) for i in range(NUM_BLOCKS)]
            return nn.Sequential(*blocks, nn.Linear(6, CLASSES)).double()
        dropout = {"dropout": 0.2, "norm": 0.0}[kind]
        convs = [_conv_block(4 if i else 1, 4, dropout) for i in range(NUM_BLOCKS)]
        return nn.Sequential(*convs, Mean(), nn.Linear(4, CLASSES))


def make_batches(kind: str, sizes: Sequence[int], seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = ((5,), torch.float64) if kind == "plain" else ((1, 4, 4), torch.float32)
    return [
        (
            torch.randn(rows, *shape, generator=generator, dtype=dtype),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for rows in sizes
    ]


@dataclass(frozen=True)
class Captured:
    model: nn.Sequential
    initial: dict[str, Tensor]
    found: Any


@functools.cache
def _captured(kind: str) -> Captured:
    """Capturing takes most of the time of a compilation, and gives the same every time."""
    model = make_model(kind)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    return Captured(model, initial, pipeline.analyse(model, (make_batches(kind, [8])[0][0],)))


def compiled(kind: str, n_stages: int, loss: Any = "supcon", *, lanes: int | None = None, **options: Any) -> Decoupled:
    """A new pipeline on the captured model, with its initial weights: one at a time per kind.

    In memory of its own, since a pipeline of processes leaves the model in memory that forks share: ranks forked later
    once wrote over each other's statistics.
    """
    captured = _captured(kind)
    for name, tensor in captured.model.state_dict(keep_vars=True).items():
        tensor.data = captured.initial[name].clone()
    captured.model.zero_grad(set_to_none=True)
    captured.model.train()
    options.setdefault("devices", ["cpu"] * (n_stages if lanes is None else lanes))
    options.setdefault("example_inputs", ())
    with mock.patch.object(pipeline, "analyse", lambda *given: captured.found):
        return autodecouple.compile(captured.model, n_stages, loss, **options)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Result:
    """All that training left behind: losses and outputs per batch, and the state under everybody's own names."""

    losses: list[tuple[float | None, ...]]
    outputs: list[Any]
    state: dict[str, Any]


def train(decoupled: Decoupled, batches: Sequence[Batch]) -> Result:
    """Feed all batches before anything is read, then close."""
    with decoupled:
        steps = [decoupled.train_step(x, y) for x, y in batches]
        decoupled.synchronize()
        state = decoupled.state_dict()
        return Result([step.losses for step in steps], [step.output for step in steps], comparable(state))


def comparable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the plan, whose lanes may differ, and the random state, which is the process's."""
    return {name: value for name, value in state.items() if name not in ("plan", "random")}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, in all parts; NaN equals NaN."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.shape == b.shape, where
        assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()), where
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, Result):
        assert_same(vars(a), vars(b), where)
    elif isinstance(a, Mapping):
        assert set(a) == set(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} != {b!r}"


@contextlib.contextmanager
def before_actions(hook: Callable[[Job, Action], None]) -> Iterator[None]:
    """Call a hook, in the worker, before every action."""
    perform = Job.perform

    def hooked(job: Job, action: Action, stage: Any, queue: Any) -> None:
        hook(job, action)
        perform(job, action, stage, queue)

    with mock.patch.object(Job, "perform", hooked):
        yield


def hold_until(go: threading.Event) -> Callable[[Job, Action], None]:
    """A hook that holds every action until it may go on."""

    def hold(job: Job, action: Action) -> None:
        assert go.wait(20)

    return hold


def delays(seed: int, longest: float = 0.003) -> contextlib.AbstractContextManager[None]:
    """Every second action, or so, starts late."""
    chance = random.Random(seed)

    def wait(job: Job, action: Action) -> None:
        if chance.random() < 0.5:
            time.sleep(chance.random() * longest)

    return before_actions(wait)


class EncodingHead(nn.Module):
    """Compares the features with an encoding of the signal that it learns, and passes the encoding on."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.project = nn.Linear(width, num_classes)
        self.encode = nn.Linear(num_classes, num_classes)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        known = signal if signal.is_floating_point() else nn.functional.one_hot(signal, self.num_classes).float()
        encoded = self.encode(known).tanh()
        pooled = features.flatten(2).mean(2) if features.ndim > 2 else features
        return (self.project(pooled) - encoded).square().mean(), encoded


@dataclass(frozen=True)
class Encoding:
    """A toy objective whose heads pass on a signal of their own."""

    name = "encoding"
    encodes = True

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        assert signal.num_classes is not None
        return EncodingHead(features.shape[1], signal.num_classes)
