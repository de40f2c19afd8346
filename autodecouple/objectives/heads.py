"""What heads are built of: checks of the specs, pooling, projectors, and numerics that stay finite.

A head reads features in whatever shape the cut has, brings them to one vector per row (`Pool`), maps that to an
embedding (`Projector`) and takes a loss of it in full precision (`full_precision`, `widen`). Nothing here depends on
values in Python, so heads run on fake and meta tensors and never wait for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autodecouple.errors import InputError
from autodecouple.plans import TensorSpec

PROJECTORS = ("identity", "linear", "mlp")
_RANKS = "(N, D), (N, T, D), (N, C, H, W) or (N, C, D, H, W)"


def check_specs(objective: str, features: TensorSpec, signal: TensorSpec) -> int:
    """The number of classes, once features and labels are seen to fit; else InputError naming the way out."""
    instead = 'pass loss="bp" to keep these stages coupled, or an objective of your own'
    if not features.dtype.startswith(("float", "bfloat")):
        raise InputError(f"{objective!r} reads floating-point features, but the cut carries {features}; {instead}")
    if features.batch_dim is None or len(features.shape) not in range(2, 6):
        raise InputError(f"{objective!r} reads features {_RANKS}, but the cut carries {features}; {instead}")
    if signal.num_classes is None or signal.dtype != "int64" or len(signal.shape) != 1:
        raise InputError(
            f"{objective!r} needs targets that are class indices, (N,) int64 with a known number of classes, but got "
            f"{signal} with num_classes={signal.num_classes}; dense targets are not yet supported: {instead}"
        )
    if features.shape[features.batch_dim] != signal.shape[0]:
        raise InputError(
            f"{objective!r} needs one row of features per target, but {features} has "
            f"{features.shape[features.batch_dim]} rows for {signal.shape[0]} targets; cut elsewhere, or {instead}"
        )
    return signal.num_classes


def check_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """InputError unless the value is one of the choices."""
    if value not in choices:
        raise InputError(f"{field}={value!r} is not known; choose one of {', '.join(map(repr, choices))}")


def check_positive(**fields: float | None) -> None:
    """InputError unless every field is None, or finite and above zero."""
    for field, value in fields.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{field}={value!r} must be a finite number above zero")


def head_dtype(features: TensorSpec) -> torch.dtype:
    """The dtype of a head's parameters: float64 for float64 features, else float32."""
    return torch.float64 if features.dtype == "float64" else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device: projectors follow the caller's autocast, losses do not."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def unit_rows(rows: Tensor) -> Tensor:
    """(N, D) with rows of length 1; a row of zeros stays one, and its gradient stays small (not times 1e12)."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, 1.0)


class Pool(nn.Module):
    """Features of any rank as one vector per row, (N, width), at least float32.

    vectors (N, D): unchanged
    tokens (N, T, D): the mean over the tokens that count; a row without any gives zeros. Every 3-D tensor is read
        so, also the (N, C, L) of a 1-D convolution, whose channels are then averaged and whose L must be fixed
    grids (N, C, H, W) and (N, C, D, H, W): means over a grid of `size` cells along each spatial dimension, fewer
        where the example is smaller; other sizes at run time are fine (the cells are those of adaptive pooling)

    size=None flattens everything, as the papers do; sizes must then stay those of the example (padded tokens count
    as zeros). Why pool: on a VGG SCPL's flattening projectors hold 57.7 M parameters, the network itself 12.4 M.
    """

    def __init__(self, features: TensorSpec, size: int | None = 2) -> None:
        super().__init__()
        if features.batch_dim is None:
            raise InputError(f"cannot pool {features}: it has no batch dimension")
        check_positive(pool=size)
        self.batch_dim = features.batch_dim
        sizes = [n for dim, n in enumerate(features.shape) if dim != features.batch_dim]
        spatial = sizes[1:] if len(sizes) > 2 else []
        self.has_tokens = len(sizes) == 2
        self.size = None if size is None else min([size, *spatial])
        if self.size is None:
            self.width = math.prod(sizes)
        else:
            self.width = sizes[0] * self.size ** len(spatial) if spatial else sizes[-1]

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        features = features.movedim(self.batch_dim, 0)
        if self.has_tokens and mask is not None:
            features = features.masked_fill(~mask.unsqueeze(-1), 0)  # not a product: padding may hold inf or NaN
        if self.size is None:
            return self._flatten(features)
        if self.has_tokens:
            return _mean_tokens(features, mask)
        for dim in range(2, features.ndim):
            features = _mean_cells(features, dim, self.size)
        return widen(features.flatten(1))

    def _flatten(self, features: Tensor) -> Tensor:
        if math.prod(features.shape[1:]) != self.width:
            raise InputError(
                f"pool=None flattens to the example's {self.width} values per row, but got features "
                f"{tuple(features.shape)}; keep sizes fixed, or pool (pool=2)"
            )
        return widen(features.flatten(1))


def _mean_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    if mask is None:
        return tokens.mean(1, dtype=dtype)
    return tokens.sum(1, dtype=dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _mean_cells(grid: Tensor, dim: int, cells: int) -> Tensor:
    """Means over `cells` equal windows along a dimension, which overlap by one where it is no multiple.

    Equal to adaptive average pooling, whose backward on CUDA refuses torch.use_deterministic_algorithms(True).
    """
    length, dtype = grid.shape[dim], torch.promote_types(grid.dtype, torch.float32)
    if length % cells == 0:
        split = grid.reshape(*grid.shape[:dim], cells, length // cells, *grid.shape[dim + 1 :])
        return split.mean(dim + 1, dtype=dtype)
    starts = [i * length // cells for i in range(cells)]
    stops = [-(-(i + 1) * length // cells) for i in range(cells)]
    windows = [grid.narrow(dim, i, j - i) for i, j in zip(starts, stops, strict=True)]
    return torch.stack([window.mean(dim, dtype=dtype) for window in windows], dim)


class Projector(nn.Sequential):
    """(N, in_width) to an embedding (N, width), the papers' kinds.

    identity: nothing; linear: one layer to the last of `widths`; mlp: a layer to each of `widths`, with
    [BatchNorm-]ReLU between them.
    """

    def __init__(
        self,
        in_width: int,
        widths: Sequence[int],
        kind: str = "mlp",
        batch_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("projector", kind, PROJECTORS)
        outs = {"identity": [], "linear": list(widths[-1:]), "mlp": list(widths)}[kind]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip([in_width, *outs], outs, strict=False):
            if layers:
                layers += [RowNorm(fan_in, dtype=dtype)] if batch_norm else []
                layers += [nn.ReLU()]
            layers += [nn.Linear(fan_in, fan_out, dtype=dtype)]
        super().__init__(*layers)
        self.width = outs[-1] if outs else in_width


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation that takes its running statistics for a batch of one row, where it has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
