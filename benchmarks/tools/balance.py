"""Partitions for pipelines that do not find their own: the best split of a row of layers by measured time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def balance(row: nn.Sequential, x: Tensor, parts: int, repeats: int = 3) -> list[int]:
    """Layers in each part, by the median of their times on a batch (inputs)."""
    rounds = [layer_seconds(row, x) for _ in range(repeats)]
    return best_split([statistics.median(found) for found in zip(*rounds, strict=True)], parts)


def best_split(times: Sequence[float], parts: int) -> list[int]:
    """Sizes of contiguous parts, such that the slowest takes the least time; every split is tried."""
    inner = itertools.combinations(range(1, len(times)), parts - 1)
    ends = min(((0, *cuts, len(times)) for cuts in inner), key=lambda ends: _slowest(times, ends))
    return [stop - start for start, stop in itertools.pairwise(ends)]


def _slowest(times: Sequence[float], ends: Sequence[int]) -> float:
    return max(sum(times[start:stop]) for start, stop in itertools.pairwise(ends))


def layer_seconds(row: nn.Sequential, x: Tensor) -> list[float]:
    """Forward and backward of each layer, alone."""
    found = []
    for layer in row:
        x = x.detach().requires_grad_(bool(found) and x.is_floating_point())  # the first has no input to send back to
        start = time.perf_counter()
        out = layer(x)
        out.backward(torch.ones_like(out))
        found.append(time.perf_counter() - start)
        x = out
    row.zero_grad()
    return found
