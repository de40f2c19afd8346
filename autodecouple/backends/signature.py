"""What of a call decides which code runs: everything but the values of its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from types import NoneType
from typing import Any

import torch
from torch.utils import _pytree as pytree


def signature(values: Any) -> Hashable:
    """Of nested values: shapes, types, places and memory of tensors, other values themselves, and the surroundings."""
    leaves, spec = pytree.tree_flatten(values)
    return tuple(map(_of_leaf, leaves)), str(spec), _surroundings()


def _of_leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if isinstance(leaf, (bool, int, float, complex, str, bytes, NoneType)) else id(leaf)


def _surroundings() -> Hashable:
    kinds = ("cpu", "cuda")
    autocast = tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds)
    return autocast, torch.is_grad_enabled()
