"""Features and labels as rows: what is compared with what."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives.heads import IGNORED, widen
from autodecouple.objectives.layout import Layout, label_sizes
from autodecouple.objectives.pool import Pool
from autodecouple.plans import TensorSpec


class Rows(nn.Module):
    """Pairs features with labels: `(rows, labels)`, (R, width) at least float32 and (R,), IGNORED where none counts.

    one label per row (N,): the features, pooled (see `Pool`)
    one label per token (N, T), features (N, T', D): a row per token, whose label is that of the nearest of the T;
        tokens that the mask leaves out do not count
    dense labels (N, H, W) or (N, D, H, W), features (N, C, h, w) or (N, C, d, h, w): a row per position, with the
        nearest label. Tokens (N, L, D) are such a grid where L, less a prefix, is h * w of the labels' aspect ratio
    other features, since they have no such positions: pooled, with the most frequent label of the row, the smallest
        of several

    The sizes at run time need not be the example's. Built for labels per position, one label per row (N,) is taken as
    that of all its positions; other ranks than the example's are an InputError.
    Labels below 0 do not count, and their rows are zeros: what padding holds may be inf or NaN.

    max_rows: of more positions than these only so many are used, at equal distances among those that count; one
              vector per row is never left out
    layout:   of what `forward` is given, where that is not the features themselves but was made of them
    """

    def __init__(
        self,
        features: TensorSpec,
        signal: TensorSpec,
        pool: int | None = 2,
        max_rows: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout or Layout.of(features, label_sizes(signal))
        self.pool = None if self.layout.dense else Pool(features, pool, layout)
        self.width = self.layout.width if self.pool is None else self.pool.width
        self.has_tokens = self.layout.has_tokens
        self.max_rows = max_rows
        self.num_dims = len(signal.shape)

    def forward(self, features: Tensor, signal: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(features.shape[self.layout.batch_dim], signal)
        if self.pool is not None:
            rows, labels = self.pool(features, mask), most_frequent(signal)
        else:
            channels = self.layout.arrange(features)
            labels = self._labels(channels.shape[2:], signal, mask).flatten()
            rows, labels = self._thin(channels.movedim(1, -1).flatten(0, -2), labels)
        ignored = labels < 0
        return widen(rows.masked_fill(ignored.unsqueeze(1), 0)), labels.masked_fill(ignored, IGNORED)

    def vectors(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is compared, without labels to choose by: (N, width), or (N, *positions, width) of all positions."""
        if self.pool is not None:
            return widen(self.pool(features, mask))
        return widen(self.layout.arrange(features).movedim(1, -1))

    def _check(self, num_rows: int, signal: Tensor) -> None:
        if signal.dtype != torch.int64 or signal.ndim not in (1, self.num_dims) or signal.shape[0] != num_rows:
            raise InputError(
                f"the target has shape {tuple(signal.shape)} and dtype {signal.dtype}, but the local losses were built"
                f" for int64 class indices with {self.num_dims} dimensions, the first of {num_rows} rows; pass such"
                " targets, or compile the model for these"
            )

    def _labels(self, positions: tuple[int, ...], signal: Tensor, mask: Tensor | None) -> Tensor:
        """The labels (N, P) of all P positions."""
        if signal.ndim == 1:
            labels = signal.unsqueeze(1).expand(-1, math.prod(positions))
        elif self.layout.has_tokens:
            labels = self._token_labels(positions[0], signal)
        else:
            labels = nearest(signal, positions).flatten(1)
        return labels.masked_fill(~mask, IGNORED) if mask is not None and self.layout.has_tokens else labels

    def _token_labels(self, length: int, signal: Tensor) -> Tensor:
        grid = self.layout.grid(length, signal.shape[1:])
        if grid is None:
            raise InputError(
                f"{length} tokens are no grid for labels {tuple(signal.shape)}, as they were in the example; keep the"
                " aspect ratio of images and labels"
            )
        return F.pad(nearest(signal, grid).flatten(1), (self.layout.prefix, 0), value=IGNORED)

    def _thin(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.max_rows is None or len(labels) <= self.max_rows:
            return rows, labels
        chosen = thinned(labels >= 0, self.max_rows)
        return rows[chosen], labels[chosen]


def thinned(counts: Tensor, number: int) -> Tensor:
    """Indices of so many of the rows, those that count (R,) first; without looking at how many these are."""
    order, total = (~counts).to(torch.int8).argsort(stable=True), counts.sum()
    index = torch.arange(number, device=counts.device)
    # At 1, 3, 5 ... of 2 taken parts; with few that count this is the index itself, and the ignored fill up.
    return order[(2 * index + 1) * total // (2 * total.clamp(min=1, max=number))]


def nearest(labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Labels (N, *L) at the centres of (N, *sizes): along each dimension that of floor((i + 1/2) L / size)."""
    for dim, size in enumerate(sizes, start=1):
        length = labels.shape[dim]
        if length != size:
            index = (2 * torch.arange(size, device=labels.device) + 1) * length // (2 * size)
            labels = labels.index_select(dim, index)
    return labels


def most_frequent(labels: Tensor) -> Tensor:
    """The label (N,) that each row of (N, ...) holds most, of several the smallest; below 0 where none counts."""
    if labels.ndim == 1:
        return labels
    ordered = labels.flatten(1).sort(1).values
    times = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    best = times.masked_fill(ordered < 0, 0).argmax(1, keepdim=True)
    return ordered.gather(1, best).squeeze(1)
