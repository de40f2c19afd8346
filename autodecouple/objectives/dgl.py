"""Decoupled greedy learning: an auxiliary network with cross-entropy on every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autodecouple.objectives.heads import (
    Projector,
    check_choice,
    check_classes,
    check_positive,
    check_specs,
    cross_entropy,
    full_precision,
    head_dtype,
    widen,
)
from autodecouple.objectives.maps import Neck
from autodecouple.objectives.rows import Rows
from autodecouple.plans import TensorSpec

NETS = ("mlp-sr", "mlp", "cnn")
PERCEPTRON_LAYERS = 3


@dataclass(frozen=True)
class DGL:
    """Cross-entropy of an auxiliary network on the stage's features, mean over the labels; the gradient stays here.

    net="mlp-sr": means over windows of 4 positions, three [1x1 convolution, BatchNorm, ReLU], means over 2x2 cells, a
                  perceptron of three hidden layers with BatchNorm, as wide as what comes in
       "mlp":     the perceptron on the 2x2 cells alone
       "cnn":     two [3x3 convolution, BatchNorm, ReLU], means over 2x2 cells, a linear classifier
    In sequences the convolutions are one-dimensional and no positions are averaged before the pooling, vectors have
    linear layers in their place. Where tokens have labels of their own every one of them is classified, from its own
    features alone; a position of a grid is classified where the windows leave one (see `Neck` and `Rows`). Labels below
    0 do not count.

    pool:     cells per spatial dimension (see `Pool`)
    width:    of the perceptron's layers; None: that of what comes in, four times the channels of a map
    max_rows: positions of a batch that are classified, at equal distances; None: all

    Source: Belilovsky and others, Decoupled Greedy Learning of CNNs (2020). Why these defaults: "mlp-sr" is what its
    published accuracies have, and it costs little where resolution is high.
    """

    name: ClassVar[str] = "dgl"
    encodes: ClassVar[bool] = False

    net: str = "mlp-sr"
    pool: int = 2
    width: int | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_choice("net", self.net, NETS)
        check_positive(pool=self.pool, width=self.width, max_rows=self.max_rows)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank and class indices per row, token or position, of a known number."""
        check_specs(self.name, features, signal)
        num_classes = check_classes(self.name, signal)
        channels = Neck(features, signal, ()).layout.width
        if self.net == "mlp-sr":
            neck = Neck(features, signal, [channels] * 3, shrink=4)
        else:
            neck = Neck(features, signal, [channels] * 2 if self.net == "cnn" else (), kernel=3)
        rows = Rows(features, signal, self.pool, self.max_rows, neck.layout)
        hidden = () if self.net == "cnn" else (self.width or rows.width,) * PERCEPTRON_LAYERS
        classifier = Projector(rows.width, (*hidden, num_classes), batch_norm=True, dtype=head_dtype(features))
        return DGLHead(neck, rows, classifier)


class DGLHead(nn.Module):
    """Convolutions, rows, classifier, cross-entropy."""

    def __init__(self, neck: Neck, rows: Rows, classifier: Projector) -> None:
        super().__init__()
        self.neck = neck
        self.rows = rows
        self.classifier = classifier

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, labels = self.rows(self.neck(features, mask), signal, mask)
        logits: Tensor = self.classifier(rows, labels >= 0)
        with full_precision(logits):
            return cross_entropy(widen(logits), labels), signal
