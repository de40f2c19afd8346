"""Keyed randomness where code is compiled or recorded once and run for many batches.

The key of a batch must not become part of the code. Compiled code gets the keys of all its draws as a tensor, and each
mask is drawn by one operator that the compiler does not look into, so that masks are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autodecouple.randomness import Randomness, draw_mask


@torch.library.custom_op(
    "autodecouple::keyed_mask",
    mutates_args=(),
    schema="(Tensor x, float p, Tensor keys, int number) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
def keyed_mask(x: Tensor, p: float, keys: Tensor, number: int) -> Tensor:
    """Which elements of `x` stay, drawn with the key of that number; keys (n,) int64 on the CPU."""
    return draw_mask(x.shape, p, x.device, torch.Generator(x.device).manual_seed(int(keys[number])))


@keyed_mask.register_fake
def _(x: Tensor, p: float, keys: Tensor, number: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@dataclass(frozen=True)
class TracedRandomness(Randomness):
    """Randomness inside compiled code: the batch is known by its keys only; `numbers` tells which is whose."""

    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    numbers: Mapping[str, int] = field(default_factory=dict)
    outside: Randomness | None = None

    @staticmethod
    def of(randomness: Randomness, nodes: Sequence[str]) -> TracedRandomness:
        keys = torch.tensor([randomness.key(node) for node in nodes], dtype=torch.int64)
        numbers = {node: number for number, node in enumerate(nodes)}
        return TracedRandomness(randomness.seed, keys=keys, numbers=numbers, outside=randomness)

    def mask(self, x: Tensor, p: float, node: str, rows: int | None = 0) -> Tensor:
        found: Tensor = keyed_mask(x.detach(), p, self.keys, self.numbers[node])
        return found

    def seeded(self, operation: Any, node: str, *args: Any, **kwargs: Any) -> Any:
        """Outside of the compiled code, which ends before it and begins again behind it."""
        return _seeded_outside(self.outside, operation, node, *args, **kwargs)


def _seeded(randomness: Randomness, operation: Any, node: str, *args: Any, **kwargs: Any) -> Any:
    return randomness.seeded(operation, node, *args, **kwargs)


_seeded_outside = torch.compiler.disable(_seeded)
