"""Minima of ranges."""

from __future__ import annotations

import torch
from torch import Tensor


class RangeMinimum:
    """The minimum of any range of a row of numbers, from the minima of all ranges as long as a power of two.

    O(n log n) memory and time to build, O(1) per range (the sparse table of Bender and Farach-Colton, 2000).
    """

    def __init__(self, values: Tensor) -> None:
        levels, width = [values], 1
        while 2 * width <= len(values):
            shorter = levels[-1]
            longer = shorter.clone()  # the last ones reach beyond the end: no range asks for them
            torch.minimum(shorter[:-width], shorter[width:], out=longer[:-width])
            levels.append(longer)
            width *= 2
        self._table = torch.cat(levels)
        self._count = len(values)
        self._level = torch.frexp(torch.arange(len(values) + 1, dtype=torch.float64))[1].long() - 1

    def within(self, first: Tensor, last: Tensor) -> Tensor:
        """Of the numbers from first to last, both included; the ranges may not be empty."""
        level = self._level.index_select(0, last - first + 1)
        row = level * self._count
        begin, end = row + first, row + last + 1 - (1 << level)
        return torch.minimum(self._table.index_select(0, begin), self._table.index_select(0, end))
