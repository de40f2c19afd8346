"""What heads are built of: checks of the specs, layers, and numerics that stay finite.

A head brings what the cut carries to one vector per label (`Rows`), maps that to an embedding (`Projector`) and takes
a loss of it in full precision (`full_precision`, `widen`). Nothing here depends on values in Python, so heads run on
fake and meta tensors and never wait for a device.
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

IGNORED = -100
"""The label of what does not count: cross-entropy's default `ignore_index`."""

_WAY_OUT = 'pass loss="bp" to keep these stages coupled, or an objective of your own'


def check_specs(objective: str, features: TensorSpec, signal: TensorSpec) -> None:
    """InputError naming the way out unless heads can read the features and compare them with the signal."""
    check_features(objective, features)
    if signal.dtype != "int64" or len(signal.shape) not in range(1, 5):
        raise InputError(
            f"{objective!r} needs targets that are int64 class indices, (N,), (N, T), (N, H, W) or (N, D, H, W), but"
            f" got {signal}; pass target.long() if they are indices, else {_WAY_OUT}"
        )
    rows = features.shape[features.batch_dim or 0]
    if rows != signal.shape[0]:
        raise InputError(
            f"{objective!r} needs one row of features per target, but {features} has {rows} rows for "
            f"{signal.shape[0]} targets; cut elsewhere, or {_WAY_OUT}"
        )


def check_features(objective: str, features: TensorSpec) -> None:
    """InputError unless the features are real or complex numbers with rows."""
    if not features.dtype.startswith(("float", "bfloat", "complex")):
        raise InputError(f"{objective!r} reads floating-point features, but the cut carries {features}; {_WAY_OUT}")
    if features.batch_dim is None or len(features.shape) < 2:
        raise InputError(
            f"{objective!r} reads features with a batch dimension and at least one more, (N, D), (N, T, D), "
            f"(N, C, H, W), ..., but the cut carries {features}; cut elsewhere, or {_WAY_OUT}"
        )


def check_classes(objective: str, signal: TensorSpec) -> int:
    """The number of classes; InputError where nothing tells it."""
    if signal.num_classes is None:
        raise InputError(
            f"{objective!r} needs to know the number of classes, but {signal} has num_classes=None, since the model has"
            ' no output that tells it: one score per class; pass loss="supcon", which needs no number, or'
            f" {_WAY_OUT.removeprefix('pass ')}"
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
    """The dtype of a head's parameters: float64 for features of that precision, else float32."""
    return torch.float64 if features.dtype in ("float64", "complex128") else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device: projectors follow the caller's autocast, losses do not."""
    kind = tensor.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def unit_rows(rows: Tensor) -> Tensor:
    """(N, D) with rows of length 1; a row of zeros stays one, and its gradient stays small (not times 1e12)."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 1e-12, norm, 1.0)


def row_weights(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """(R,) weights of a mean over the rows that count; all zero where none does."""
    return counts.to(dtype) / counts.sum().clamp(min=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows whose label is not IGNORED; 0, where torch gives NaN, if there are none."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class Layers(nn.Sequential):
    """Layers one after the other, (R, in_width) to (R, width); norms take the rows that count, (R,) bool, alone."""

    def forward(self, input: Tensor, counts: Tensor | None = None) -> Tensor:
        for layer in self:
            input = layer(input, counts) if isinstance(layer, (Layers, RowNorm)) else layer(input)
        return input


class Projector(Layers):
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
    """Batch normalisation by the rows that count; a batch of one such row, without variance, takes the statistics."""

    def forward(self, input: Tensor, counts: Tensor | None = None) -> Tensor:
        if self.training and counts is not None:
            return self._normalise(input, *self._of_batch(widen(input), counts))
        if self.training and input.shape[0] > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _of_batch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the rows that count, into which the running ones move."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        number, weights = counts.sum(), row_weights(counts, rows.dtype).unsqueeze(1)
        enough = number > 1
        mean = (rows * weights).sum(0)
        variance = ((rows - mean).square() * weights).sum(0)
        with torch.no_grad():
            pace = self.momentum * enough.to(rows.dtype)
            self.running_mean.lerp_(mean, pace)
            self.running_var.lerp_(variance * number / (number - 1).clamp(min=1), pace)
            self.num_batches_tracked.add_(enough)
        # copies: the statistics may move again before the backward
        return torch.where(enough, mean, self.running_mean), torch.where(enough, variance, self.running_var)

    def _normalise(self, rows: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return ((widen(rows) - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(rows.dtype)
