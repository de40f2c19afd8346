"""One model of the zoo, and how to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]
"""From a number of rows to a tuple of positional inputs, or a dict of keyword inputs; the same rows each time."""


@dataclass(frozen=True)
class Entry:
    """A model and its inputs.

    family: where it comes from, or what it does
    make:   builds it, from the current random state
    quick:  among those that the quick suite tests
    tied:   what the capture is told about shared parameters
    mode:   "eval" for a model that trains as it evaluates, since its training mode is no graph
    sizes:  batch sizes beside the four rows of the capture
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    quick: bool = False
    tied: str = "together"
    mode: str = "train"
    sizes: tuple[int, ...] = (3, 6)

    def model(self) -> nn.Module:
        """Always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def batch(self, rows: int) -> Any:
        return self.inputs(rows)


def generator(rows: int) -> torch.Generator:
    return torch.Generator().manual_seed(rows)


def images(size: int, channels: int = 3) -> Inputs:
    """(N, channels, size, size)"""
    return floats(channels, size, size)


def floats(*shape: int) -> Inputs:
    """(N, *shape)"""
    return lambda rows: (torch.randn(rows, *shape, generator=generator(rows)),)


def tokens(length: int, size: int = 99, low: int = 3) -> Callable[[int], Tensor]:
    """(N, length) indices of a vocabulary, clear of its special ones."""
    return lambda rows: torch.randint(low, size, (rows, length), generator=generator(rows))
