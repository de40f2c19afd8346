"""Features of one shape as features of another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autodecouple.objectives.heads import head_dtype
from autodecouple.objectives.layout import MOST_DIMS, Layout
from autodecouple.objectives.pool import mean_cells
from autodecouple.plans import TensorSpec


class Adapter(nn.Module):
    """Brings features to the shape, the layout and the dtype of others; nothing where they are the same.

    Positions are averaged over the cells of the coarser ones or repeated where they become finer; where they differ in
    kind (grids, tokens, vectors) they are taken in one row. Channels are mapped linearly where their number differs. So
    no token sees another one unless their number changes, and a causal model stays so. Sizes at run time need not be
    those of the example: positions keep the ratio that they have there.

    labels:  sizes of the positions that have labels, () for none (see `Layout`)
    project: map channels also where the shapes are the same
    """

    def __init__(
        self, source: TensorSpec, target: TensorSpec, labels: tuple[int, ...] = (), *, project: bool = False
    ) -> None:
        super().__init__()
        self.source, self.target = Layout.of(source, labels), Layout.of(target, labels)
        self.sizes = tuple(size for dim, size in enumerate(target.shape) if dim != target.batch_dim)
        self.dtype: torch.dtype = getattr(torch, target.dtype)
        same = source.shape == target.shape and source.batch_dim == target.batch_dim
        self.is_identity = same and not project and source.dtype == target.dtype
        widths = self.source.width, self.target.width
        needed = project or widths[0] != widths[1]
        self.linear = nn.Linear(*widths, dtype=head_dtype(target)) if needed else None

    def forward(self, features: Tensor) -> Tensor:
        if self.is_identity:
            return features
        channels = self._resized(self.source.arrange(features))
        if self.linear is not None:
            rows = channels.movedim(1, -1).to(self.linear.weight.dtype)
            channels = self.linear(rows).movedim(-1, 1)
        return self._laid_out(channels)

    def _resized(self, channels: Tensor) -> Tensor:
        """(N, width, *positions) with the target's positions."""
        ours, theirs = self.source.positions, self.target.positions
        if len(ours) != len(theirs):
            row = channels.flatten(2) if ours else channels.unsqueeze(2)
            row = _cells(row, 2, math.prod(theirs))
            return row.unflatten(2, theirs) if theirs else row.squeeze(2)
        for dim, (before, after) in enumerate(zip(ours, theirs, strict=True), start=2):
            if before != after:
                channels = _cells(channels, dim, max(1, channels.shape[dim] * after // before))
        return channels

    def _laid_out(self, channels: Tensor) -> Tensor:
        """The inverse of the target's `Layout.arrange`."""
        if self.target.is_complex:
            real, imaginary = channels.to(self.dtype.to_real()).chunk(2, 1)
            channels = torch.complex(real.contiguous(), imaginary.contiguous())
        laid = channels.movedim(1, -1) if self.target.channels_last else channels
        token_dim, sizes = self.target.token_dim, self.sizes
        if token_dim is not None:
            others = (*sizes[: token_dim - 1], *sizes[token_dim:])
            laid = (laid.unflatten(2, others) if others else laid.squeeze(2)).movedim(1, token_dim)
        elif len(sizes) >= MOST_DIMS:
            laid = laid.unflatten(MOST_DIMS - 1, sizes[MOST_DIMS - 2 :])
        return laid.movedim(0, self.target.batch_dim).to(self.dtype)


def _cells(grid: Tensor, dim: int, cells: int) -> Tensor:
    return grid if grid.shape[dim] == cells else mean_cells(grid, dim, cells)
