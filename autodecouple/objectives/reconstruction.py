"""Decoders: the model's input from a stage's features, and how far off that is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.objectives.heads import cross_entropy, full_precision, head_dtype, widen
from autodecouple.objectives.layout import Layout
from autodecouple.objectives.maps import Block, MapNorm, Maps, convolution
from autodecouple.objectives.pool import Pool
from autodecouple.objectives.rows import Rows
from autodecouple.plans import TensorSpec

RECONSTRUCTIONS = ("mse", "bce")
COARSE = 4
"""Cells per dimension of an input that features without its positions reconstruct."""
MODES = ("linear", "bilinear", "trilinear")


class Rebuilding(Protocol):
    """What a decoder goes by: see `InfoPro`."""

    @property
    def error(self) -> str: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def max_rows(self) -> int | None: ...


def decoder(features: TensorSpec, given: TensorSpec, how: Rebuilding) -> nn.Module:
    """A module (features, input, mask=None) -> loss for this input."""
    if given.num_classes is not None:
        rows = Rows(features, given, max_rows=how.max_rows)
        kind = TokenDecoder if rows.layout.dense else BagDecoder
        return kind(rows, given.num_classes, head_dtype(features))
    error = NumberError(given, how)
    target = Layout.of(given)
    found = Layout.of(features, target.positions)
    if found.dense and target.positions:
        return MapDecoder(features, target, how.channels, error)
    return CoarseDecoder(features, given, error)


class TokenDecoder(nn.Module):
    """The index at every position, from the features there."""

    def __init__(self, rows: Rows, vocabulary: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        self.classifier = nn.Linear(rows.width, vocabulary, dtype=dtype)

    def forward(self, features: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, indices = self.rows(features, given.long(), mask)
        logits: Tensor = self.classifier(rows)
        with full_precision(logits):
            return cross_entropy(widen(logits), indices)


class BagDecoder(TokenDecoder):
    """All the indices of a row, from one vector: mean cross-entropy over them; a mask of the features is not theirs."""

    def forward(self, features: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.classifier(self.rows(features, given.long(), mask)[0])
        with full_precision(logits):
            scores = widen(logits).log_softmax(1)
            return -scores.gather(1, given.long().reshape(len(given), -1)).mean()


class NumberError(nn.Module):
    """Mean error of a reconstruction of (N, C, *positions); sizes at the example are those of `given`."""

    mean: Tensor
    std: Tensor

    def __init__(self, given: TensorSpec, how: Rebuilding) -> None:
        super().__init__()
        self.kind = how.error
        width = Layout.of(given).width
        if how.mean and len(how.mean) != width:
            raise InputError(f"mean={how.mean!r} has {len(how.mean)} channels, but the input {given} has {width}")
        dtype = head_dtype(given)
        self.register_buffer("mean", torch.tensor(how.mean or (0.0,), dtype=dtype), persistent=False)
        self.register_buffer("std", torch.tensor(how.std or (1.0,), dtype=dtype), persistent=False)

    def restored(self, given: Tensor) -> Tensor:
        """What is to be reconstructed; "bce" takes the image as it was before it was normalised, within [0, 1]."""
        if self.kind == "mse":
            return given
        shape = (1, -1, *[1] * (given.ndim - 2))
        return (given * self.std.reshape(shape) + self.mean.reshape(shape)).clamp(0, 1)

    def forward(self, found: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
        with full_precision(found):
            error = F.mse_loss if self.kind == "mse" else F.binary_cross_entropy_with_logits
            losses = error(widen(found), wanted.to(widen(found).dtype), reduction="none")
            if mask is None:
                return losses.mean()
            counts = mask.unsqueeze(1).expand_as(losses)
            return losses.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


class MapDecoder(nn.Module):
    """Interpolation to the input's positions, and two convolutions."""

    def __init__(self, features: TensorSpec, target: Layout, channels: int, error: NumberError) -> None:
        super().__init__()
        self.maps = Maps(features, target.positions)
        self.target = target
        self.error = error
        self.dims, dtype, width = len(target.positions), head_dtype(features), self.maps.layout.width
        first = convolution(self.dims, width, channels, 3, bias=False, dtype=dtype)
        self.block = Block(first, MapNorm(channels, dtype=dtype))
        self.last = convolution(self.dims, channels, target.width, 3, dtype=dtype)

    def forward(self, features: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
        wanted = self.error.restored(widen(self.target.arrange(given)))
        mask = mask if self.dims == 1 and mask is not None and mask.shape[1] == wanted.shape[2] else None
        maps = self._as_grid(self.maps(features, mask), wanted.shape[2:])
        if maps.shape[2:] != wanted.shape[2:]:
            maps = F.interpolate(maps, wanted.shape[2:], mode=MODES[self.dims - 1], align_corners=False)
        loss: Tensor = self.error(self.last(self.block(maps, mask)), wanted, mask)
        return loss

    def _as_grid(self, maps: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Tokens of an image, less those in front, at their places."""
        if self.dims == 1 or maps.ndim > 3:
            return maps
        layout = self.maps.given
        grid = layout.grid(maps.shape[2], positions)
        if grid is None:
            raise InputError(f"{maps.shape[2]} tokens are no grid for an input of {tuple(positions)}; keep its shape")
        placed: Tensor = maps[:, :, layout.prefix :].unflatten(2, grid)
        return placed


class CoarseDecoder(nn.Module):
    """The input's means over few cells, from one vector per row."""

    def __init__(self, features: TensorSpec, given: TensorSpec, error: NumberError) -> None:
        super().__init__()
        self.pool = Pool(features)
        self.cells = Pool(given, COARSE)
        self.width = self.cells.layout.width
        self.error = error
        self.linear = nn.Linear(self.pool.width, self.cells.width, dtype=head_dtype(features))

    def forward(self, features: Tensor, given: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.linear(self.pool(features, mask))
        cells = self.cells(given).unflatten(1, (self.width, -1))
        loss: Tensor = self.error(found.unflatten(1, (self.width, -1)), self.error.restored(cells))
        return loss
