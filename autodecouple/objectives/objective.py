"""The protocol that every local loss keeps."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from autodecouple.plans import TensorSpec


class Objective(Protocol):
    """The rule that a stage's head optimises: a frozen dataclass, one file each, nobody subclasses them.

    `name` is what the plan prints and `loss=` takes. `encodes` says that its heads pass on a signal of their own
    instead of the one they were given, so that the next stage's loss waits for this one's.
    """

    @property
    def name(self) -> str: ...
    @property
    def encodes(self) -> bool: ...

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """The head for features of this shape.

        Its `forward(features, signal, mask=None)` gives `(loss, next_signal)`: a scalar loss and what the next
        stage's head compares with. `mask` is a bool tensor (N, T), True where a token counts; it is passed where a
        mask crosses the cut.
        """
        ...
