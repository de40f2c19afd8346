"""The loop over epochs: the one a user would write, with progress, metrics and checkpoints."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils import _pytree as pytree

from autodecouple import checkpoints
from autodecouple.epochs import Epoch, count_hits, has_rows
from autodecouple.errors import InputError
from autodecouple.executors import Step
from autodecouple.executors.ranks import ALONE
from autodecouple.loops import Loop

if TYPE_CHECKING:
    from autodecouple.decoupled import Decoupled

LAG = 8
"""Batches whose results wait to be read: reading one at once would stop the stream."""


@dataclass(frozen=True)
class Saving:
    """Where a loop saves: after every epoch, and after every so many batches of one; whether it goes on from there."""

    path: Path | None
    every: int | None
    resumes: bool

    @staticmethod
    def checked(checkpoint: str | os.PathLike[str] | None, every: int | None, resumes: bool) -> Saving:
        """Raises InputError, and CheckpointError for a path where no checkpoint can be."""
        if checkpoint is None:
            if resumes or every is not None:
                raise InputError("resume= and save_every= need to know where: pass checkpoint=, a folder")
            return Saving(None, None, False)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise InputError(f"save_every must be a positive number of batches, not {every!r}")
        path = Path(checkpoint).resolve()
        checkpoints.check_target(path)  # before the epoch whose result it is to hold
        return Saving(path, every, resumes)

    def begin(self, decoupled: Decoupled, loader: Iterable[Any]) -> Loop:
        """Where the checkpoint stands, if there is one to go on from."""
        ranks = decoupled._compiled.executor.ranks if self.resumes else ALONE
        if self.path is None or not self.resumes or not checkpoints.exists(self.path):
            return Loop()
        state = decoupled._read(self.path)
        decoupled.load_state_dict(state)
        return Loop.resumed(state.get("loops", {}), ranks, len(decoupled.stages), loader)

    def is_due(self, batch: int) -> bool:
        return self.every is not None and batch % self.every == 0

    def save(self, decoupled: Decoupled, loop: Loop, loader: Iterable[Any]) -> None:
        if self.path is not None:
            decoupled._save(self.path, background=True, loop=loop.record(loader))


def fit(
    decoupled: Decoupled,
    loader: Iterable[Any],
    epochs: int,
    validation: Iterable[Any] | None,
    saving: Saving,
    progress: bool,
) -> list[Epoch]:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"epochs must be a positive integer, not {epochs!r}")
    loop = saving.begin(decoupled, loader)
    while loop.epoch <= epochs:
        label = f"epoch {loop.epoch}/{epochs}"
        _train(decoupled, loader, loop, saving, label if progress else None)
        loop.end(decoupled.evaluate(validation)["accuracy"] if validation is not None else math.nan)
        saving.save(decoupled, loop, loader)
        if progress:
            Console(stderr=True, highlight=False).print(str(loop.history[-1]))
    decoupled.synchronize()
    return loop.history


def _train(decoupled: Decoupled, loader: Iterable[Any], loop: Loop, saving: Saving, label: str | None) -> None:
    """The rest of an epoch, saving on the way."""
    waiting: deque[tuple[Step, Any]] = deque()
    for batch in _shown(loop.batches(loader), loader, loop.batch, label):
        inputs, target = unpack(batch)
        waiting.append((decoupled.train_step(inputs, target), target))
        loop.batch += 1
        is_due = saving.is_due(loop.batch)
        while len(waiting) > (0 if is_due else LAG):
            loop.mean.add(*waiting.popleft())
        if is_due:
            saving.save(decoupled, loop, loader)
    decoupled.synchronize()
    for step, target in waiting:
        loop.mean.add(step, target)
    if loop.batch == 0:
        raise InputError("the loader gave no batch: nothing was trained (a generator can be read only once)")


def evaluate(decoupled: Decoupled, loader: Iterable[Any]) -> dict[str, float]:
    """Mean criterion loss and accuracy over a loader, in evaluation mode."""
    rows, hits, compared, total = 0, 0, 0, 0.0
    for batch in loader:
        inputs, target = unpack(batch)
        decoupled._ensure_captured(inputs)
        output = decoupled(**inputs) if isinstance(inputs, Mapping) else decoupled(*_positional(inputs))
        count = len(target) if has_rows(target) else 1
        rows, total = rows + count, total + _task_loss(decoupled, output, target) * count
        found = count_hits(output, target)
        if found is not None:
            hits, compared = hits + found, compared + count
    if rows == 0:
        raise InputError("the loader gave no batch: nothing was evaluated (a generator can be read only once)")
    return {"loss": total / rows, "accuracy": hits / compared if compared else math.nan}


def _task_loss(decoupled: Decoupled, output: Any, target: Any) -> float:
    """The criterion's loss of an output, as a number."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    first = next(leaves, None)
    if first is not None and isinstance(target, Tensor):
        target = target.to(first.device)
    with torch.no_grad():
        return float(decoupled._compiled.criterion.compare(output, target))


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


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _shown(batches: Iterable[Any], loader: Iterable[Any], done: int, label: str | None) -> Iterable[Any]:
    """The batches with a bar on stderr, if that is a terminal."""
    if label is None or not sys.stderr.isatty():
        yield from batches
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        total = len(loader) if isinstance(loader, Sized) else None
        yield from bars.track(batches, total=total, completed=done, description=label)
