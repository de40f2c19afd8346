"""Features as maps, and what auxiliary networks are built of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autodecouple.objectives.heads import RowNorm, head_dtype, widen
from autodecouple.objectives.layout import Layout, label_sizes
from autodecouple.objectives.pool import mean_cells
from autodecouple.plans import TensorSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convolution(
    dims: int, in_width: int, width: int, kernel: int = 1, *, stride: int = 1, bias: bool = True, dtype: torch.dtype
) -> nn.Module:
    """A convolution over so many dimensions that keeps their sizes (at stride 1); over none a linear layer."""
    if dims == 0:
        return nn.Linear(in_width, width, bias=bias, dtype=dtype)
    return CONVOLUTIONS[dims - 1](in_width, width, kernel, stride, padding=kernel // 2, bias=bias, dtype=dtype)


class Maps(nn.Module):
    """Features of any rank as maps (N, width, *positions), at least float32; vectors have no positions.

    Tokens that the mask leaves out are zeros. layout tells what comes out
    """

    def __init__(self, features: TensorSpec, labels: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.given = Layout.of(features, labels)
        self.layout = map_layout(self.given, self.given.width, self.given.positions)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = widen(self.given.arrange(features))
        return silence(maps, mask if self.given.has_tokens else None)


class Neck(nn.Module):
    """Maps of features behind a few [convolution, batch normalisation, ReLU]; layout tells what comes out.

    widths: of each of them; kernel, stride: of each convolution; shrink: maps are first averaged over this many
    positions along each dimension, rounded up

    Sequences keep their length, since the mask counts tokens. Where tokens have labels of their own nothing mixes
    them: the head of a language model would see the word that it is to predict. Normalised is by all positions, also
    by those whose label does not count: behind a convolution there is no telling which these are.
    """

    def __init__(
        self,
        features: TensorSpec,
        signal: TensorSpec,
        widths: Sequence[int],
        kernel: int = 1,
        stride: int = 1,
        shrink: int = 1,
    ) -> None:
        super().__init__()
        self.maps = Maps(features, label_sizes(signal))
        given, dtype = self.maps.layout, head_dtype(features)
        if given.has_tokens:
            kernel, stride, shrink = (1 if given.dense else kernel), 1, 1
        self.cells = tuple(-(-size // shrink) for size in given.positions)
        self.shrinks = self.cells != given.positions
        blocks, sizes, last = [], self.cells, given.width
        for width in widths:
            conv = convolution(len(sizes), last, width, kernel, stride=stride, bias=False, dtype=dtype)
            blocks.append(Block(conv, MapNorm(width, dtype=dtype)))
            sizes, last = tuple(-(-size // stride) for size in sizes), width
        self.blocks = nn.ModuleList(blocks)
        self.layout = map_layout(given, last, sizes)

    def spec(self, features: TensorSpec) -> TensorSpec:
        """Of what `restored` gives at the example."""
        rows, dtype = features.shape[features.batch_dim or 0], str(head_dtype(features)).removeprefix("torch.")
        width, *positions = self.layout.sizes
        shape = (*positions, width) if self.layout.has_tokens else (width, *positions)
        return TensorSpec(features.name, (rows, *shape), dtype)

    def restored(self, maps: Tensor) -> Tensor:
        """Maps of sequences as tokens (N, T, width), as other heads read them; all others as they are."""
        return maps.movedim(1, -1) if self.layout.has_tokens else maps

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask if self.maps.layout.has_tokens else None
        maps: Tensor = self.maps(features, mask)
        if self.shrinks:
            for dim, cells in enumerate(self.cells, start=2):
                maps = mean_cells(maps, dim, cells)
        for block in self.blocks:
            maps = block(maps, mask)
        return maps


class Block(nn.Module):
    """Convolution, batch normalisation by the tokens that count, ReLU."""

    def __init__(self, conv: nn.Module, norm: MapNorm) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        return silence(self.norm(self.conv(maps), mask).relu(), mask)


class MapNorm(RowNorm):
    """Batch normalisation of maps (N, width, *positions) by the tokens (N, T) that count; by all without a mask."""

    def forward(self, input: Tensor, counts: Tensor | None = None) -> Tensor:
        if counts is None and input.shape[1] < input.numel():
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        rows = input.movedim(1, -1)
        normal: Tensor = super().forward(rows.flatten(0, -2), None if counts is None else counts.flatten())
        return normal.reshape(rows.shape).movedim(-1, 1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on."""


def silence(maps: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where a token does not count; not a product, since padding may hold inf or NaN."""
    return maps if mask is None else maps.masked_fill(~mask.unsqueeze(1), 0)


def map_layout(given: Layout, width: int, positions: tuple[int, ...]) -> Layout:
    """The layout of maps (N, width, *positions) made of features that were given."""
    return Layout(0, (width, *positions), channels_last=not positions, dense=given.dense, prefix=given.prefix)
