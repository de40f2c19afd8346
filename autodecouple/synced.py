"""Batch normalisation by the rows of all replicas, for the layers that the model has as SyncBatchNorm.

rows here --> sum, number --+--> mean --> squared distances --+--> variance --> normalised
            other replicas -+                other replicas --+
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """The replicas of a stage; `share` is how much of the global batch's rows is here."""

    share: float

    def sum(self, values: Tensor) -> Tensor:
        """Of all replicas."""
        ...


def batch_norm(exchange: Exchange, x: Tensor, *options: Any) -> Tensor:
    """Normalise (N, C, ...) by mean and variance over all replicas; options as those of torch's batch_norm.

    Mean and variance go one after the other, as in torch's own: a difference of squares would lose digits.
    """
    weight, bias, running_mean, running_var, _, momentum, eps, *_ = options
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    number = exchange.sum(wide.new_tensor([wide.numel() / wide.shape[1]], dtype=torch.float64)).to(wide)
    mean = _sum(wide.sum(dims), exchange) / number
    centred = wide - mean.view(shape)
    variance = _sum(centred.square().sum(dims), exchange) / number
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * number / (number - 1)).to(running_var), momentum)
    out: Tensor = centred * (variance + eps).rsqrt().view(shape)
    out = out if weight is None else out * weight.view(shape)
    out = out if bias is None else out + bias.view(shape)
    return out.to(x.dtype)


def _sum(values: Tensor, exchange: Exchange) -> Tensor:
    found: Tensor = _Sum.apply(values, exchange)  # type: ignore[no-untyped-call]
    return found


class _Sum(torch.autograd.Function):
    """Every replica's loss depends on every replica's values.

    A gradient is that of a replica's own loss, and is weighted with its share of the rows when the stage's gradients
    are summed: so it goes out with the share of where it comes from, and is freed of the share of where it goes to.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.share = exchange, exchange.share
        return exchange.sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum(gradients[0] * ctx.share) / ctx.share, None
