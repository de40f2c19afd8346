"""The networks of the papers with batches of made-up data for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import models

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """A network of examples/models.py at a size, and what it is trained on.

    model:   makes it, with the same weights every time
    rows:    of a batch
    classes: of the targets
    row:     shape of one row: (C, H, W) of an image, (T,) of a text
    words:   the tokens of a text are 1 to words - 1: no padding; None for images
    """

    model: Callable[[], nn.Module]
    rows: int
    classes: int
    row: tuple[int, ...]
    words: int | None = None

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model()

    def batches(self, count: int = 4) -> list[Batch]:
        """(inputs, class indices (N,)), the same in every process."""
        chance = torch.Generator().manual_seed(1)
        return [(self._inputs(chance), self._target(chance)) for _ in range(count)]

    def _inputs(self, chance: torch.Generator) -> Tensor:
        shape = (self.rows, *self.row)
        if self.words is None:
            return torch.randn(shape, generator=chance)
        return torch.randint(1, self.words, shape, generator=chance)

    def _target(self, chance: torch.Generator) -> Tensor:
        return torch.randint(self.classes, (self.rows,), generator=chance)


def vgg(width: float = 1.0, rows: int = 128) -> Network:
    return Network(lambda: models.vgg(10, width=width), rows, 10, (3, 32, 32))


def resnet18(width: float = 1.0, rows: int = 128) -> Network:
    return Network(lambda: models.resnet18(10, width=width), rows, 10, (3, 32, 32))


def transformer(width: int = 300, layers: int = 3, length: int = 128, rows: int = 32) -> Network:
    words = 30_000
    return Network(lambda: models.transformer(words, 2, width, layers), rows, 2, (length,), words)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.001, momentum=0.9)


class MeanOfTokens(nn.Module):
    """Of a text (N, T, D) without padding: (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class MeanOfPixels(nn.Module):
    """Of an image (N, C, H, W): (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def in_a_row(model: nn.Module) -> nn.Sequential:
    """The network's own modules one after the other, as pipelines that cut an nn.Sequential want it.

    The same function, of texts without padding. A convolution, its norm and its activation stay together, since an
    activation in place may not begin a partition.
    """
    match model:
        case models.VGG():
            return nn.Sequential(*_units(model), nn.Flatten(1), *model.classifier)
        case models.ResNet():
            return nn.Sequential(model.stem, *model.blocks, MeanOfPixels(), model.classifier)
        case models.Transformer():
            return nn.Sequential(model.embedding, *model.layers, MeanOfTokens(), *model.classifier)
    raise TypeError(f"no row of layers is known for {type(model).__name__}")


def _units(model: models.VGG) -> list[nn.Module]:
    """Convolutions with norm and activation, and poolings."""
    units: list[nn.Module] = []
    for block in model.blocks:
        *convolutions, pooling = block
        pairs = zip(convolutions[::2], convolutions[1::2], strict=True)
        units += [*(nn.Sequential(*pair) for pair in pairs), pooling]
    return units
