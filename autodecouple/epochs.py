"""What an epoch comes to: its losses, its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodecouple.executors import Step


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean loss per stage, accuracy in training and validation (NaN where unknown), seconds."""

    epoch: int
    losses: tuple[float, ...]
    accuracy: float
    validation: float
    seconds: float

    def __str__(self) -> str:
        losses = " ".join(f"{loss:.3f}" for loss in self.losses)
        held_out = "" if math.isnan(self.validation) else f"  validation {self.validation:.1%}"
        return f"epoch {self.epoch:3d}  losses {losses}  accuracy {self.accuracy:.1%}{held_out}  {self.seconds:.1f} s"


class Mean:
    """Running means of the losses and hits of finished steps."""

    def __init__(self) -> None:
        self.rows = 0
        self.hits = 0
        self.compared = 0
        self.sums: list[float] = []

    def add(self, step: Step, target: Any) -> None:
        rows = len(target) if isinstance(target, (torch.Tensor, list, tuple)) and has_rows(target) else 1
        losses = [math.nan if loss is None else loss for loss in step.losses]
        self.sums = [a + b * rows for a, b in zip(self.sums or [0.0] * len(losses), losses, strict=True)]
        self.rows += rows
        hits = count_hits(step.output, target)
        if hits is not None:
            self.hits, self.compared = self.hits + hits, self.compared + rows

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(total / max(self.rows, 1) for total in self.sums)

    @property
    def accuracy(self) -> float:
        return self.hits / self.compared if self.compared else math.nan


def count_hits(output: Any, target: Any) -> int | None:
    """Rows whose largest logit is the target; None where output and target are not logits and class indices."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = named if named is not None else output
    fits = isinstance(logits, torch.Tensor) and logits.ndim == 2 and isinstance(target, torch.Tensor)
    if not fits or target.shape != logits.shape[:1] or target.is_floating_point():
        return None
    return int((logits.argmax(1) == target.to(logits.device)).sum())


def has_rows(target: Any) -> bool:
    return isinstance(target, torch.Tensor) and target.ndim > 0
