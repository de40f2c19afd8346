"""LoCo: stages that overlap, so that each is trained by its own loss and by the next one's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from autodecouple.errors import InputError
from autodecouple.objectives.backprop import Backprop
from autodecouple.objectives.early_exit import EarlyExit
from autodecouple.objectives.objective import Objective
from autodecouple.plans import TensorSpec

LOCAL = EarlyExit()


@dataclass(frozen=True)
class LoCo:
    """Trains pairs of neighbouring stages: unit k is stages k and k+1, with a loss at its top.

        stage 0 --> stage 1 --> stage 2 --> stage 3       a loss trains its own stage and, through the gradient that it
               <--  loss 1 <--  loss 2 <--  criterion     sends one stage back, the one before; it goes no further

    So the first stage has no loss of its own, each one between is trained by two, and with two stages all is one unit,
    which is backpropagation. The price is one stage's wait: a stage is updated when the next one's loss has sent its
    gradient, and only then begins the next batch. The plan says what that leaves of the speed, and counts the gradient
    that goes back.

    local: the objective at the top of each unit but the last, which has the criterion: `EarlyExit()` classifies,
           `SupCon()` compares as the paper does (which has two views in the place of labels: `autodecouple.two_views`),
           `Downstream()` takes a few blocks like those that follow; any that encodes no signal will do
    first: let the first stage have a loss of its own, too

    Where the last stage is a detached classifier it stays so: the unit before it has the last local loss.

    Source: Xiong, Ren and Urtasun, LoCo: Local Contrastive Representation Learning (NeurIPS 2020).
    """

    name: ClassVar[str] = "loco"
    encodes: ClassVar[bool] = False
    overlaps: ClassVar[bool] = True

    local: Objective = LOCAL
    first: bool = False

    def __post_init__(self) -> None:
        local = self.local
        if not hasattr(local, "head") or isinstance(local, type) or local.name in ("bp", self.name) or local.encodes:
            raise InputError(
                f"local={local!r} must be an objective with a loss of its own that encodes no signal, like SupCon()"
            )

    def __getattr__(self, name: str) -> Any:
        """What objectives may say beside the protocol (needs_classes, input, at, ...) is the local one's to say."""
        if name.startswith("__") or name == "local":
            raise AttributeError(name)
        return getattr(self.local, name)

    def placed(self, index: int, num_hidden: int, inputs: Sequence[TensorSpec]) -> Objective:
        """The objective of one hidden stage: the first is coupled to the second, on which the first unit's loss is."""
        if index == 0 and not self.first:
            return Backprop()
        local = self.local.placed(index, num_hidden, inputs) if hasattr(self.local, "placed") else self.local
        return dataclasses.replace(self, local=local)

    def head(self, features: TensorSpec, signal: Any) -> nn.Module:
        """The local objective's head."""
        return self.local.head(features, signal)


def without_overlap(objective: Objective) -> Objective:
    """The same for a stage behind which comes something else than the next unit."""
    return objective.local if isinstance(objective, LoCo) else objective
