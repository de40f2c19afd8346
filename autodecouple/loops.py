"""Where a loop over epochs stands, so that a checkpoint in the middle of one is gone on from.

epoch 1                epoch 2
0 1 2 ... n   save     0 1 2 | 3 4 ...     the order of epoch 2 was drawn at its begin: a resumed loop draws it
                    order    save          again from the generators as they were there, passes over 0 1 2, and
                                           then has the generators as they were at the save
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from autodecouple.epochs import Epoch, Mean
from autodecouple.errors import InputError
from autodecouple.executors.ranks import Ranks

Draws = list[torch.Tensor]
"""States of generators: torch's own, then those of the loader."""


@dataclass
class Loop:
    """The epoch under way, counted from 1, and the batches that are trained of it."""

    epoch: int = 1
    batch: int = 0
    history: list[Epoch] = field(default_factory=list)
    mean: Mean = field(default_factory=Mean)
    order: Draws | None = None
    draws: Draws | None = None
    start: float = field(default_factory=time.perf_counter)

    @staticmethod
    def resumed(records: Mapping[int, Mapping[str, Any]], ranks: Ranks, num_stages: int, loader: Iterable[Any]) -> Loop:
        """From what `record` gave on every rank; of other ranks than these, what all of them knew is put together."""
        if not records:
            return Loop()
        alike = len(records) == ranks.size
        own = records[ranks.rank if alike else 0]
        histories = [[Epoch(**epoch) for epoch in record["history"]] for record in records.values()]
        loop = Loop(own["epoch"], own["batch"], order=own["order"], draws=own["draws"])
        loop.history = histories[ranks.rank] if alike else [_joined(epochs) for epochs in zip(*histories, strict=True)]
        if alike and len(own["mean"]["sums"]) == num_stages:
            vars(loop.mean).update(own["mean"])
        loop.start -= own["seconds"]
        if not loop.batch:
            _put(loader, own["draws"])
        return loop

    def record(self, loader: Iterable[Any]) -> dict[str, Any]:
        """Plain data."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "mean": {**vars(self.mean), "sums": list(self.mean.sums)},
            "seconds": time.perf_counter() - self.start,
            "order": self.order,
            "draws": _draws(loader),
        }

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The rest of the epoch, in the order in which it began; raises InputError where it is too short."""
        if not self.batch:
            self.start, self.order = time.perf_counter(), _draws(loader)
            yield from loader
            return
        _put(loader, self.order)
        iterator = iter(loader)
        for done in range(self.batch):
            if next(iterator, _END) is _END:
                raise InputError(
                    f"the checkpoint was saved after {self.batch} batches of epoch {self.epoch}, but the loader gives"
                    f" {done}: pass the same data, or resume=False to begin anew"
                )
        _put(loader, self.draws)
        yield from iterator

    def end(self, validation: float) -> None:
        """The epoch is over."""
        seconds = time.perf_counter() - self.start
        self.history.append(Epoch(self.epoch, self.mean.losses, self.mean.accuracy, validation, seconds))
        self.epoch, self.batch, self.mean, self.order = self.epoch + 1, 0, Mean(), None


_END = object()


def _joined(epochs: tuple[Epoch, ...]) -> Epoch:
    """One epoch as several ranks knew it, each its own stages."""
    losses = tuple(_known(each) for each in zip(*(epoch.losses for epoch in epochs), strict=True))
    return dataclasses.replace(epochs[0], losses=losses, accuracy=_known(epoch.accuracy for epoch in epochs))


def _known(values: Iterable[float]) -> float:
    return next((value for value in values if not math.isnan(value)), math.nan)


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """Those that make the order, beside torch's own: of a DataLoader, and of what it samples by."""
    found = {}
    for holder in ("", "sampler.", "batch_sampler.", "batch_sampler.sampler."):
        with contextlib.suppress(AttributeError):
            generator = operator.attrgetter(f"{holder}generator")(loader)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _draws(loader: Iterable[Any]) -> Draws:
    return [torch.get_rng_state(), *(generator.get_state() for generator in _generators(loader))]


def _put(loader: Iterable[Any], draws: Draws | None) -> None:
    first, *others = draws or [torch.get_rng_state()]
    torch.set_rng_state(first)
    for generator, state in zip(_generators(loader), others, strict=False):
        generator.set_state(state)
