"""The protocol that every local loss keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Protocol

from torch import nn

from autodecouple.plans import Cut, TensorSpec


class Objective(Protocol):
    """The rule that a stage's head optimises: a frozen dataclass, one file each, nobody subclasses them.

    `name` is what the plan prints and `loss=` takes. `encodes` says that its heads pass on a signal of their own
    instead of the one they were given, so that the next stage's loss waits for this one's. One that does not care how
    many classes there are may say so with `needs_classes = False`, one that takes whatever the criterion does with
    `takes_any_target = True`. One with `needs_graph = True` is bound to the captured model by `passes.equip`, and then
    has `at(cut)`: the objective for one cut, which names the `sides` that its head reads beside the features and builds
    a `joint_head(features, signal)` of several of them.
    """

    @property
    def name(self) -> str: ...
    @property
    def encodes(self) -> bool: ...

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """The head for features and a signal of these shapes.

        features: any rank from two on, rows at `batch_dim`; real or complex, of any precision
        signal:   the target: class indices, int64, one per row (N,), token (N, T) or position (N, H, W) or
                  (N, D, H, W), below 0 where none counts, with `num_classes` None where nothing tells their number; or
                  anything else, float targets among them. InputError for what the objective cannot compare with

        Its `forward(features, signal, mask=None)` gives `(loss, next_signal)`: a scalar loss and what the next
        stage's head compares with. `mask` is a bool tensor (N, T), True where a token counts; it is passed where a
        mask crosses the cut. All sizes but the channels' may differ from the example's. Where several tensors carry the
        gradient, the head is asked for one that joins them (`objectives.gather`).
        """
        ...


def at_cut(objective: Objective, cut: Cut) -> tuple[Objective, Cut]:
    """The objective as it is at a cut, and the cut with what its head reads there."""
    if not hasattr(objective, "at"):
        return objective, cut
    placed = objective.at(cut)
    return placed, dataclasses.replace(cut, sides=placed.sides, mask=None)


def read_at(cut: Cut) -> list[TensorSpec]:
    """Specs of what the head at a cut reads, in order: the features, all under that name, then the sides."""
    features = [dataclasses.replace(cut.spec(name), name="features") for name in cut.features]
    return [*features, *(cut.spec(name) for name in cut.sides)]


def price_key(objective: Objective) -> Hashable:
    """Equal for objectives whose heads cost the same on the same features."""
    signature = getattr(objective, "signature", None)
    if signature is None:
        return objective if isinstance(objective, Hashable) else id(objective)
    return tuple(signature)
