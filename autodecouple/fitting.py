"""The loop over epochs: the one a user would write, with progress, metrics and checkpoints."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autodecouple import checkpoints
from autodecouple.errors import InputError
from autodecouple.executors import Step

if TYPE_CHECKING:
    from autodecouple.decoupled import Decoupled

LAG = 8
"""Batches whose results wait to be read: reading one at once would stop the stream."""


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


class _Mean:
    """Running means of the losses and hits of finished steps."""

    def __init__(self) -> None:
        self.rows = 0
        self.hits = 0
        self.compared = 0
        self.sums: list[float] = []

    def add(self, step: Step, target: Any) -> None:
        rows = len(target) if isinstance(target, (torch.Tensor, list, tuple)) and _has_rows(target) else 1
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


def fit(
    decoupled: Decoupled,
    loader: Iterable[Any],
    epochs: int,
    validation: Iterable[Any] | None,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> list[Epoch]:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs must be a positive integer, not {epochs!r}")
    if checkpoint is not None:
        checkpoints.check_target(Path(checkpoint).resolve())  # before the epoch whose result it is to hold
    history = []
    for number in range(1, epochs + 1):
        start = time.perf_counter()
        mean = _Mean()
        waiting: deque[tuple[Step, Any]] = deque()
        for batch in _shown(loader, f"epoch {number}/{epochs}", progress):
            inputs, target = unpack(batch)
            waiting.append((decoupled.train_step(inputs, target), target))
            if len(waiting) > LAG:
                mean.add(*waiting.popleft())
        decoupled.synchronize()
        for step, target in waiting:
            mean.add(step, target)
        if mean.rows == 0:
            raise InputError("the loader gave no batch: nothing was trained (a generator can be read only once)")
        seconds = time.perf_counter() - start
        held_out = decoupled.evaluate(validation)["accuracy"] if validation is not None else math.nan
        history.append(Epoch(number, mean.losses, mean.accuracy, held_out, seconds))
        if checkpoint is not None:
            decoupled.save(checkpoint, background=True)
        if progress:
            Console(stderr=True, highlight=False).print(str(history[-1]))
    decoupled.synchronize()
    return history


def evaluate(decoupled: Decoupled, loader: Iterable[Any]) -> dict[str, float]:
    """Mean criterion loss and accuracy over a loader, in evaluation mode."""
    rows, hits, compared, total = 0, 0, 0, 0.0
    for batch in loader:
        inputs, target = unpack(batch)
        decoupled._ensure_captured(inputs)
        output = decoupled(**inputs) if isinstance(inputs, Mapping) else decoupled(*_positional(inputs))
        count = len(target) if _has_rows(target) else 1
        rows, total = rows + count, total + decoupled._task_loss(output, target) * count
        found = count_hits(output, target)
        if found is not None:
            hits, compared = hits + found, compared + count
    if rows == 0:
        raise InputError("the loader gave no batch: nothing was evaluated (a generator can be read only once)")
    return {"loss": total / rows, "accuracy": hits / compared if compared else math.nan}


def unpack(batch: Any) -> tuple[Any, Any]:
    """(inputs, target) of what a loader gives: a pair, inputs followed by a target, or a dict with "labels"."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise InputError(f"a batch that is a dict needs an entry 'labels'; it has {', '.join(map(str, batch))}")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise InputError(f"a batch must be (inputs, target), but is {type(batch).__name__}")
    *inputs, target = batch
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target


def count_hits(output: Any, target: Any) -> int | None:
    """Rows whose largest logit is the target; None where output and target are not logits and class indices."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = named if named is not None else output
    fits = isinstance(logits, torch.Tensor) and logits.ndim == 2 and isinstance(target, torch.Tensor)
    if not fits or target.shape != logits.shape[:1] or target.is_floating_point():
        return None
    return int((logits.argmax(1) == target.to(logits.device)).sum())


def _has_rows(target: Any) -> bool:
    return isinstance(target, torch.Tensor) and target.ndim > 0


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _shown(loader: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    """The loader with a bar on stderr, if that is a terminal."""
    if not progress or not sys.stderr.isatty():
        yield from loader
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        total = len(loader) if isinstance(loader, Sized) else None
        yield from bars.track(loader, total=total, description=label)
