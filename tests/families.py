"""Three families of small models in four blocks each, captured once; the same models block by block, by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import autodecouple
from autodecouple.graph import Graph

CLASSES = 4
VOCABULARY = 20


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def cnn(dropout: float = 0.1) -> nn.Module:
    """Four blocks with BatchNorm and dropout, on (N, 3, 8, 8)."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.Dropout(dropout))

    return nn.Sequential(block(3, 8, 1), block(8, 8, 1), block(8, 8, 2), block(8, 8, 1), Mean(), nn.Linear(8, CLASSES))


class LSTM(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.layers = nn.ModuleList(nn.LSTM(12, 12, batch_first=True) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        out: Tensor = self.out(x.mean(1))
        return out


class Transformer(nn.Module):
    """With padding, which a mask tells of."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        layers = [nn.TransformerEncoderLayer(12, 2, 16, dropout, batch_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        out: Tensor = self.out(x.masked_fill(padding.unsqueeze(2), 0).mean(1))
        return out


FAMILIES: dict[str, Callable[..., nn.Module]] = {"cnn": cnn, "lstm": LSTM, "transformer": Transformer}
LAYERS = ("embed", "layers.0", "layers.1", "layers.2")
BLOCKS = {"cnn": ("0", "1", "2", "3"), "lstm": LAYERS, "transformer": LAYERS}
"""Cut after each but the last there are four stages."""


def batch(family: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows whose class can be told: by a shift of the image, by the tokens that are frequent."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    if family == "cnn":
        return torch.randn(rows, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1) - 1.5, y
    tokens = torch.randint(4, (rows, 9), generator=generator) + 4 * y.unsqueeze(1) + 1
    lengths = torch.randint(5, 10, (rows, 1), generator=generator)
    return tokens.masked_fill(torch.arange(9) >= lengths, 0), y


def exact_batch(family: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """In float64."""
    x, y = batch(family, rows, seed)
    return x.double() if x.is_floating_point() else x, y


@functools.cache
def captured(family: str, exact: bool = False) -> tuple[Graph, dict[str, Tensor]]:
    """The capture and the initial weights; exact: in float64, and without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = FAMILIES[family](0.0).double() if exact else FAMILIES[family]()
        graph = autodecouple.capture(model, ((exact_batch if exact else batch)(family, 8, 0)[0],))
    return graph, copy.deepcopy(graph.model.state_dict())


def compiled(
    family: str, loss: Any, schedule: Any = "sequential", lanes: int = 1, exact: bool = False, **options: Any
) -> Any:
    """Four stages on the captured model with its initial weights: one at a time per family."""
    graph, initial = captured(family, exact)
    graph.model.load_state_dict(initial)
    graph.model.zero_grad(set_to_none=True)
    options = {"devices": ["cpu"] * lanes, "cut_at": BLOCKS[family][:-1], **options}
    return autodecouple.compile(graph, len(options["cut_at"]) + 1, loss, schedule=schedule, **options)


@dataclass(frozen=True)
class ByHand:
    """A model of a family, walked block by block with the user's own modules."""

    family: str
    model: nn.Module

    def block(self, name: str, h: Tensor, entered: Tensor) -> Tensor:
        """What comes behind a block of what comes before it; entered: what the model was given."""
        module = self.model.get_submodule(name)
        if name == "embed" or self.family == "cnn":
            return module(h)
        return module(h)[0] if self.family == "lstm" else module(h, src_key_padding_mask=entered == 0)

    def end(self, h: Tensor, entered: Tensor) -> Tensor:
        """The scores, from what the last block gave."""
        if self.family == "cnn":
            return self.model.get_submodule("5")(h.mean((2, 3)))
        kept = h.masked_fill((entered == 0).unsqueeze(2), 0) if self.family == "transformer" else h
        return self.model.get_submodule("out")(kept.mean(1))

    def mask(self, entered: Tensor) -> Tensor | None:
        """Tokens that count, where the model knows that some do not."""
        return entered != 0 if self.family == "transformer" else None
