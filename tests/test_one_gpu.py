"""What one device gains: the memory of the largest stage, and kernels that meet the memory and precision they like.

Seen on the processor: by what autograd keeps, by strides and types.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autodecouple
from autodecouple.api import default_optimizer
from autodecouple.executors.transport import CpuQueue
from autodecouple.passes.place import default_devices
from autodecouple.stage import Stage

pytestmark = pytest.mark.timeout(60)
ROWS, WIDTH, BLOCKS = 512, 48, 16


class Kept:
    """Bytes that autograd keeps for backwards, now and at most; what the caller owns aside."""

    def __init__(self, *owned: Tensor) -> None:
        self.now = self.peak = 0
        self._known = {x.untyped_storage()._cdata for x in owned}
        self._alive: set[int] = set()

    def save(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known | self._alive:
            self._alive.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)
        return x.detach()

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@contextmanager
def kept_for(parameters: Iterable[Tensor], x: Tensor) -> Iterator[Kept]:
    kept = Kept(x, *parameters)
    with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda saved: saved):
        yield kept


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 4))


def whole_model(x: Tensor, y: Tensor) -> int:
    model = perceptron()
    with kept_for(model.parameters(), x) as kept:
        nn.functional.cross_entropy(model(x), y).backward()
    return kept.peak


@pytest.mark.parametrize("how", [{"executor": "inline"}, {"executor": "streams"}, {"schedule": "sequential"}])
def test_one_lane_takes_the_memory_of_its_largest_stage(how: dict[str, str]) -> None:
    """Each stage's graph is gone before the next stage begins, also with batches waiting."""
    x, y = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % 4
    loss = autodecouple.EarlyExit(hidden=None)
    options: dict[str, Any] = {"devices": ["cpu"], **how}
    made = autodecouple.compile(perceptron(), 4, loss, example_inputs=x, **options)
    owned = [y, *(parameter for stage in made.stages for parameter in stage.parameters)]
    largest = max(stage.activation_bytes for stage in made.plan.stages)
    with made as decoupled, kept_for(owned, x) as kept:
        for _ in range(3):
            decoupled.train_step(x, y)
        decoupled.synchronize()
    assert kept.now == 0
    received = x.nbytes
    assert kept.peak <= 1.05 * (largest + received), "what heads save comes on top"
    assert kept.peak <= 0.55 * whole_model(x, y)


def test_one_gpu_is_one_lane_unless_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lanes hold the activations of several stages at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert default_devices() == ["cuda:0"]


class Images(nn.Module):
    """Convolutions that like channels last, with a residual and an activation in place behind each cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv, norm in zip(self.blocks, self.norms, strict=True):
            x = torch.relu_(norm(conv(x))) + x
        y: Tensor = self.last(x.mean((2, 3)))
        return y


@contextmanager
def arrivals(ndim: int = 4) -> Iterator[list[tuple[int, Tensor]]]:
    """Tensors of so many dimensions that reach a stage, with its index."""
    found: list[tuple[int, Tensor]] = []
    forward = Stage.forward

    def watched(stage: Stage, work: Any, micro_batch: int, received: Any, randomness: Any) -> Any:
        found.extend((stage.index, x) for x in received.values() if isinstance(x, Tensor) and x.ndim == ndim)
        return forward(stage, work, micro_batch, received, randomness)

    with mock.patch.object(Stage, "forward", watched):
        yield found


@pytest.mark.parametrize("executor", ["inline", "streams"])
@pytest.mark.parametrize("schedule", ["streaming", "micro_batched"])
@pytest.mark.parametrize("autocast", [False, True])
def test_memory_format_and_autocast_reach_behind_cuts(executor: str, schedule: str, autocast: bool) -> None:
    """As by hand: images stay channels_last, and under autocast cross in half the bytes; weights are as they were."""
    x = torch.randn(8, 3, 6, 6).to(memory_format=torch.channels_last)
    model = Images().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options: dict[str, Any] = {"devices": ["cpu"] * 2, "executor": executor, "schedule": schedule}
    region = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with autodecouple.compile(model, 3, example_inputs=x, **options) as decoupled, arrivals() as found, region:
        for _ in range(2):
            decoupled.train_step(x, torch.arange(8) % 4)
        decoupled.synchronize()
    behind = [value for index, value in found if index > 0]
    assert {index for index, _ in found} == {0, 1, 2} and behind
    assert all(value.is_contiguous(memory_format=torch.channels_last) for _, value in found)
    assert autocast in {value.dtype == torch.bfloat16 for value in behind}
    weights = [conv.weight for conv in model.blocks]
    assert all(w.is_contiguous(memory_format=torch.channels_last) and w.dtype == torch.float32 for w in weights)


def test_the_default_optimizer_is_one_kernel_on_a_gpu() -> None:
    """Fused for real numbers on a GPU only: torch decides elsewhere, and refuses others."""

    def asked(*params: Any) -> Any:
        with mock.patch.object(torch.optim, "Adam") as adam:
            default_optimizer(list(params))
        return adam.call_args.kwargs["fused"]

    def parameter(is_cuda: bool, is_real: bool = True) -> Any:
        return SimpleNamespace(is_cuda=is_cuda, is_floating_point=lambda: is_real)

    assert asked(parameter(True), parameter(True)) is True
    assert asked(parameter(True), parameter(False)) is None
    assert asked(parameter(True, False)) is None
    assert isinstance(default_optimizer([nn.Parameter(torch.ones(2))]), torch.optim.Adam)


def test_a_lane_holds_only_what_comes_from_elsewhere() -> None:
    """What a stage made itself comes back to its own stream, in order; holding it until an event costs memory."""
    held: list[set[int]] = []
    x, y = torch.randn(ROWS, WIDTH), torch.arange(ROWS) % 4
    made = autodecouple.compile(perceptron(), 3, example_inputs=x, devices=["cpu"], schedule="sequential")
    with (
        mock.patch.object(CpuQueue, "keep", lambda self, values: held.append(_places(values))),
        arrivals(ndim=2) as found,
        made as decoupled,
    ):
        decoupled.train_step(x, y)
    assert held == [_places({"x": x}) for _, x in found]


def _places(values: dict[str, Tensor]) -> set[int]:
    return {value.data_ptr() for value in values.values()}
