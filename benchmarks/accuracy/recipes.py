"""What is trained, on which rows and how, for every table: the papers' sizes, and quick ones for a processor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import models
from accuracy.data import Data

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params, rate, decay: torch.optim.Adam(params, rate, weight_decay=decay),
    "sgd": lambda params, rate, decay: torch.optim.SGD(params, rate, momentum=0.9, nesterov=True, weight_decay=decay),
}
SCHEDULES: dict[str, Callable[[Any, float, int], Any]] = {
    "one_cycle": lambda optimizer, rate, steps: OneCycleLR(optimizer, rate, total_steps=steps),
    "cosine": lambda optimizer, rate, steps: CosineAnnealingLR(optimizer, steps, eta_min=rate / 100),
    "constant": lambda optimizer, rate, steps: LambdaLR(optimizer, lambda step: 1.0),
}

CUTS = {
    "vgg": ("blocks.0", "blocks.1", "blocks.2"),
    "lstm": ("embedding", "layers.0", "layers.1"),
    "transformer": ("embedding", "layers.0", "layers.1"),
}
"""Of the papers: after each pooling, and after each layer of a text's network. Those of the ResNets are chosen."""


@dataclass(frozen=True)
class Recipe:
    """Equal for all methods that are compared.

    network:    "vgg", "resnet18", "resnet32", "lstm" or "transformer"
    dataset:    a name of `accuracy.data.NAMES`
    width:      of images: a factor for every layer; of texts: of the layers
    train_rows, test_rows: the first ones; None for all
    batch:      rows
    optimizer:  "sgd" (momentum 0.9, Nesterov) or "adam", of every stage and of backprop
    schedule:   of the learning rate, per batch: "one_cycle", "cosine" (to a hundredth) or "constant"
    augment:    crop and flip
    layers:     of LSTM and Transformer, beside the embedding
    words, length: of texts: the vocabulary's size, and the words that are kept of each
    heads:      of attention
    precision:  "float32", or "bfloat16" for mixed precision by autocast
    cut_at:     where to cut into as many stages as that makes; otherwise, and where empty, the compiler chooses
    """

    network: str
    dataset: str
    width: float
    train_rows: int | None
    test_rows: int | None
    epochs: int
    batch: int
    optimizer: str
    rate: float
    schedule: str
    decay: float = 0.0
    augment: bool = False
    layers: int = 3
    words: int = 30_000
    length: int = 256
    heads: int = 6
    precision: str = "float32"
    cut_at: tuple[str, ...] = ()

    def model(self, data: Data) -> nn.Module:
        """Its weights drawn from torch's default generator."""
        classes = data.num_classes
        if self.network in ("lstm", "transformer"):
            assert data.words is not None, f"{self.network} reads texts, not {data.name}"
            width, vocabulary = round(self.width), data.words
            if self.network == "lstm":
                return models.lstm(vocabulary, classes, width, self.layers)
            return models.transformer(vocabulary, classes, width, self.layers, self.heads)
        build = {"vgg": models.vgg, "resnet18": models.resnet18, "resnet32": models.resnet32}[self.network]
        return build(classes, data.train_x.shape[1], self.width)

    def make_optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](params, self.rate, self.decay)

    def make_schedule(self, optimizer: torch.optim.Optimizer, rows: int) -> Any:
        """rows: of an epoch."""
        return SCHEDULES[self.schedule](optimizer, self.rate, self.epochs * -(-rows // self.batch))


def _images(network: str, dataset: str = "cifar10", width: float = 1.0) -> Recipe:
    return Recipe(
        network, dataset, width, None, None, 200, 128, "sgd", 0.1, "one_cycle", 5e-4, augment=True,
        cut_at=CUTS.get(network, ()),
    )  # fmt: skip


def _texts(network: str, dataset: str = "imdb") -> Recipe:
    return Recipe(network, dataset, 300, None, None, 50, 128, "adam", 1e-3, "constant", cut_at=CUTS[network])


FULL = {
    "cifar10-vgg": _images("vgg"),
    "cifar10-resnet18": _images("resnet18"),
    "cifar10-resnet32": _images("resnet32"),
    "fashion_mnist-vgg": _images("vgg", "fashion_mnist"),
    "imdb-lstm": _texts("lstm"),
    "imdb-transformer": _texts("transformer"),
    "ag_news-lstm": _texts("lstm", "ag_news"),
    "ag_news-transformer": _texts("transformer", "ag_news"),
}
"""The papers' sizes, for a GPU."""


def _quick_images(network: str, width: float, dataset: str = "cifar10") -> Recipe:
    return Recipe(
        network, dataset, width, 10_000, None, 4, 128, "sgd", 0.1, "one_cycle", 5e-4, augment=True,
        precision="bfloat16", cut_at=CUTS.get(network, ()),
    )  # fmt: skip


def _quick_texts(network: str, dataset: str = "imdb") -> Recipe:
    return Recipe(
        network, dataset, 32, 10_000, 10_000, 4, 64, "adam", 2e-3, "one_cycle", words=10_000, length=80, heads=2,
        cut_at=CUTS[network],
    )  # fmt: skip


QUICK = {
    "cifar10-vgg": _quick_images("vgg", 0.125),
    "cifar10-resnet18": _quick_images("resnet18", 0.1875),
    "cifar10-resnet32": _quick_images("resnet32", 0.5),
    "fashion_mnist-vgg": _quick_images("vgg", 0.125, "fashion_mnist"),
    "imdb-lstm": _quick_texts("lstm"),
    "imdb-transformer": _quick_texts("transformer"),
    "ag_news-lstm": _quick_texts("lstm", "ag_news"),
    "ag_news-transformer": _quick_texts("transformer", "ag_news"),
}
"""Narrow networks, few rows and epochs: minutes on one core."""
