"""Random numbers that depend on neither executor, schedule nor number of stages.

The CPU generator is one per process: stage threads would race for it. So each draw has a generator of its own, keyed by
(seed, node, batch, micro-batch).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from autodecouple import synced
from autodecouple.errors import InputError
from autodecouple.shards import Piece, Shard, row_sizes

_default_generator = threading.RLock()


@dataclass(frozen=True, slots=True)
class Randomness:
    """The key of one micro-batch's random numbers; seed None draws from torch's default generator instead.

    shard: where the batch is part of a global one, whose masks are drawn: every replica takes its own rows of them;
    exchange: with the other replicas, for synchronised norms
    """

    seed: int | None
    batch: int = 0
    micro_batch: int = 0
    shard: Shard | None = None
    exchange: synced.Exchange | None = None

    def key(self, node: str) -> int:
        """63 bits, the same on every machine."""
        text = f"{self.seed}/{node}/{self.batch}/{self.micro_batch}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    def dropout(self, x: torch.Tensor, p: float, node: str, rows: int | None = 0) -> torch.Tensor:
        """`x` with each element zeroed with probability p, the others scaled by 1 / (1 - p).

        rows: the dimension of the batch, None where there is none; folded with others, the batch comes first
        """
        if self.seed is None:
            return functional.dropout(x, p)
        if p >= 1:
            return x * 0
        return x if p == 0 else behind(x, self.mask(x, p, node, rows), p)

    def mask(self, x: torch.Tensor, p: float, node: str, rows: int | None = 0) -> torch.Tensor:
        """Which elements of `x` stay: bool, for each of its indices."""
        if self.shard is None or rows is None:
            return draw_mask(x.shape, p, x.device, torch.Generator(x.device).manual_seed(self.key(node)))
        parts = [self._part(x, p, node, rows, piece) for piece in self.shard.pieces(self.micro_batch)]
        return torch.cat(parts, rows) if len(parts) > 1 else parts[0]

    def _part(self, x: torch.Tensor, p: float, node: str, rows: int, piece: Piece) -> torch.Tensor:
        """The rows of `piece` in the mask that one process with the whole global batch draws."""
        assert self.shard is not None
        own = row_sizes(self.shard.rows[self.shard.replica], self.shard.count)[self.micro_batch]
        fold, odd = divmod(x.shape[rows], own)
        if odd:
            raise InputError(
                f"dropout {node!r} has {x.shape[rows]} rows for a batch of {own}: its mask cannot be shared among"
                " replicas (data_parallel=)"
            )
        key = dataclasses.replace(self, micro_batch=piece.micro_batch).key(node)
        sizes = [piece.size * fold if dim == rows else size for dim, size in enumerate(x.shape)]
        whole = draw_mask(sizes, p, x.device, torch.Generator(x.device).manual_seed(key))
        return whole.narrow(rows, piece.start * fold, piece.rows * fold)

    def attention(
        self,
        node: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        rows: int | None = 0,
    ) -> torch.Tensor:
        """Scaled dot-product attention (..., T, D) with dropout on its weights.

        The CPU has no fused kernel with dropout, so the weights are computed here and get a mask of their own. The
        kernels of a GPU draw inside: they take their turn with the GPU's generator.
        """
        operation = torch.ops.aten.scaled_dot_product_attention.default
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if self.seed is None or query.device.type != "cpu":
            arguments = (query, key, value, mask, dropout, is_causal)
            out: torch.Tensor = self.seeded_rows(operation, node, *arguments, **options)
            return out
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        weights = query * (scale if scale is not None else query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if is_causal:
            hidden = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            weights = weights.masked_fill_(hidden, -torch.inf)
        if mask is None:
            return self.dropout(weights.softmax(-1), dropout, node) @ value
        # a row that may look at nothing gives zeros, as in the fused kernels, and a gradient of zero
        if mask.dtype == torch.bool:
            blind = ~mask.any(-1, keepdim=True)
            weights = weights.masked_fill_(~(mask | blind), -torch.inf)
        else:
            blind = (mask == -torch.inf).all(-1, keepdim=True)
            weights = weights + mask.masked_fill(blind, 0.0)
        return (self.dropout(weights.softmax(-1), dropout, node, rows) @ value).masked_fill(blind, 0.0)

    def batch_norm(self, x: torch.Tensor, *options: Any) -> torch.Tensor:
        """Normalise by the rows of all replicas."""
        if self.exchange is not None:
            return synced.batch_norm(self.exchange, x, *options)
        out: torch.Tensor = torch.ops.aten.batch_norm.default(x, *options)
        return out

    def seeded_rows(self, operation: Any, node: str, *args: Any, **kwargs: Any) -> Any:
        """As `seeded`, for numbers that differ from row to row: every replica draws others.

        What a kernel draws for the rows of other replicas cannot be asked for, so these are not those that one process
        draws for the global batch.
        """
        name = node if self.shard is None else f"{node}/replica {self.shard.replica}"
        return self.seeded(operation, name, *args, **kwargs)

    def seeded(self, operation: Any, node: str, *args: Any, **kwargs: Any) -> Any:
        """Run an operation that draws inside its kernel, from the default generator, seeded for this one call.

        Only one thread may do so at a time; the generator's own state comes back.
        """
        if self.seed is None:
            return operation(*args, **kwargs)
        generator = _generator_for(args, kwargs)
        with _default_generator:
            before = generator.get_state()
            generator.manual_seed(self.key(node))
            try:
                return operation(*args, **kwargs)
            finally:
                generator.set_state(before)


def masked(x: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """`x` behind a mask from the generator; for the backward it keeps one byte per element."""
    return x if p == 0 else behind(x, draw_mask(x.shape, p, x.device, generator), p)


STEPS = 2**16
"""Into so many the probability is divided: above 0 it is taken to the next of them, below 1 to the last."""


def _kept(p: float) -> int:
    return min(max(1, round((1 - p) * STEPS)), STEPS - 1)


def draw_mask(
    shape: Sequence[int], p: float, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """False with probability p, in the order of the indices.

    The generator of the CPU is slow, and gives 64 bits at a time: enough for four elements.
    """
    if device.type != "cpu":
        mask = torch.empty(shape, dtype=torch.bool, device=device)
        return mask.bernoulli_(_kept(p) / STEPS, generator=generator)
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (words.view(torch.int16)[:count] < _kept(p) - STEPS // 2).view(shape)


def behind(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """`x` where the mask is True, scaled as if it had been drawn with p, else 0."""
    found: torch.Tensor = _Masked.apply(x, mask, STEPS / _kept(p))  # type: ignore[no-untyped-call]
    return found


class _Masked(torch.autograd.Function):
    """Multiplication with a mask and a number, of which only the mask is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return _times(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _times(gradient, mask, ctx.scale), None, None


def _times(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    # The CPU multiplies numbers of one type several times as fast as numbers with truth values.
    factor = mask.view(torch.uint8).to(x.dtype) if x.device.type == "cpu" else mask
    product = x * factor
    # The compiler of torch 2.11 loses the gradient of a Function that works in place.
    return product * scale if torch.compiler.is_compiling() else product.mul_(scale)


def _generator_for(args: Any, kwargs: Any) -> torch.Generator:
    """The default generator that an operation on these arguments draws from."""
    devices = [leaf.device for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    device = devices[0] if devices else torch.device(kwargs.get("device") or "cpu")
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
