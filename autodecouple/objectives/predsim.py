"""PredSim: predict the class, and be alike within a class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives.deinforeg import invariance_term
from autodecouple.objectives.heads import (
    check_classes,
    check_positive,
    check_specs,
    cross_entropy,
    full_precision,
    head_dtype,
    row_weights,
    widen,
)
from autodecouple.objectives.layout import Layout, label_sizes
from autodecouple.objectives.maps import Maps, convolution
from autodecouple.objectives.rows import Rows, most_frequent
from autodecouple.plans import TensorSpec


@dataclass(frozen=True)
class PredSim:
    """Cross-entropy of a linear classifier, and similarity matching (the loss of Nokland and Eidnes).

    loss = (1 - beta) CE(W pool(h), y) + beta mean over N x N of (S(x) - S(onehot y))^2

    with S(x) the cosines between the rows of x, each row centred first, clamped to [-1, 1], and x what a 3x3
    convolution makes of h: of maps and sequences the deviation of each channel over the positions (tokens that the mask
    leaves out do not count), so (N, C); a vector has a linear layer in place of the convolution. Where tokens or
    positions have labels of their own, each of them is a row of x, and a token's convolution sees no other token.
    Rows with a label below 0 are left out of both terms.

    beta:     0.99 as published: the similarity is small in size. 0 or 1 leaves a term out
    width:    most inputs of the classifier, which starts at zero: maps are pooled to as many cells as that allows
    max_rows: positions of a batch that are used where each has a label, at equal distances; None: all

    Source: Nokland and Eidnes, Training Neural Networks with Local Error Signals (2019).
    """

    name: ClassVar[str] = "predsim"
    encodes: ClassVar[bool] = False

    beta: float = 0.99
    width: int = 4096
    max_rows: int | None = 1021

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta={self.beta!r} must lie between 0 (prediction alone) and 1 (similarity alone)")
        check_positive(width=self.width, max_rows=self.max_rows)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank and class indices per row, token or position, of a known number."""
        check_specs(self.name, features, signal)
        num_classes = check_classes(self.name, signal)
        predict = Prediction(features, signal, num_classes, self) if self.beta < 1 else None
        similar = Similarity(features, signal, num_classes, self) if self.beta > 0 else None
        return PredSimHead(predict, similar, self.beta)


class PredSimHead(nn.Module):
    """Both terms."""

    def __init__(self, predict: Prediction | None, similar: Similarity | None, beta: float) -> None:
        super().__init__()
        self.predict = predict
        self.similar = similar
        self.beta = beta

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        terms = []
        if self.predict is not None:
            terms.append((1 - self.beta) * self.predict(features, signal, mask))
        if self.similar is not None:
            terms.append(self.beta * self.similar(features, signal, mask))
        return sum(terms[1:], terms[0]), signal


class Prediction(nn.Module):
    """Cross-entropy of a linear classifier on pooled features."""

    def __init__(self, features: TensorSpec, signal: TensorSpec, num_classes: int, objective: PredSim) -> None:
        super().__init__()
        self.rows = Rows(features, signal, _cells(features, objective.width), objective.max_rows)
        self.classifier = nn.Linear(self.rows.width, num_classes, dtype=head_dtype(features))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, labels = self.rows(features, signal, mask)
        logits: Tensor = self.classifier(rows)
        with full_precision(logits):
            return cross_entropy(widen(logits), labels)


class Similarity(nn.Module):
    """How far the similarities of the rows are from those of their labels."""

    def __init__(self, features: TensorSpec, signal: TensorSpec, num_classes: int, objective: PredSim) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.maps = Maps(features, label_sizes(signal))
        layout = self.maps.layout
        self.rows = Rows(features, signal, None, objective.max_rows, layout) if layout.dense else None
        kernel = 1 if layout.dense and layout.has_tokens else 3
        dims, width = len(layout.positions), layout.width
        self.conv = convolution(dims, width, width, kernel, bias=False, dtype=head_dtype(features))

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask if self.maps.layout.has_tokens else None
        maps: Tensor = self.conv(self.maps(features, mask))
        if self.rows is not None:
            rows, labels = self.rows(maps, signal, mask)
        else:
            rows, labels = deviations(widen(maps), mask), most_frequent(signal)
        with full_precision(rows):
            return invariance_term(widen(rows), labels, row_weights(labels >= 0, rows.dtype), self.num_classes)


def deviations(maps: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N, C): the deviation over the positions of maps (N, C, ...) that count, unbiased; what has one is flattened."""
    if maps.ndim == 2 or math.prod(maps.shape[2:]) == 1:
        return maps.flatten(1)
    values = maps.flatten(2)
    counts = torch.ones_like(values[:, :1]) if mask is None else mask.unsqueeze(1).to(values.dtype)
    number = counts.sum(2, keepdim=True)
    centred = (values - (values * counts).sum(2, keepdim=True) / number.clamp(min=1)) * counts
    variance = centred.square().sum(2) / (number.squeeze(2) - 1).clamp(min=1)
    varies = variance > 0
    return torch.where(varies, variance, 1.0).sqrt() * varies  # the root has no slope at 0


def _cells(features: TensorSpec, width: int) -> int:
    """Cells per spatial dimension with at most so many values, as many as the smallest has positions at most."""
    layout = Layout.of(features)
    dims = len(layout.positions)
    if dims < 2:
        return 1
    fitting = math.floor(math.pow(width / layout.width, 1 / dims) + 1e-9)
    return max(1, min(fitting, *layout.positions))
