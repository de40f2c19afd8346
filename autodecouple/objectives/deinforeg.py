"""DeInfoReg: regularised information in every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives.heads import (
    PROJECTORS,
    Layers,
    Projector,
    RowNorm,
    check_choice,
    check_classes,
    check_positive,
    check_specs,
    cross_entropy,
    full_precision,
    head_dtype,
    row_weights,
    unit_rows,
    widen,
)
from autodecouple.objectives.rows import Rows
from autodecouple.objectives.together import Together
from autodecouple.plans import TensorSpec

CE_MODES = ("merge", "unmerge", "paper")


@dataclass(frozen=True)
class DeInfoReg:
    """Variance, invariance and covariance of the embeddings, and a little cross-entropy (the loss of DeInfoReg).

    With e the embeddings (N, D), n their rows at length 1, c = n - mean over rows of n, and S(x) the cosines between
    the rows of x, each row centred first, clamped to [-1, 1]:

    V   = mean over d of relu(1 - sqrt(var_d(c) + 1e-7)) / N    (unbiased variance; 0 for one row)
    I   = mean over N x N of (S(onehot y) - S(n))^2             (1 within a class, -1/(num_classes - 1) between)
    Cov = sum over i != j of ((c'c / N)_ij)^2 / D
    loss = variance V + invariance I + covariance Cov + alpha CE(C(e), y)

    ce="merge":   the cross-entropy reaches classifier, projector and stage; what the released code does by default
       "paper":   it trains projector and classifier only; what the paper's text says
       "unmerge": its classifier has a projector of its own on detached features; the code's other mode
    alpha=0 leaves the classifier out, as the code does after an embedding.

    Where tokens or positions have labels of their own, each is a row (see `Rows`): N counts those used, and the terms
    ask of positions what they ask of pooled rows. Rows with a label below 0 are left out of every term and of the batch
    normalisation.

    pool:       cells per spatial dimension, None flattens (see `Pool`)
    projector:  "mlp" with a layer to each of `widths`, "linear" to the last, "identity", or None: "identity" for
                tokens and else "mlp", as in the code. The classifier is Tanh-Linear on the identity, and else
                [BatchNorm-]ReLU-Linear
    batch_norm: in projector and classifier; a batch of one row takes the running statistics
    max_rows:   positions of a batch that are used, at equal distances; None: all. I compares each with each, so that
                the limit is SupCon's; a batch of one label per row is used whole

    Source: DeInfoReg, its paper and its released code. Where the two differ this is the code: equations 3-7 have
    unnormalised embeddings, 4 lacks the 1/N of V, and 5 has 1/N for 1/N^2. As rows have length 1, the deviation is at
    most about 1/sqrt(D), so V is nearly constant.
    Why these defaults: weights and alpha are the code's (the paper's table 10 favours alpha=0.01). The invariance
    target has rank num_classes - 1, so 512 is wide enough for most label sets and costs a sixteenth of 2048.
    """

    name: ClassVar[str] = "deinforeg"
    encodes: ClassVar[bool] = False

    ce: str = "merge"
    alpha: float = 0.001
    variance: float = 1.0
    invariance: float = 1.0
    covariance: float = 1.0
    pool: int | None = 2
    projector: str | None = None
    widths: tuple[int, ...] = (512, 512, 512)
    batch_norm: bool = True
    max_rows: int | None = 1021

    def __post_init__(self) -> None:
        check_choice("ce", self.ce, CE_MODES)
        check_choice("projector", self.projector, (None, *PROJECTORS))
        weights = (self.alpha, self.variance, self.invariance, self.covariance)
        for name, weight in zip(("alpha", "variance", "invariance", "covariance"), weights, strict=True):
            check_positive(**{name: weight or None})  # 0 leaves a term out
        check_positive(
            max_rows=self.max_rows, pool=self.pool, **{f"widths[{i}]": width for i, width in enumerate(self.widths)}
        )
        if not self.widths:
            raise InputError("widths=() leaves the projector without a layer; projector='identity' says that")

    @staticmethod
    def paper() -> DeInfoReg:
        """The head of the DeInfoReg code for images: flatten, then 2048-2048-2048; sizes must be fixed."""
        return DeInfoReg(pool=None, widths=(2048, 2048, 2048))

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank and class indices per row, token or position, of a known number."""
        check_specs(self.name, features, signal)
        num_classes = check_classes(self.name, signal)
        return DeInfoRegHead(self, Rows(features, signal, self.pool, self.max_rows), num_classes, head_dtype(features))

    def build_projector(self, rows: Rows, dtype: torch.dtype) -> Projector:
        kind = self.projector or ("identity" if rows.has_tokens else "mlp")
        return Projector(rows.width, self.widths, kind, self.batch_norm, dtype)


class DeInfoRegHead(nn.Module):
    """Rows, projector, classifier and the four terms."""

    def __init__(self, objective: DeInfoReg, rows: Rows, num_classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.objective = objective
        self.predicts = objective.alpha > 0
        self.num_classes = num_classes
        self.rows = rows
        self.together = Together()
        self.projector = objective.build_projector(rows, dtype)
        if objective.alpha:
            self.classifier = _classifier(self.projector, num_classes, objective.batch_norm, dtype)
            if objective.ce == "unmerge":
                self.classifier.insert(0, objective.build_projector(rows, dtype))

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, labels = self.together(
            *self.rows(features, signal, mask)
        )  # before the norms, whose statistics are theirs
        counts = labels >= 0
        embeddings = self.projector(rows, counts)
        logits = self._logits(rows, embeddings, counts) if self.objective.alpha else None
        with full_precision(embeddings):
            loss = self._terms(unit_rows(widen(embeddings)), labels)
            if logits is not None:
                loss = loss + self.objective.alpha * cross_entropy(widen(logits), labels)
        return loss, signal

    def predict(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of the classes, (N, C) or (N, *positions, C): the projector stays, as in the released code."""
        rows = self.rows.vectors(features, mask)
        flat = rows.flatten(0, -2)
        scores: Tensor = self.classifier(flat if self.objective.ce == "unmerge" else self.projector(flat))
        return scores.reshape(*rows.shape[:-1], -1)

    def _logits(self, rows: Tensor, embeddings: Tensor, counts: Tensor) -> Tensor:
        # merge:    h -- P --+-- V, I, Cov     paper:    h ------- P -- V, I, Cov     unmerge:  h ------- P -- V, I, Cov
        #                    +-- C -- CE                  detach - P -- C -- CE                   detach - P' - C -- CE
        if self.objective.ce == "paper":
            embeddings = self.projector(rows.detach(), counts)  # again: its parameters take part, the stage does not
        elif self.objective.ce == "unmerge":
            embeddings = rows.detach()
        logits: Tensor = self.classifier(embeddings, counts)
        return logits

    def _terms(self, units: Tensor, labels: Tensor) -> Tensor:
        objective, weights = self.objective, row_weights(labels >= 0, units.dtype)
        centred = units - weights @ units
        return (
            objective.variance * variance_term(centred, weights)
            + objective.invariance * invariance_term(units, labels, weights, self.num_classes)
            + objective.covariance * covariance_term(centred, weights)
        )


def variance_term(centred: Tensor, weights: Tensor) -> Tensor:
    """V: how far the deviations along the columns of (N, D) stay below 1, over the rows' number."""
    one_over_n = weights.max()  # 0 where no row counts
    variance = weights @ centred.square() / (1 - one_over_n + (one_over_n == 1))  # of one row 0, and not NaN
    return F.relu(1 - (variance + 1e-7).sqrt()).mean() * one_over_n


def invariance_term(units: Tensor, labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """I: how far the rows' cosines are from those of their one-hot labels."""
    rows = unit_rows(units - units.mean(1, keepdim=True))
    cosines = (rows @ rows.T).clamp(-1, 1)
    within = 1.0 if num_classes > 1 else 0.0  # the one-hot of a single class is centred to zero
    between = -1 / max(num_classes - 1, 1)
    # Not where(same, within, between): of two Python numbers that is float32, also for float64 features.
    gaps = torch.where(labels.unsqueeze(1) == labels, within - cosines, between - cosines)
    return weights @ gaps.square() @ weights


def covariance_term(centred: Tensor, weights: Tensor) -> Tensor:
    """Cov: the squared covariances between different columns of (N, D)."""
    squares = (centred.T @ (centred * weights.unsqueeze(1))).square()
    return (squares.sum() - squares.diagonal().sum()) / centred.shape[1]


def _classifier(projector: Projector, num_classes: int, batch_norm: bool, dtype: torch.dtype) -> Layers:
    last = nn.Linear(projector.width, num_classes, dtype=dtype)
    if len(projector) == 0:
        return Layers(nn.Tanh(), last)
    norm = [RowNorm(projector.width, dtype=dtype)] if batch_norm else []
    return Layers(*norm, nn.ReLU(), last)
