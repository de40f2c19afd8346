"""Local losses over the global batch: the rows of all replicas of a stage, gathered with their gradient.

replica 0   embeddings e0 --+--> (e0, e1) --> loss of all        every replica computes the same loss;
replica 1   embeddings e1 --+--> (e0, e1) --> loss of all        its gradient at the own rows goes back
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError


class Exchange(Protocol):
    """The replicas of a stage; `share` is how much of the global batch's rows is here."""

    replica: int
    share: float

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The rows (R, ...) of every replica, each of which may have another number."""
        ...


class Together:
    """What a head compares, of all replicas: the rows given where it has none."""

    def __init__(self) -> None:
        self.exchange: Exchange | None = None

    def __call__(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) and (R,), or whatever else has rows, to those of all replicas, one replica after the other."""
        if self.exchange is None:
            return rows, labels
        return gathered(rows, self.exchange), gathered(labels, self.exchange)


def gather_rows(head: nn.Module, exchange: Exchange) -> None:
    """Let a head take its loss over the rows of all replicas.

    One that has a `together` gathers what it compares; any other is given the features of all, which takes more time.
    """
    parts = [getattr(module, "together", None) for module in head.modules()]
    found = [part for part in parts if isinstance(part, Together)]
    for together in found:
        together.exchange = exchange
    hooked = [getattr(hook, "__self__", None) for hook in head._forward_hooks.values()]
    whole = next((owner for owner in hooked if isinstance(owner, _Whole)), None)
    if whole is not None:  # the head goes on under another executor
        whole.exchange = exchange
    elif not found:
        whole = _Whole(exchange)
        head.register_forward_pre_hook(whole.before, with_kwargs=True)
        head.register_forward_hook(whole.after)


def gathered(rows: Tensor, exchange: Exchange) -> Tensor:
    """The rows of all replicas; a gradient comes back to those that are here."""
    if not rows.requires_grad:
        return torch.cat(exchange.all_gather(rows))
    found: Tensor = _Gathered.apply(rows, exchange)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    """Backward keeps the gradient at the own rows, whole: every replica computes it, and all compute the same.

    It is divided by the rows' share of the global batch, with which the stage's gradient is weighted later. Behind the
    gathering all replicas have the same gradient, for which that weight is right as it stands.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        parts = exchange.all_gather(rows)
        ctx.start = sum(len(part) for part in parts[: exchange.replica])
        ctx.rows, ctx.share = len(rows), exchange.share
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].narrow(0, ctx.start, ctx.rows) / ctx.share, None


class _Whole:
    """Hooks around a head that knows nothing of replicas: all rows in, the own rows of the encoded signal out."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.start = self.stop = self.total = 0

    def before(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        counts = [len(part) for part in self.exchange.all_gather(torch.empty(len(args[-1]), 0))]
        self.start, self.total = sum(counts[: self.exchange.replica]), sum(counts)
        self.stop = self.start + counts[self.exchange.replica]
        return pytree.tree_map_only(Tensor, self._all, (args, kwargs))

    def _all(self, value: Tensor) -> Tensor:
        if not value.ndim or len(value) != self.stop - self.start:
            raise InputError(
                f"a head reads a tensor {tuple(value.shape)} without a row for each of the {self.stop - self.start} of"
                " the batch, so that replicas cannot gather it: pass DataParallel(gather=False)"
            )
        return gathered(value, self.exchange)

    def after(self, head: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        loss, signal = output
        return loss, pytree.tree_map_only(Tensor, self._own, signal)

    def _own(self, value: Tensor) -> Tensor:
        return value[self.start : self.stop] if value.ndim and len(value) == self.total else value
