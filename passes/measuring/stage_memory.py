"""What a training step of every stage takes: the formula that the memory limit and the plan share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

OPTIMIZER_STATES = 2
"""Tensors that the optimizer keeps per parameter: Adam's two moments."""

UPDATE_TENSORS = 2
"""Tensors as large as a parameter that its update makes on the way: Adam's, one parameter after the other."""


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of heads, (stages,) each: parameters, the largest of them, and all that the loss takes on top."""

    parameters: Tensor
    largest: Tensor
    peak: Tensor

    @property
    def amounts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameters, self.largest, self.peak


@dataclass(frozen=True)
class StageMemory:
    """Bytes of stages without their heads, (stages,) each.

    weights:     trainable parameters; `gradients` of them; `largest` of them
    frozen:      parameters that are not trained, and buffers (twice where the forward writes them: a batch that fails
                 must leave them as they were)
    sent:        to the next stage, and made here
    activations: what the stage was sent, and what its forward leaves for its backward and the next stage
    forward:     most at any moment of the forward
    backward:    most at any moment of the backward

    Where the forward runs again for the backward:

    passing:     most at any moment of the first one, which saves nothing but copies of what it overwrites
    resting:     what there is between it and the second one: `activations` then
    beside:      what is still there in the second one, and in the backward, from the first
    """

    weights: Tensor
    gradients: Tensor
    largest: Tensor
    frozen: Tensor
    sent: Tensor
    activations: Tensor
    forward: Tensor
    backward: Tensor
    passing: Tensor
    resting: Tensor
    beside: Tensor

    def step(self, head: HeadMemory, recompute: bool = False) -> Tensor:
        """The most that a step takes beside weights, frozen and optimizer state: the worst of its phases.

        recompute: the forward runs twice: before the loss and, with all that it saves, before the backward
        """
        update = self.gradients + head.parameters + UPDATE_TENSORS * torch.maximum(self.largest, head.largest)
        phases = [update + self.sent]
        if recompute:
            again = torch.maximum(self.forward, self.backward) + head.parameters
            phases += [self.passing, self.resting + head.peak, again + self.beside]
        else:
            phases += [self.forward, self.activations + head.peak, self.backward + head.parameters]
        return reduce(torch.maximum, phases)
