"""Rows of numbers as a tensor."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor


def columns(rows: Iterable[tuple[int, ...]], width: int) -> Tensor:
    """(width, rows) whole numbers; by way of an array, which is several times as fast as a tensor of tuples."""
    flat = array("q", chain.from_iterable(rows))
    if not flat:
        return torch.zeros(width, 0, dtype=torch.int64)
    return torch.frombuffer(flat, dtype=torch.int64).reshape(-1, width).T.contiguous()
