"""Optimizers inside a recorded graph: what they read must lie on the device, or never change."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch.optim import SGD, Optimizer

Groups = list[dict[str, Any]]


def can_be_recorded(optimizer: Optimizer) -> bool:
    """Whether it can keep its count of steps on the device, or counts none."""
    return isinstance(optimizer, SGD) or all("capturable" in group for group in optimizer.param_groups)


@contextlib.contextmanager
def on_device(optimizer: Optimizer) -> Iterator[None]:
    """Let steps within keep their counts on the device; outside the options are what the user gave."""
    with contextlib.ExitStack() as stack:
        for group in optimizer.param_groups:
            if "capturable" in group:
                stack.enter_context(_replaced(group, capturable=True))
        yield


def move_counts(optimizer: Optimizer) -> None:
    """Counts of steps that were loaded come to where the parameters are."""
    for parameter, state in optimizer.state.items():
        if isinstance(step := state.get("step"), torch.Tensor):
            state["step"] = step.to(parameter.device, torch.float32)


def options_of(optimizer: Optimizer, rates: bool) -> Hashable:
    """What a recording has fixed; the learning rates are not among it where they lie in memory (`rates`)."""
    apart = {"params", "lr"} if rates else {"params"}
    options = [item for group in optimizer.param_groups for item in group.items()]
    return tuple((name, _plain(value)) for name, value in options if name not in apart)


def _plain(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return id(value)  # a tensor is read where it lies
    return value if isinstance(value, Hashable) else repr(value)


class Rates:
    """The learning rates of an optimizer's groups as tensors, so that schedulers may change them between replays."""

    @staticmethod
    def of(optimizer: Optimizer, device: torch.device) -> Rates | None:
        """None where the rates are tensors of the user's own, which are read where they lie."""
        numbers = all(not isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
        return Rates(optimizer, device) if numbers else None

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._values = [float(group["lr"]) for group in self._groups]
        self._tensors = [torch.tensor(value, device=device, dtype=torch.float32) for value in self._values]
        self._is_sgd = isinstance(optimizer, SGD)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let a step within read the tensors. Of SGD only the fused form does so without asking for the value."""
        other = {"fused": True, "foreach": False} if self._is_sgd else {}
        with contextlib.ExitStack() as stack:
            for group, rate in zip(self._groups, self._tensors, strict=True):
                stack.enter_context(_replaced(group, lr=rate, **other))
            yield

    def refresh(self) -> None:
        """Write what has changed since."""
        for index, group in enumerate(self._groups):
            if self._values[index] != (value := float(group["lr"])):
                self._values[index] = value
                self._tensors[index].fill_(value)


@contextlib.contextmanager
def _replaced(group: dict[str, Any], **options: Any) -> Iterator[None]:
    before = {name: group[name] for name in options}
    group.update(options)
    try:
        yield
    finally:
        group.update(before)
