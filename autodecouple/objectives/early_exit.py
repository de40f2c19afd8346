"""Early Exit: every stage is a classifier of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.objectives.heads import (
    Pool,
    check_choice,
    check_positive,
    check_specs,
    full_precision,
    head_dtype,
    widen,
)
from autodecouple.plans import TensorSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


@dataclass(frozen=True)
class EarlyExit:
    """Cross-entropy of a classifier on the stage's features, mean over the batch; the gradient stays in the stage.

    pool:       cells per spatial dimension, None flattens (see `Pool`)
    hidden:     width of the layer before the classes; None: the classifier is linear
    activation: after the hidden layer: "relu", "sigmoid" or "tanh"

    Source: the Early Exit baseline of the SCPL paper, after BranchyNet (which trains all exits jointly, without
    stopping gradients; that is not this). Its text describes it and no code is released. Why these defaults: the
    pooled MLP reached 63.6 % where a pooled linear classifier reached 59.7 %, at no more time (CIFAR-10, 4 stages).
    """

    name: ClassVar[str] = "early_exit"
    encodes: ClassVar[bool] = False

    pool: int | None = 2
    hidden: int | None = 512
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_positive(pool=self.pool, hidden=self.hidden)
        check_choice("activation", self.activation, list(ACTIVATIONS))

    @staticmethod
    def paper() -> EarlyExit:
        """The classifier of the SCPL code for images: flatten, 500 wide, sigmoid; sizes must be fixed."""
        return EarlyExit(pool=None, hidden=500, activation="sigmoid")

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features (N, D), (N, T, D), (N, C, H, W) or (N, C, D, H, W) and class indices (N,)."""
        num_classes = check_specs(self.name, features, signal)
        pool, dtype = Pool(features, self.pool), head_dtype(features)
        if self.hidden is None:
            return EarlyExitHead(pool, nn.Linear(pool.width, num_classes, dtype=dtype))
        first = nn.Linear(pool.width, self.hidden, dtype=dtype)
        last = nn.Linear(self.hidden, num_classes, dtype=dtype)
        return EarlyExitHead(pool, nn.Sequential(first, ACTIVATIONS[self.activation](), last))


class EarlyExitHead(nn.Module):
    """Pool, classifier, cross-entropy."""

    def __init__(self, pool: Pool, classifier: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.classifier = classifier

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.classifier(self.pool(features, mask))
        with full_precision(logits):
            return F.cross_entropy(widen(logits), signal), signal
