"""Early Exit: every stage is a classifier of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autodecouple.objectives.heads import (
    check_choice,
    check_classes,
    check_positive,
    check_specs,
    cross_entropy,
    full_precision,
    head_dtype,
    widen,
)
from autodecouple.objectives.rows import Rows
from autodecouple.objectives.together import Together
from autodecouple.plans import TensorSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


@dataclass(frozen=True)
class EarlyExit:
    """Cross-entropy of a classifier on the stage's features, mean over the labels; the gradient stays in the stage.

    Where tokens or positions have labels of their own, every one of them is classified (see `Rows`). Labels below 0 do
    not count.

    pool:       cells per spatial dimension, None flattens (see `Pool`); nothing is pooled for labels per position
    hidden:     width of the layer before the classes; None: the classifier is linear
    activation: after the hidden layer: "relu", "sigmoid" or "tanh"
    max_rows:   positions of a batch that are classified, at equal distances; None: all. A language model of 50,000
                words has 200 kB of scores per token at every stage

    Source: the Early Exit baseline of the SCPL paper, after BranchyNet (which trains all exits jointly, without
    stopping gradients; that is not this). Its text describes it and no code is released. Why these defaults: the
    pooled MLP reached 63.6 % where a pooled linear classifier reached 59.7 %, at no more time (CIFAR-10, 4 stages).
    """

    name: ClassVar[str] = "early_exit"
    encodes: ClassVar[bool] = False

    pool: int | None = 2
    hidden: int | None = 512
    activation: str = "relu"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_positive(pool=self.pool, hidden=self.hidden, max_rows=self.max_rows)
        check_choice("activation", self.activation, list(ACTIVATIONS))

    @staticmethod
    def paper() -> EarlyExit:
        """The classifier of the SCPL code for images: flatten, 500 wide, sigmoid; sizes must be fixed."""
        return EarlyExit(pool=None, hidden=500, activation="sigmoid")

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank and class indices per row, token or position, of a known number."""
        check_specs(self.name, features, signal)
        num_classes, dtype = check_classes(self.name, signal), head_dtype(features)
        rows = Rows(features, signal, self.pool, self.max_rows)
        if self.hidden is None:
            return EarlyExitHead(rows, nn.Linear(rows.width, num_classes, dtype=dtype))
        first = nn.Linear(rows.width, self.hidden, dtype=dtype)
        last = nn.Linear(self.hidden, num_classes, dtype=dtype)
        return EarlyExitHead(rows, nn.Sequential(first, ACTIVATIONS[self.activation](), last))


class EarlyExitHead(nn.Module):
    """Rows, classifier, cross-entropy."""

    predicts = True

    def __init__(self, rows: Rows, classifier: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.classifier = classifier
        self.together = Together()

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, labels = self.rows(features, signal, mask)
        logits, labels = self.together(self.classifier(rows), labels)
        with full_precision(logits):
            return cross_entropy(widen(logits), labels), signal

    def predict(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of the classes, (N, C) or (N, *positions, C)."""
        scores: Tensor = self.classifier(self.rows.vectors(features, mask))
        return scores
