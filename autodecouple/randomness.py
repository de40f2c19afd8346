"""Random numbers that depend on neither executor, schedule nor number of stages.

The CPU generator is one per process: stage threads would race for it. So each draw has a generator of its own, keyed by
(seed, node, batch, micro-batch).
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
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
        if self.shard is None or rows is None:
            return masked(x, p, torch.Generator(x.device).manual_seed(self.key(node)))
        parts = [self._part(x, p, node, rows, piece) for piece in self.shard.pieces(self.micro_batch)]
        return behind(x, torch.cat(parts, rows) if len(parts) > 1 else parts[0], p)

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
        whole = _empty_mask(x, rows, piece.size * fold)
        whole.bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(key))
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
        weights = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
        if is_causal:
            mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            weights = weights.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            weights = weights + mask
        # a row that may look at nothing gives zeros, as in the fused kernels, and a gradient of zero
        blind = (weights == -torch.inf).all(-1, keepdim=True)
        weights = weights.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        return self.dropout(weights, dropout, node, rows) @ value

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
    return behind(x, torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator), p)


def behind(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    return (x * mask).div_(1 - p)


def _empty_mask(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A mask like `x` with another size along one dimension, and its dimensions in memory in the same order.

    Of two with the same stride the one of size 1 lies inside: outside, its stride would be the other's whole length.
    """
    order = sorted(range(x.ndim), key=lambda d: (x.stride()[d], x.shape[d]), reverse=True)
    sizes = [size if d == dim else x.shape[d] for d in order]
    return torch.empty(sizes, dtype=torch.bool, device=x.device).permute([order.index(d) for d in range(x.ndim)])


def _generator_for(args: Any, kwargs: Any) -> torch.Generator:
    """The default generator that an operation on these arguments draws from."""
    devices = [leaf.device for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    device = devices[0] if devices else torch.device(kwargs.get("device") or "cpu")
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
