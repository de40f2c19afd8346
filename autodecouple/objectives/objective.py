"""The protocol that every local loss keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from torch import nn

from autodecouple.plans import Cut, TensorSpec

Signal = TensorSpec | tuple[TensorSpec, ...]
"""What a head compares with, as specs: the target, or what the last encoding head before it passes on."""


class Objective(Protocol):
    """The rule that a stage's head optimises: a frozen dataclass, one file each, nobody subclasses them.

    `name` is what the plan prints and `loss=` takes. `encodes` says that its heads pass on a signal of their own,
    which the next head that encodes is given instead of the target, so that its loss waits for this one's.

    What most have no use for is optional:

    needs_classes = False: it does not care how many classes there are
    needs_target = False:  its heads do not look at the target, which may then be anything
    encoding(signal):      what the signal that it passes on looks like, where that differs from what came in
    placed(index, num_hidden, inputs): the same objective for one of the hidden stages, of a model with these inputs;
                           token indices of an embedding have the size of the vocabulary as `num_classes`
    input:                 a TensorSpec of one of these inputs, which the head is given, too: its `forward` is then
                           (features, input, signal, mask=None). None where it is not
    takes_any_target = True: its heads compare with whatever the criterion takes
    overlaps = True:       the next stage's loss trains the stage as well (`Cut.overlaps`)
    needs_graph = True:    it is bound to the captured model by `passes.equip`, and then has `at(cut)`: the objective
                           for one cut, which names the `sides` that its head reads beside the features and builds a
                           `joint_head(features, signal)` of several of them

    A head that can answer what the model is asked says so with `predicts = True`, and its `predict(features,
    mask=None)` gives the scores of the classes, (N, C), or (N, *positions, C) where every position has a label. An
    encoding head gives a code there, (..., width), and its `decode` brings such a code back to what its signal was
    in: to a code of the encoding head before it, or, of the first one, to scores (see `autodecouple.exits`).
    """

    @property
    def name(self) -> str: ...
    @property
    def encodes(self) -> bool: ...

    def head(self, features: TensorSpec, signal: Any) -> nn.Module:
        """The head for features and a signal of these shapes.

        features: any rank from two on, rows at `batch_dim`; real or complex, of any precision
        signal:   the target: class indices, int64, one per row (N,), token (N, T) or position (N, H, W) or
                  (N, D, H, W), below 0 where none counts, with `num_classes` None where nothing tells their number; or
                  anything else, float targets among them; a `Signal` where the objective encodes. InputError for what
                  the objective cannot compare with

        Its `forward(features, signal, mask=None)` gives `(loss, next_signal)`: a scalar loss and what the next
        stage's head compares with. `mask` is a bool tensor (N, T), True where a token counts; it is passed where a
        mask crosses the cut. All sizes but the channels' may differ from the example's. Where several tensors carry the
        gradient, the head is asked for one that joins them (`objectives.gather`).
        """
        ...


def tie_of(objective: Objective) -> str:
    """What a cut with this objective does to the stages beside it: "detached", "coupled" or "overlapping"."""
    if objective.name == "bp":
        return "coupled"
    return "overlapping" if getattr(objective, "overlaps", False) else "detached"


def input_of(objective: Objective) -> TensorSpec | None:
    """The input of the model that the objective's heads compare with, None where they read none."""
    found: TensorSpec | None = getattr(objective, "input", None)
    return found


def signal_of(stage: int, objectives: Sequence[Objective], target: TensorSpec) -> Signal:
    """What the head of a hidden stage compares with, as its objective is told it."""
    signal: Signal = target
    for objective in objectives[:stage] if objectives[stage].encodes else ():
        if objective.encodes and hasattr(objective, "encoding"):
            signal = objective.encoding(signal)
    return signal


def labels_of(signal: Signal) -> TensorSpec:
    """The target's own spec: what encoding heads pass on begins with it."""
    return signal[0] if isinstance(signal, tuple) else signal


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
