"""A stage that overlaps the next: its own loss's gradient goes back at once, its weights wait for the next one's loss.

    stage k     F L B ------ + --> W U       B: of what was sent, by the own loss alone: all that the stage before gets
    stage k+1       F L B ---+               W: of the weights, by the own loss and by what has come back

So a loss trains its own stage and the one before, and no other. Both take the same way through the stage's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from autodecouple.objectives.heads import full_precision
from autodecouple.work import Passage


def give_back(passage: Passage, origin: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Gradients of what was sent, by the own loss, under the plan's names (`origin`); the graph is kept."""
    leaves = [passage.values[name] for name in passage.coupled]
    tensors, given = _given(passage)
    found: Sequence[torch.Tensor | None] = [None] * len(leaves)
    if tensors:
        with full_precision(tensors[0]):
            found = torch.autograd.grad(tensors, leaves, given, retain_graph=True, allow_unused=True)
    pairs = zip(map(origin, passage.coupled), leaves, found, strict=True)
    return {name: torch.zeros_like(x) if gradient is None else gradient for name, x, gradient in pairs}


def take_back(passage: Passage, gradients: Mapping[str, torch.Tensor]) -> None:
    """Add gradients that the next stage has sent, of what it was sent, to those of the own loss."""
    for name, gradient in gradients.items():
        own = passage.gradients.get(name)
        passage.gradients[name] = gradient if own is None else own + gradient


def train_weights(passage: Passage, body: nn.Module) -> None:
    """Gradients of the weights of a body, by all that has come."""
    weights = [parameter for parameter in body.parameters() if parameter.requires_grad]
    tensors, given = _given(passage)
    if weights and tensors:
        with full_precision(tensors[0]):
            torch.autograd.backward(tensors, given, inputs=weights)


def _given(passage: Passage) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The values that have a graph and a gradient, and these."""
    names = [name for name in passage.gradients if passage.values[name].requires_grad]
    return [passage.values[name] for name in names], [passage.gradients[name] for name in names]
