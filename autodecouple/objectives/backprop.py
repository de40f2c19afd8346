"""No local loss: the stages on both sides of the cut stay coupled, as in backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autodecouple.errors import InputError
from autodecouple.plans import TensorSpec


@dataclass(frozen=True)
class Backprop:
    """Marks a coupled cut: the gradient comes from the next stage, so there is no head."""

    name: ClassVar[str] = "bp"
    encodes: ClassVar[bool] = False

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """Raises InputError: a coupled cut has no head."""
        raise InputError(
            f'loss="bp" couples the stages at {features.name!r} and has no head; for a local loss name another one'
        )
