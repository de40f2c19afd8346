"""Features of any rank as one vector per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.objectives.heads import check_positive, widen
from autodecouple.objectives.layout import Layout
from autodecouple.plans import TensorSpec


class Pool(nn.Module):
    """Features of any rank as one vector per row, (N, width), at least float32.

    vectors (N, D): unchanged
    tokens (N, T, D): the mean over the tokens that count; a row without any gives zeros. Every 3-D tensor is read
        so: the states (layers, N, D) of a recurrent network, and also the (N, C, L) of a 1-D convolution, whose
        channels are then averaged and whose L must be fixed
    grids (N, C, H, W) and (N, C, D, H, W): means over a grid of `size` cells along each spatial dimension, fewer
        where the example is smaller; other sizes at run time are fine (the cells are those of adaptive pooling).
        Channels are last where the example looks like it (see `Layout`)

    Complex features are twice as wide: real parts, then imaginary ones.

    size=None flattens everything, as the papers do; sizes must then stay those of the example (padded tokens count
    as zeros). Why pool: on a VGG SCPL's flattening projectors hold 57.7 M parameters, the network itself 12.4 M.

    layout: of what `forward` is given, where that is not the features themselves but was made of them
    """

    def __init__(self, features: TensorSpec, size: int | None = 2, layout: Layout | None = None) -> None:
        super().__init__()
        if features.batch_dim is None:
            raise InputError(f"cannot pool {features}: it has no batch dimension")
        check_positive(pool=size)
        self.layout = layout or Layout.of(features)
        positions = self.layout.positions
        self.has_tokens = self.layout.has_tokens
        self.size = size if size is None or self.has_tokens else min([size, *positions])
        if self.size is None:
            self.width = self.layout.width * math.prod(positions)
        else:
            self.width = self.layout.width * (1 if self.has_tokens else self.size ** len(positions))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        channels = self.layout.arrange(features)
        mask = mask if self.has_tokens else None
        if mask is not None:
            channels = channels.masked_fill(~mask.unsqueeze(1), 0)  # not a product: padding may hold inf or NaN
        if self.size is None:
            return self._flatten(channels, features.shape)
        if self.has_tokens:
            return _mean_tokens(channels, mask)
        for dim in range(2, channels.ndim):
            channels = mean_cells(channels, dim, self.size)
        return widen(channels.flatten(1))

    def _flatten(self, channels: Tensor, given: torch.Size) -> Tensor:
        if math.prod(channels.shape[1:]) != self.width:
            raise InputError(
                f"pool=None flattens to the example's {self.width} values per row, but got features {tuple(given)}; "
                "keep sizes fixed, or pool (pool=2)"
            )
        in_order = channels.movedim(1, -1) if self.layout.channels_last else channels
        return widen(in_order.flatten(1))


def _mean_tokens(channels: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(channels.dtype, torch.float32)
    if mask is None:
        return channels.mean(2, dtype=dtype)
    return channels.sum(2, dtype=dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def mean_cells(grid: Tensor, dim: int, cells: int) -> Tensor:
    """Means over `cells` equal windows along a dimension, which overlap by one where it is no multiple.

    Equal to adaptive average pooling, whose backward on CUDA refuses torch.use_deterministic_algorithms(True).
    """
    length, dtype = grid.shape[dim], torch.promote_types(grid.dtype, torch.float32)
    if length % cells == 0:
        split: Tensor = grid.unflatten(dim, (cells, length // cells))
        return split.mean(dim + 1, dtype=dtype)
    if cells % length == 0:
        repeated = grid.unsqueeze(dim + 1).expand(*grid.shape[: dim + 1], cells // length, *grid.shape[dim + 1 :])
        return repeated.flatten(dim, dim + 1).to(dtype)
    starts = [i * length // cells for i in range(cells)]
    stops = [-(-(i + 1) * length // cells) for i in range(cells)]
    windows = [grid.narrow(dim, i, j - i) for i, j in zip(starts, stops, strict=True)]
    return torch.stack([window.mean(dim, dtype=dtype) for window in windows], dim)
