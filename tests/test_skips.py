"""Cuts that several tensors with gradients cross: skip connections, a decoder beside its encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import assert_same, sgd, train

import autodecouple
from autodecouple.objectives import SupCon
from autodecouple.schedules import GPipe, OneFOneB, Sequential

SMALL = SupCon(hidden=8, out=4)


class UNet(nn.Module):
    """Two levels: at the bottom, both skips are under way beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.bottom = nn.Conv2d(6, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(14, 6, 3, padding=1), nn.Conv2d(10, 4, 3, padding=1)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x).relu()
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x).relu()
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1)).relu()
        y: Tensor = self.last(x.mean((2, 3)))
        return y


class Translator(nn.Module):
    """An encoder whose result every layer of the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.decoder = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.start, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory, y = x, self.start(x)
        for layer in self.encoder:
            memory = layer(memory).tanh()
        for layer in self.decoder:
            y = layer(torch.cat([y, memory], -1)).tanh()
        y = self.last(y.mean(1))
        return y


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...], list[str]]] = {
    "unet": (UNet, (1, 8, 8), ["down.1", "bottom", "up.0"]),
    "translator": (Translator, (5, 6), ["encoder.1", "decoder.0", "decoder.1"]),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]()


def batches(kind: str, sizes: tuple[int, ...] = (8, 8, 6)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = MODELS[kind][1]
    return [(torch.randn(n, *shape, generator=generator), torch.arange(n) % 3) for n in sizes]


def cut(kind: str, loss: Any = SMALL, **options: Any) -> autodecouple.Decoupled:
    example = (batches(kind)[0][0],)
    options = {"devices": ["cpu"] * 2, "cut_at": MODELS[kind][2], "optimizer": sgd, **options}
    return autodecouple.compile(model_of(kind), 4, loss, example_inputs=example, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_several_gradients_cross_and_are_stopped(kind: str) -> None:
    """Law 2: each parameter gets its gradient from the loss of its own stage, all of them from one."""
    with cut(kind, schedule="sequential") as decoupled:
        assert max(len(found.carrying) for found in decoupled.plan.cuts) > 1
        x, y = batches(kind)[0]
        values: dict[str, Any] = {node.name: x for node in decoupled.graph.train.graph.find_nodes(op="placeholder")}
        for stage in decoupled.stages:
            outputs = stage.code.body(*(values[name] for name in stage.code.inputs))
            made = values | dict(zip(stage.code.outputs, outputs, strict=True))
            assert stage.code.head is not None
            loss, _ = stage.code.head(*(made[name] for name in stage.code.head_inputs), y)
            gradients = torch.autograd.grad(loss, stage.parameters, allow_unused=True)
            assert all(g is not None for g in gradients), f"stage {stage.index}"
            values = {name: made[name] for name in stage.code.sends}
            crossing = [decoupled.stages[0].code.origin(name) for name in values]
            assert not any(values[name].requires_grad for name in values), crossing


@pytest.mark.parametrize("kind", MODELS)
def test_streaming_equals_sequential_bitwise(kind: str) -> None:
    sequential = train(cut(kind, schedule="sequential"), batches(kind))
    assert_same(train(cut(kind), batches(kind)), sequential)


@pytest.mark.parametrize(
    "schedule", [Sequential(), GPipe(num_micro_batches=2), OneFOneB(num_micro_batches=2)], ids=repr
)
@pytest.mark.parametrize("kind", MODELS)
def test_coupled_cuts_equal_backprop(kind: str, schedule: Any) -> None:
    """Law 4, with gradients that come back for every tensor that crossed, some of them past a stage in between."""
    plain = model_of(kind)
    optimizer = sgd(list(plain.parameters()))
    for x, y in batches(kind):
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with cut(kind, "bp", schedule=schedule) as decoupled:
        for x, y in batches(kind):
            decoupled.train_step(x, y)
        torch.testing.assert_close(dict(decoupled.model.named_parameters()), dict(plain.named_parameters()))
