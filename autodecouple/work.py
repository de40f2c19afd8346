"""One batch at one stage: what is held between its forward and its update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

Values = dict[str, Any]
"""Tensors and integers by the name of the node that made them."""


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors among values of any structure."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@dataclass
class Passage:
    """One micro-batch on its way through a stage: what was sent and made, and the gradients that wait for backward.

    `coupled` names what was sent and wants its gradient sent back. Where activations are not kept, `again` runs the
    forward once more, for the values with their graph.
    """

    values: Values
    coupled: Sequence[str] = ()
    again: Callable[[], AbstractContextManager[Values]] | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same values in memory of their own, on a device by one launch; torch 2.11 has no clone that does that."""
    found = [torch.empty_like(tensor) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


@dataclass(frozen=True)
class Before:
    """A stage as it was before a batch: its buffers, and the gradients that an accumulation had gathered."""

    buffers: list[torch.Tensor]
    gradients: list[torch.Tensor | None]


@dataclass
class Work:
    """What a stage holds of one batch between its forward and its update.

    sizes:  the micro-batches' rows; share: of the global batch, where replicas train on the rest of it
    rests:  what is left to do for the weights' gradients, of micro-batches whose backward was split
    signal: given with the forward to a stage that does all with one launch (`replayed`)
    """

    sizes: Sequence[int]
    share: float = 1.0
    before: Before | None = None
    passages: dict[int, Passage] = field(default_factory=dict)
    rests: dict[int, Callable[[], None]] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)
    finite: list[Flag] = field(default_factory=list)
    outputs: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    signal: Any = None
    replayed: bool = False


class Flag:
    """Whether a loss is finite, asked for without making the device wait: the answer travels behind the backward."""

    def __init__(self, loss: torch.Tensor) -> None:
        self._value = loss
        self._event: torch.cuda.Event | None = None
        if loss.is_cuda:
            self._value = torch.empty_like(loss, device="cpu", pin_memory=True)
            self._value.copy_(loss, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def is_set(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return math.isfinite(self._value)
