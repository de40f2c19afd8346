"""Which dimension of the features is which, as far as shapes tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autodecouple.plans import TensorSpec

MOST_DIMS = 5
"""Further dimensions are folded into the last of these: (N, C, D, H, W)."""

PREFIXES = (0, 1, 2, 5)
"""Tokens in front of an image's patches: none, a class token, one of distillation too, a class token and registers."""


@dataclass(frozen=True)
class Layout:
    """How heads read features: as vectors (N, D), tokens (N, T, D) or grids (N, C, H, W) and (N, C, D, H, W).

    batch_dim:     dimension of the rows
    sizes:         the other dimensions at the example, at most four
    is_complex:    real and imaginary parts become channels of their own
    channels_last: channels lie behind the positions: so in tokens, and in grids that look like it
    dense:         every position has a label of its own
    prefix:        tokens in front that belong to no position of the labels' grid
    token_dim:     dimension, once rows are in front, of as many tokens as have labels; the others are their channels

    A grid's channels are last where the sizes before them, and not those behind the first, have the aspect ratio of
    the labels, or of a square where labels have no positions. Tokens with labels (N, T) may lie in any dimension of
    size T at the example, so that convolutions (N, C, T) and attention heads (N, heads, T, D) are read too; where none
    is of that size, nothing tells (N, C, L) from (N, T, D).
    """

    batch_dim: int
    sizes: tuple[int, ...]
    is_complex: bool = False
    channels_last: bool = True
    dense: bool = False
    prefix: int = 0
    token_dim: int | None = None

    @staticmethod
    def of(features: TensorSpec, labels: tuple[int, ...] = ()) -> Layout:
        """The layout of features that meet labels (N, *labels)."""
        assert features.batch_dim is not None
        sizes = tuple(size for dim, size in enumerate(features.shape) if dim != features.batch_dim)
        token_dim = _token_dim(sizes, labels)
        if token_dim is not None:
            sizes = (labels[0], math.prod(sizes) // labels[0])
        folded = (*sizes[:3], math.prod(sizes[3:])) if len(sizes) > 3 else sizes
        last = len(sizes) <= 2 or _channels_last(folded, labels)
        prefix = _prefix(sizes[:-1] if last else sizes[1:], labels, features.batch_dim)
        is_complex = features.dtype.startswith("complex")
        return Layout(features.batch_dim, folded, is_complex, last, prefix is not None, prefix or 0, token_dim)

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the dimensions that are no channels, at the example; () for vectors."""
        return self.sizes[:-1] if self.channels_last else self.sizes[1:]

    @property
    def width(self) -> int:
        """Channels of a position, twice as many where features are complex."""
        return (2 if self.is_complex else 1) * self.sizes[-1 if self.channels_last else 0]

    @property
    def has_tokens(self) -> bool:
        return len(self.positions) == 1

    def arrange(self, features: Tensor) -> Tensor:
        """Features as real (N, width, *positions)."""
        features = features.movedim(self.batch_dim, 0)
        if self.token_dim is not None:
            features = features.movedim(self.token_dim, 1).flatten(2)
        features = features.flatten(MOST_DIMS - 1) if features.ndim > MOST_DIMS else features
        features = features.movedim(-1, 1) if self.channels_last else features
        return torch.cat([features.real, features.imag], 1) if features.is_complex() else features

    def grid(self, length: int, labels: tuple[int, ...]) -> tuple[int, ...] | None:
        """Sizes of the labels' aspect ratio for a row of `length` tokens, the prefix among them; None if none fit."""
        return similar_grid(length - self.prefix, labels)


def label_sizes(signal: TensorSpec) -> tuple[int, ...]:
    """Sizes of the positions that class indices (N, ...) are for; () for one per row, and for what is no label."""
    return signal.shape[1:] if signal.dtype == "int64" else ()


def similar_grid(length: int, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Sizes with this product and the ratios of `sizes`, None where there are none; along one dimension always."""
    if length < 1:
        return None
    common = math.gcd(*sizes)
    base = [size // common for size in sizes]
    scale = round((length / math.prod(base)) ** (1 / len(base)))
    found = tuple(scale * size for size in base)
    return found if math.prod(found) == length else None


def _token_dim(sizes: tuple[int, ...], labels: tuple[int, ...]) -> int | None:
    """Where a row has as many tokens as labels (T,), counted with the rows; of several the last but channels."""
    if len(labels) != 1 or len(sizes) < 2:
        return None
    found = [dim for dim, size in enumerate(sizes, start=1) if size == labels[0]]
    return next((dim for dim in reversed(found) if dim < len(sizes)), found[0] if found else None)


def _channels_last(sizes: tuple[int, ...], labels: tuple[int, ...]) -> bool:
    before, behind = sizes[:-1], sizes[1:]
    ratio = labels if len(labels) == len(before) else (1,) * len(before)
    return _similar(before, ratio) and not _similar(behind, ratio)


def _similar(sizes: tuple[int, ...], ratio: tuple[int, ...]) -> bool:
    return similar_grid(math.prod(sizes), ratio) == sizes


def _prefix(positions: tuple[int, ...], labels: tuple[int, ...], batch_dim: int) -> int | None:
    """How many tokens stand before the labels' grid; None where positions and labels do not correspond."""
    if not positions or not labels or math.prod(positions) == 1 < math.prod(labels):
        return None
    if len(positions) == len(labels):
        # (layers, N, D): the states of a recurrent network, unless the example has as many labels
        is_state = len(positions) == 1 and batch_dim != 0 and positions[0] != labels[0]
        return None if is_state else 0
    if len(positions) > 1:
        return None
    fitting = (extra for extra in PREFIXES if similar_grid(positions[0] - extra, labels))
    return next((extra for extra in fitting if 2 * extra < positions[0]), None)
