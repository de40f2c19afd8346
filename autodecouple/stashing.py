"""A stage that goes forward with a batch while older ones still wait for their backward: weight stashing.

Between a batch's forward and its backward the stage is updated with older batches. So the forward runs on a copy of the
weights, one for all batches between two updates, and the backward finds that copy again in the graph: the gradient is
taken at the weights that the batch went forward with, and belongs to the parameters as they are when it comes.

    stage 0 of 3   F0 F1 F2 B0 U0 F3 B1 U1 F4 B2 U2 ...
    copy           v0 v0 v0 v0    v1 v0    v2 v0          v1 is there from F3 until B3; a batch is K-1-k updates late

Buffers (the statistics of BatchNorm, counters) have one version: each forward goes on from the one before. Random
numbers are the batch's own, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.optim import Optimizer

from autodecouple.passes.capturing.leaves import Leaf
from autodecouple.randomness import Randomness
from autodecouple.stage import Stage
from autodecouple.work import Before, Values, Work, copies

Weights = dict[str, torch.Tensor]


@dataclass(eq=False)
class _Held:
    """A batch under way, the how many-th it was to begin, and the weights that it went forward with."""

    number: int
    work: Work
    weights: Weights
    begun: bool = False
    """Whether its backward has: gradients are its own from there on."""


class StashingStage(Stage):
    """Keeps, for each batch between its forward and its backward, the version of the weights that its forward used."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._whole = _Whole(self.code.body)
        self._named = {name: p for name, p in self._whole.named_parameters() if p.requires_grad}
        self._held: list[_Held] = []
        self._latest: Weights | None = None
        self._in_force: Weights = {}
        self.run_body = self._run_version

    @property
    def versions(self) -> int:
        """How many versions of the weights batches under way hold."""
        return len({id(held.weights) for held in self._held})

    def forward(self, work: Work, micro_batch: int, received: Values, randomness: Randomness) -> Values:
        self._in_force = self._current()
        self._held.append(_Held(self._held[-1].number + 1 if self._held else 0, work, self._in_force))
        return super().forward(work, micro_batch, received, randomness)

    def backward(
        self, work: Work, micro_batch: int, gradients: Mapping[str, torch.Tensor] | None, *, split: bool = False
    ) -> dict[str, torch.Tensor] | None:
        held = self._find(work)
        assert held is not None and work.before is not None
        self._in_force = held.weights  # for a forward that runs again
        work.before = Before(work.before.buffers, self._take_gradients())
        held.begun = True
        return super().backward(work, micro_batch, gradients, split=split)

    def discard(self, work: Work) -> None:
        """Forget a batch: buffers as before its forward, for the younger ones under way, too."""
        work.passages.clear()
        held, before = self._find(work), work.before
        self._release(work)
        if held is None or before is None:
            return
        for buffer, value in zip(self.buffers, before.buffers, strict=True):
            buffer.data.copy_(value)  # backwards of other batches may still read the buffer: their own value or none
        for other in self._held:
            if other.number > held.number and other.work.before is not None:
                other.work.before = dataclasses.replace(other.work.before, buffers=before.buffers)
        if held.begun:
            gradients = before.gradients or [None] * len(self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        work.before = None

    def _set_aside(self) -> Before:
        """Of a forward: gradients are set aside later, since those of older batches come in between."""
        return Before(copies(self.buffers), [])

    def _take_gradients(self) -> list[torch.Tensor | None]:
        """What an accumulation has gathered so far; the parameters have no gradients then."""
        gradients = [parameter.grad for parameter in self.parameters] if self.pending else []
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    def _step(self, work: Work) -> None:
        super()._step(work)
        self._release(work)

    def _descend(self, optimizer: Optimizer) -> None:
        super()._descend(optimizer)
        self._latest = None

    def _current(self) -> Weights:
        """The weights as they are now; a copy that carries their gradients back to the parameters."""
        if self._latest is None or not self._held:  # nobody under way: they may have been loaded, or set
            with torch.enable_grad():
                self._latest = {name: parameter.clone() for name, parameter in self._named.items()}
        return self._latest

    def _run_version(self, *arguments: Any) -> Any:
        return functional_call(self._whole, self._in_force, arguments)

    def _find(self, work: Work) -> _Held | None:
        return next((held for held in self._held if held.work is work), None)

    def _release(self, work: Work) -> None:
        self._held = [held for held in self._held if held.work is not work]
        self._in_force = {}
        self._latest = self._latest if self._held else None


class _Whole(nn.Module):
    """A stage's body, and beside it the modules that it runs whole, which read parameters of their own accord."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.leaves = nn.ModuleList(leaf.module for leaf in body.modules() if isinstance(leaf, Leaf))

    def forward(self, *arguments: Any) -> Any:
        return self.body(*arguments)
