"""SCPL: supervised contrastive learning in every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autodecouple.objectives.heads import (
    PROJECTORS,
    Projector,
    check_choice,
    check_positive,
    check_specs,
    full_precision,
    head_dtype,
    unit_rows,
    widen,
)
from autodecouple.objectives.rows import Rows
from autodecouple.objectives.together import Together
from autodecouple.plans import TensorSpec

NORMALISATIONS = ("code", "eq2", "alg1")


@dataclass(frozen=True)
class SupCon:
    """Pulls features of one class together and pushes the rest of the batch away (the loss of SCPL).

    With z the embeddings' rows at length 1, P(i) the other rows of anchor i's class, and
    s(i) = -sum over p in P(i) of log(exp(z_i.z_p / temperature) / sum over j != i of exp(z_i.z_j / temperature)):

    normalisation="code": mean over i of s(i) / (|P(i)| + 1); what the released code computes
                  "eq2":  sum over i of s(i) / |P(i)|; the paper's equation 2, which grows with the batch
                  "alg1": mean over i of s(i), over the number of pairs of one class in the batch, self-pairs
                          included; the paper's algorithm 1 (for balanced classes "code" / N)

    An anchor alone in its class adds 0, a batch of such anchors (or of one row) has loss 0 and gradient 0. Where tokens
    or positions have labels of their own, each is a row (see `Rows`). Rows with a label below 0 are neither anchors nor
    positives nor negatives.

    temperature: 0.1 as in the paper
    pool:        cells per spatial dimension, None flattens (see `Pool`)
    projector:   "mlp" (Linear-ReLU-Linear, `hidden` then `out` wide), "linear" (`out` wide) or "identity"
    max_rows:    positions of a batch that are compared, at equal distances; None: all. A batch of one label per row is
                 compared whole

    Source: SCPL (CIKM 2023), its paper and its released code, after the contrastive loss of Khosla and others (2020).
    Why these defaults: "code" is what the published accuracies were measured with. The paper flattens into 512-1024;
    pooling to 2x2 and 128 outputs keep the head small against early stages. Wants large batches: a class needs two
    rows to give a loss. The similarities of 1021 rows take 4 MB, those of all positions of eight 64x64 maps 4 GB; and
    1021 is a prime, so that the distances are no divisor of the usual sizes and the rows lie all over them.
    """

    name: ClassVar[str] = "supcon"
    encodes: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False

    temperature: float = 0.1
    normalisation: str = "code"
    pool: int | None = 2
    projector: str = "mlp"
    hidden: int = 512
    out: int = 128
    max_rows: int | None = 1021

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature, pool=self.pool, hidden=self.hidden, out=self.out)
        check_positive(max_rows=self.max_rows)
        check_choice("normalisation", self.normalisation, NORMALISATIONS)
        check_choice("projector", self.projector, PROJECTORS)

    @staticmethod
    def paper() -> SupCon:
        """The head of the SCPL code for images: flatten, then 512-1024; sizes must be fixed."""
        return SupCon(pool=None, out=1024)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features of any rank and class indices per row, token or position, however many there are."""
        check_specs(self.name, features, signal)
        rows = Rows(features, signal, self.pool, self.max_rows)
        projector = Projector(rows.width, (self.hidden, self.out), self.projector, dtype=head_dtype(features))
        return SupConHead(rows, projector, self.temperature, self.normalisation)


class SupConHead(nn.Module):
    """Rows, projector, contrastive loss; counts the batches that held nothing to learn from.

    `batches_without_positives` is a tensor on the head's device: warning about it here would wait for the device in
    the middle of a stage, and from a thread that is not the caller's. Whoever drains the pipeline may read it.
    """

    batches_without_positives: Tensor

    def __init__(self, rows: Rows, projector: Projector, temperature: float, normalisation: str) -> None:
        super().__init__()
        self.rows = rows
        self.projector = projector
        self.together = Together()
        self.temperature = temperature
        self.normalisation = normalisation
        self.register_buffer("batches_without_positives", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, labels = self.rows(features, signal, mask)
        embeddings, labels = self.together(self.projector(rows), labels)
        with full_precision(embeddings):
            units = unit_rows(widen(embeddings))
            # The sum, 0 or NaN: without positives the loss would hide features that are not finite, its gradient not.
            return self._loss(units, labels) + 0 * units.sum(), signal

    def _loss(self, units: Tensor, labels: Tensor) -> Tensor:
        counts = labels >= 0
        myself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        positives = (labels.unsqueeze(1) == labels) & counts & ~myself
        self.batches_without_positives.add_(~positives.any())
        similarity = units @ units.T / self.temperature
        # Not -inf: a batch of one row would be left with nothing, and its gradient would be NaN.
        others = similarity.masked_fill(myself | ~counts, torch.finfo(similarity.dtype).min)
        scores = others.log_softmax(1).masked_fill(~positives, 0).sum(1)
        sizes, num_anchors = positives.sum(1), counts.sum().clamp(min=1)
        if self.normalisation == "code":
            return -(scores / (sizes + 1)).sum() / num_anchors
        if self.normalisation == "eq2":
            return -(scores / sizes.clamp(min=1)).sum()
        return -scores.sum() / num_anchors / (positives.sum() + num_anchors)
