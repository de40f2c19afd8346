"""Memory that a recorded graph reads in every batch at the same place: inputs, the signal, masks of dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autodecouple.randomness import Randomness, draw_mask

Masks = dict[str, tuple[float, Tensor]]
"""By node: its probability, and the mask that was drawn last."""


@dataclass(frozen=True)
class KeptRandomness(Randomness):
    """Draws as ever, and keeps every mask in `masks`."""

    masks: Masks = field(default_factory=dict)

    def mask(self, x: Tensor, p: float, node: str, rows: int | None = 0) -> Tensor:
        found = super().mask(x, p, node, rows)
        self.masks[node] = (p, found)
        return found


@dataclass(frozen=True)
class GivenRandomness(Randomness):
    """Draws nothing: the masks are there, and filled before each replay."""

    masks: Masks = field(default_factory=dict)

    def mask(self, x: Tensor, p: float, node: str, rows: int | None = 0) -> Tensor:
        return self.masks[node][1]


def fill_masks(masks: Masks, randomness: Randomness) -> None:
    """Draw the masks of a batch, each as eager code would."""
    for node, (p, mask) in masks.items():
        generator = torch.Generator(mask.device).manual_seed(randomness.key(node))
        mask.copy_(draw_mask(mask.shape, p, mask.device, generator))


def keep(values: Any) -> Any:
    """Copies of nested values in memory of their own, that lies as theirs does."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), values)


def overwrite(kept: Any, values: Any) -> None:
    """Put new values where the kept ones are."""
    with torch.no_grad():
        for old, new in zip(pytree.tree_leaves(kept), pytree.tree_leaves(values), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
