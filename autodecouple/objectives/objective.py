"""The protocol that every local loss keeps."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from autodecouple.plans import TensorSpec


class Objective(Protocol):
    """The rule that a stage's head optimises: a frozen dataclass, one file each, nobody subclasses them.

    `name` is what the plan prints and `loss=` takes. `encodes` says that its heads pass on a signal of their own
    instead of the one they were given, so that the next stage's loss waits for this one's.

    What most have no use for is optional:

    needs_classes = False: it does not care how many classes there are
    needs_target = False:  its heads do not look at the target, which may then be anything
    placed(index, num_hidden, inputs): the same objective for one of the hidden stages, of a model with these inputs;
                           token indices of an embedding have the size of the vocabulary as `num_classes`
    input:                 a TensorSpec of one of these inputs, which the head is given, too: its `forward` is then
                           (features, input, signal, mask=None). None where it is not
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


def input_of(objective: Objective) -> TensorSpec | None:
    """The input of the model that the objective's heads compare with, None where they read none."""
    found: TensorSpec | None = getattr(objective, "input", None)
    return found
