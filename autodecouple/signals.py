"""What heads compare with: its form, from an example target, and the check of every batch's target."""

from __future__ import annotations

from typing import Any

import torch

from autodecouple.errors import InputError
from autodecouple.graph import spec_of
from autodecouple.objectives.heads import IGNORED
from autodecouple.plans import TensorSpec


def describe(target: Any) -> TensorSpec | None:
    """The spec of an example target; None for one that is no tensor with rows."""
    return spec_of("target", target, 0) if isinstance(target, torch.Tensor) and target.ndim else None


def check_classes(target: Any, rows: int, signal: TensorSpec, per_row: bool = True) -> None:
    """Raises InputError unless the target holds class indices that fit the batch and the signal.

    per_row: whether one label per row will do where the signal has one per token or position: heads take that, and so
             may a criterion of the user's; the default one does not
    """
    if target is None:
        raise InputError("the target is missing: train_step(inputs, target) needs class indices for every row")
    if not isinstance(target, torch.Tensor):
        raise InputError(f"the target must be a tensor of class indices, but is {type(target).__name__}")
    if target.ndim not in ({1, len(signal.shape)} if per_row else {len(signal.shape)}) or target.shape[0] != rows:
        forms = " or ".join(dict.fromkeys((*([f"({rows},)"] if per_row else []), _form(signal, rows))))
        raise InputError(
            f"the target has shape {tuple(target.shape)}, but the batch has {rows} rows: pass class indices of shape"
            f" {forms}"
        )
    if target.dtype != torch.int64:
        raise InputError(f"the target must be int64 class indices, but is {target.dtype}: pass target.long()")
    if signal.num_classes is not None:
        _check_range(target, signal.num_classes)


def _form(signal: TensorSpec, rows: int) -> str:
    sizes = [str(rows), *map(str, signal.shape[1:])]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _check_range(target: torch.Tensor, num_classes: int) -> None:
    if target.device.type != "cpu" or not target.numel():
        return  # looking would make a device wait
    lowest, highest = torch.aminmax(target)
    if lowest >= 0 and highest < num_classes:
        return
    counted = target[target != IGNORED]
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        raise InputError(
            f"the target holds class {low if low < 0 else high}, but the model's output has {num_classes} classes,"
            f" 0 to {num_classes - 1}"
        )
