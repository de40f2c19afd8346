"""InfoPro: keep what the input holds, and tell the classes apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives.early_exit import EarlyExit
from autodecouple.objectives.heads import check_choice, check_positive, check_specs
from autodecouple.objectives.maps import Neck
from autodecouple.objectives.objective import Objective
from autodecouple.objectives.reconstruction import RECONSTRUCTIONS, decoder
from autodecouple.objectives.supcon import SupCon
from autodecouple.plans import TensorSpec

Weights = tuple[float, float]
TASK = SupCon(temperature=0.07)


@dataclass(frozen=True)
class InfoPro:
    """Reconstruction of the model's input, and a loss of the classes, each with a weight that changes with depth.

    loss = l1 reconstruction(decoder(h), input) + l2 task(h), l1 and l2 linear from the first hidden stage to the last

    The decoder follows what enters the model and what the cut carries:

    numbers (N, C, H, W) or (N, T, D), features with positions of the same kind: interpolated to the input's positions,
            3x3 convolution to `channels`, BatchNorm, ReLU, 3x3 convolution to the input's channels
    numbers, other features: a linear layer to the input's means over 4 cells per dimension (of a sequence: over all)
    token indices, features with tokens: a linear layer to the vocabulary at every position, cross-entropy
    token indices, other features: one such layer on the pooled features, for all the tokens of the row

    What the mask of the features leaves out does not count. The input is the first that holds numbers with rows, or
    indices of an embedding; it crosses all cuts in front of a stage with such a head, and the plan counts its bytes.

    task:           the objective that is told h; SupCon(temperature=0.07) as published, EarlyExit() for cross-entropy
    reconstruction: (l1 of the first hidden stage, of the last one); a stage where it is 0 has no decoder
    comparison:     (l2 of the first, of the last); where it is 0 the stage sees no labels
    error:          of numbers: "mse", or "bce" with a sigmoid, for inputs in [0, 1]
    mean, std:      the normalisation per channel that "bce" undoes first, since images come normalised; () for none
    conv:           the task has a 3x3 convolution with stride 2 to twice the channels, BatchNorm and ReLU in front
    max_rows:       token positions of a batch that are reconstructed, at equal distances: 30,000 words are 120 kB each

    Source: Wang and others, Revisiting Locally Supervised Learning (2021). Why these defaults: (1, 0) is the published
    l1 of four stages; its l2, (0, 1), leaves the first stage without labels, so here it begins at 1/2. "mse" takes any
    input.
    """

    name: ClassVar[str] = "infopro"
    encodes: ClassVar[bool] = False

    task: Objective = TASK
    reconstruction: Weights = (1.0, 0.0)
    comparison: Weights = (0.5, 1.0)
    error: str = "mse"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 12
    conv: bool = True
    max_rows: int | None = 1021
    depth: float = 0.0
    """Where the stage stands, 0 for the first hidden one and 1 for the last; set by `placed`, as is the next."""
    input: TensorSpec | None = None

    def __post_init__(self) -> None:
        check_choice("error", self.error, RECONSTRUCTIONS)
        check_positive(channels=self.channels, max_rows=self.max_rows)
        for field in ("reconstruction", "comparison"):
            if not all(0 <= weight < math.inf for weight in getattr(self, field)):
                raise InputError(f"{field}={getattr(self, field)!r} must be two finite weights, none below zero")
        if len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
            raise InputError(f"mean={self.mean!r} and std={self.std!r} must be as many numbers, and std above zero")
        if isinstance(self.task, str) or self.task.name in ("bp", self.name) or self.task.encodes:
            raise InputError(f"task={self.task!r} must be an objective with a loss of its own, like EarlyExit()")

    @staticmethod
    def paper(labels: str = "supcon") -> InfoPro:
        """The published heads and weights of CIFAR's ResNet-110 in four stages; labels: "supcon" or "ce".

        Images must be in [0, 1], or be given with their mean and std: dataclasses.replace(InfoPro.paper(), mean=...).
        """
        check_choice("labels", labels, ("supcon", "ce"))
        task = SupCon(0.07, pool=1, hidden=128, out=128) if labels == "supcon" else EarlyExit(pool=1, hidden=128)
        return InfoPro(task, comparison=(0.0, 1.0), error="bce")

    @property
    def needs_classes(self) -> bool:
        return getattr(self.task, "needs_classes", True)

    def placed(self, index: int, num_hidden: int, inputs: Sequence[TensorSpec]) -> InfoPro:
        """The same for one hidden stage of a model; InputError where no input can be reconstructed."""
        depth = index / (num_hidden - 1) if num_hidden > 1 else 0.0
        if self.weight_at(self.reconstruction, depth) == 0:
            return dataclasses.replace(self, depth=depth, input=None)
        fit = [spec for spec in inputs if _can_be_rebuilt(spec)]
        if not fit:
            raise InputError(
                f"{self.name!r} reconstructs the model's input, numbers or indices of an embedding that the model does"
                f" not write into, but these enter: {', '.join(map(str, inputs)) or 'none'}; leave the reconstruction"
                ' out (reconstruction=(0, 0)), or take another objective, like loss="supcon"'
            )
        return dataclasses.replace(self, depth=depth, input=fit[0])

    @staticmethod
    def weight_at(weights: Weights, depth: float) -> float:
        """A weight at this depth."""
        return weights[0] * (1 - depth) + weights[1] * depth

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank, and for what the task takes."""
        l1, l2 = self.weight_at(self.reconstruction, self.depth), self.weight_at(self.comparison, self.depth)
        if l1 and self.input is None:
            raise InputError(f"{self.name!r} knows no input yet: compile() and plan() tell it, elsewhere use placed()")
        if not (l1 or l2):
            raise InputError(
                f"both weights of {self.name!r} are 0 at depth {self.depth:.2f} (0 the first hidden stage, 1 the last):"
                " the stage would not be trained"
            )
        task = TaskHead(self._compare(features, signal), l2)
        return task if self.input is None else InfoProHead(decoder(features, self.input, self), l1, task)

    def _compare(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        if not self.conv:
            return self.task.head(features, signal)
        check_specs(self.name, features, signal)
        neck = Neck(features, signal, [2 * Neck(features, signal, ()).layout.width], kernel=3, stride=2)
        return Compare(neck, self.task.head(neck.spec(features), signal))


class TaskHead(nn.Module):
    """The task alone, weighted."""

    def __init__(self, compare: nn.Module, weight: float) -> None:
        super().__init__()
        self.compare = compare
        self.weight = weight

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.weight * self.compare(features, signal, mask)[0], signal


class InfoProHead(nn.Module):
    """Reconstruction and the task; a task without weight is there, so that a checkpoint of other stages fits."""

    def __init__(self, rebuild: nn.Module, weight: float, task: TaskHead) -> None:
        super().__init__()
        self.rebuild = rebuild
        self.weight = weight
        self.task = task

    def forward(
        self, features: Tensor, given: Tensor, signal: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        loss = self.weight * self.rebuild(features, given.detach(), mask)
        return loss + self.task(features, signal, mask)[0] if self.task.weight else loss, signal


class Compare(nn.Module):
    """A convolution, and then the task's head."""

    def __init__(self, neck: Neck, head: nn.Module) -> None:
        super().__init__()
        self.neck = neck
        self.head = head

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        maps = self.neck(features, mask)
        found: tuple[Tensor, Tensor] = self.head(self.neck.restored(maps), signal, mask=mask)
        return found


def _can_be_rebuilt(spec: TensorSpec) -> bool:
    if spec.batch_dim != 0 or len(spec.shape) < 1:
        return False
    indices = spec.dtype in ("int64", "int32") and spec.num_classes is not None
    return indices or (spec.dtype.startswith(("float", "bfloat")) and len(spec.shape) > 1)
