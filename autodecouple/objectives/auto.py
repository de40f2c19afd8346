"""Auto: the compiler picks the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from autodecouple.errors import InputError
from autodecouple.objectives.heads import check_positive
from autodecouple.plans import TensorSpec


@dataclass(frozen=True)
class Auto:
    """The objective that suits the model, its output and the criterion; the plan's warnings say which and why.

    `early_exit` where a text has one label: on pooled tokens it trains as well as backprop does, at little cost. Else
    `downstream` where a head of one block and the output layers keeps the budget, or where targets are no classes;
    else a classifier at every stage; where nothing tells the number of classes, `supcon`.

    budget: most FLOPs of a head, as `Downstream` has it

    What it was chosen by: the tables of benchmarks/accuracy.
    """

    name: ClassVar[str] = "auto"
    encodes: ClassVar[bool] = False
    needs_graph: ClassVar[bool] = True

    budget: float = 2.0

    def __post_init__(self) -> None:
        check_positive(budget=self.budget)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """Raises InputError: without the captured model there is nothing to choose by."""
        raise InputError("'auto' chooses by the captured model: let compile(loss=\"auto\") choose")
