"""Greedy InfoMax: every stage predicts some of its features from others, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives.heads import (
    IGNORED,
    check_features,
    check_positive,
    cross_entropy,
    full_precision,
    head_dtype,
    widen,
)
from autodecouple.objectives.maps import Maps
from autodecouple.objectives.pool import mean_cells
from autodecouple.objectives.rows import thinned
from autodecouple.plans import TensorSpec


@dataclass(frozen=True)
class InfoNCE:
    """Contrastive prediction of positions further on: self-supervised, the target is not looked at (Greedy InfoMax).

    With z_t the features at row t of a map or at position t of a sequence, and d the distances,

    loss = mean over d of mean over t of -log(exp(z_t . W_d z_{t+d}) / sum over u of exp(z_t . W_d z_u))

    Maps are averaged over a grid of cells first, and rows predict the rows below them, in the same column; sequences
    run one way. u goes over all the positions of the batch that are compared at that distance. The published code draws
    16 of them instead; nothing is drawn here, so that the loss is the same whatever executor runs it.

    steps:    how many distances: 1 to `steps` positions of a sequence, and `skip` rows more in a map, 2 to 6
    skip:     rows of a map that are left out between the two, since neighbours overlap; a map of few rows has as many
              distances as fit, at least that of 1
    grid:     most cells per dimension of a map: 7, as the published 64x64 images have patches
    max_rows: positions of a batch that are compared at each distance, at equal steps among them

    Where it is no use: features that already hold what follows (a bidirectional LSTM, attention to all positions) are
    easily predicted. The original cuts images into patches that see nothing of each other, which a compiler of any
    model cannot; vectors have no positions, and a cut that carries one is not chosen.
    Source: Lowe, O'Connor and Veeling, Putting an End to End-to-End (2019). The last stage has the criterion, where the
    original has none; `detach_classifier=True` trains every layer but the classifier without labels.
    """

    name: ClassVar[str] = "infonce"
    encodes: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    steps: int = 5
    skip: int = 1
    grid: int = 7
    max_rows: int = 1021

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, skip=self.skip or None, grid=self.grid, max_rows=self.max_rows)

    def head(self, features: TensorSpec, signal: TensorSpec) -> nn.Module:
        """A head for features with positions; InputError for vectors, and for maps or sequences of one position."""
        check_features(self.name, features)
        maps = Maps(features)
        distances = self.distances(maps)
        if not distances:
            raise InputError(
                f"{self.name!r} predicts positions from others, but {features} has no two of them one after the other:"
                " cut elsewhere, or take another objective for this stage"
            )
        return InfoNCEHead(self, maps, distances, head_dtype(features))

    def distances(self, maps: Maps) -> tuple[int, ...]:
        """Those that fit into the example: from row to row of the grid, from position to position of a sequence."""
        length = next(iter(maps.layout.positions), 0)
        if not maps.layout.has_tokens:
            length = min(length, self.grid)
        skip = 0 if maps.layout.has_tokens else min(self.skip, max(0, length - 2))
        return tuple(skip + step for step in range(1, self.steps + 1) if skip + step < length)


class InfoNCEHead(nn.Module):
    """A grid of cells, a prediction for each distance, and cross-entropy of which one was predicted."""

    def __init__(self, objective: InfoNCE, maps: Maps, distances: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.maps = maps
        self.cells = None if maps.layout.has_tokens else objective.grid
        self.max_rows = objective.max_rows
        self.distances = distances
        width = maps.layout.width
        self.predict = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=dtype) for _ in distances)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        maps: Tensor = self.maps(features, mask)
        if self.cells is not None:
            for dim in range(2, maps.ndim):
                maps = mean_cells(maps, dim, min(self.cells, maps.shape[dim]))
        counts = mask if mask is not None and self.maps.layout.has_tokens else None
        losses = [
            self._loss(maps, counts, distance, predict)
            for distance, predict in zip(self.distances, self.predict, strict=True)
            if distance < maps.shape[2]  # a batch of short sequences has fewer distances, or none
        ]
        return torch.stack(losses).mean() if losses else 0 * maps.sum(), signal

    def _loss(self, maps: Tensor, counts: Tensor | None, distance: int, predict: nn.Module) -> Tensor:
        """At one distance.

        z_0 --> z_2    z_t is compared with the predictions of all the positions u that are compared, of which t + d is
        z_1 --> z_3    the right one
        """
        context, future = _rows(maps[:, :, :-distance]), _rows(maps[:, :, distance:])
        used = torch.ones(len(context), dtype=torch.bool, device=maps.device)
        if counts is not None:
            used = (counts[:, :-distance] & counts[:, distance:]).flatten()
        if len(context) > self.max_rows:
            chosen = thinned(used, self.max_rows)
            context, future, used = context[chosen], future[chosen], used[chosen]
        predicted: Tensor = predict(future)
        with full_precision(predicted):
            logits = widen(context) @ widen(predicted).T
            logits = logits.masked_fill(~used, torch.finfo(logits.dtype).min)
            labels = torch.arange(len(logits), device=maps.device).masked_fill(~used, IGNORED)
            return cross_entropy(logits, labels)


def _rows(maps: Tensor) -> Tensor:
    """(N, C, ...) to (N * ..., C)."""
    return maps.movedim(1, -1).flatten(0, -2)
