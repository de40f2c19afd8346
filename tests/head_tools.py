"""Heads by hand: specs from tensors, and formulas written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autodecouple.graph import dtype_name
from autodecouple.objectives import Objective
from autodecouple.plans import TensorSpec


def spec(name: str, x: Tensor, num_classes: int | None = None, batch_dim: int = 0) -> TensorSpec:
    return TensorSpec(name, tuple(x.shape), dtype_name(x.dtype), batch_dim, num_classes)


def head_for(objective: Objective, x: Tensor, y: Tensor, num_classes: int | None = 5, batch_dim: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return objective.head(spec("h", x, batch_dim=batch_dim), spec("target", y, num_classes))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, num: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(num, shape, generator=torch.Generator().manual_seed(seed))


def gradient_at(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = x.detach().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def cross_entropy_by_hand(logits: Tensor, labels: list[int]) -> float:
    rows = [(row, label) for row, label in zip(logits.tolist(), labels, strict=True) if label >= 0]
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / max(1, len(rows))


def cosines_by_hand(rows: list[list[float]]) -> list[list[float]]:
    """Of the rows, each centred first, clamped to [-1, 1]."""
    centred = [[v - sum(row) / len(row) for v in row] for row in rows]
    norms = [math.sqrt(sum(v * v for v in row)) for row in centred]
    units = [[v / n if n > 1e-12 else v for v in row] for row, n in zip(centred, norms, strict=True)]
    dots = [[sum(u * v for u, v in zip(a, b, strict=True)) for b in units] for a in units]
    return [[max(-1.0, min(1.0, dot)) for dot in row] for row in dots]


def normalised(maps: Tensor) -> Tensor:
    """Batch normalisation as it begins, from its definition: by the mean and the biased variance of each channel."""
    rows = maps.movedim(1, -1)
    flat = rows.reshape(-1, maps.shape[1])
    mean = flat.sum(0) / len(flat)
    variance = ((flat - mean) ** 2).sum(0) / len(flat)
    return ((rows - mean) / (variance + 1e-5).sqrt()).movedim(-1, 1)
