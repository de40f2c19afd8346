"""Sums over every run of segments, without a table of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RunSums:
    """Amounts of segments in a row, some of which count only where a run holds two segments at once.

    sum(b, e) = plain[b] + ... + plain[e] + every amount of `spanning` with b <= first and last <= e

    plain:    (segments,) non-negative
    spanning: (n, 3) rows of first segment, last segment and amount, by `last`; first < last, amounts non-negative

    The spanning amounts lie in a wavelet tree over `first`, in the order of `last`: level by level, those with a 0 in
    the next bit of `first` before those with a 1. So a search over starts, bit by bit, knows at every step what the
    starts that it leaves behind lose; all ends walk down together. O((segments + n) log segments).
    """

    def __init__(self, plain: Tensor, spanning: Tensor) -> None:
        assert int(plain.min()) >= 0 and (not len(spanning) or int(spanning.min()) >= 0), "costs may not be negative"
        self.num_segments = len(plain)
        self.plain = _prefixes(plain)
        self.spanning = spanning
        ends = torch.arange(self.num_segments)
        self._until = torch.searchsorted(self.spanning[:, 1].contiguous(), ends, right=True)
        self._totals = self.plain[1:] + _prefixes(self.spanning[:, 2])[self._until]
        self._levels = self._wavelet()

    def _wavelet(self) -> list[tuple[int, Tensor, Tensor]]:
        """(bit, zeros, amounts of the zeros) per level, the highest bit first: counted before each place of it."""
        keys, amounts, levels = self.spanning[:, 0] + 1, self.spanning[:, 2], []
        for bit in reversed(range(self.num_segments.bit_length())):
            zero = (keys >> bit) & 1 == 0
            levels.append((bit, _prefixes(zero.long()), _prefixes(torch.where(zero, amounts, 0))))
            order = torch.cat([zero.nonzero()[:, 0], (~zero).nonzero()[:, 0]])
            keys, amounts = keys[order], amounts[order]
        return levels

    def sum(self, begin: int, end: int) -> int:
        """Of the segments from begin to end."""
        first, last, amount = self.spanning[: int(self._until[end])].unbind(dim=1)
        return int(self.plain[end + 1] - self.plain[begin] + amount[(first >= begin) & (last <= end)].sum())

    def sums_from(self, begin: int, stop: int) -> Tensor:
        """(stop - begin,) of the runs from one segment to each end from there on, up to `stop`."""
        if begin == stop:
            return torch.zeros(0, dtype=torch.int64)
        known = 0 if begin == 0 else int(self._until[begin - 1])
        first, last, amount = self.spanning[known : int(self._until[stop - 1])].unbind(dim=1)
        added = torch.zeros(stop - begin, dtype=torch.int64)
        added.index_add_(0, last - begin, torch.where(first >= begin, amount, 0))
        return self.plain[begin + 1 : stop + 1] - self.plain[begin] + added.cumsum(0)

    def reach(self, begin: int, bound: int) -> int:
        """The segment at which every run from `begin` on exceeds a bound by its plain amounts alone."""
        return max(begin, int(torch.searchsorted(self.plain, self.plain[begin] + bound, right=True)) - 1)

    def search(self, ends: Tensor, refuses: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(starts, sums): how many starts from 0 on are refused before each end, and the sum of the last of these.

        refuses: (starts, sums) -> whether these are refused; what it refuses it must refuse from any start before
        """
        count, lost, left = (torch.zeros_like(ends) for _ in range(3))
        right, totals = _at(self._until, ends), _at(self._totals, ends)
        for bit, zeros, amounts in self._levels:
            asked = count + (1 << bit)
            start = (asked - 1).clamp(max=self.num_segments - 1)
            losing = lost + _at(amounts, right) - _at(amounts, left)
            on = (asked <= self.num_segments) & refuses(start, totals - _at(self.plain, start) - losing)
            count, lost = torch.where(on, asked, count), torch.where(on, losing, lost)
            for place in (left, right):
                before = _at(zeros, place)
                place.copy_(torch.where(on, zeros[-1] + place - before, before))
        return count, torch.where(count > 0, totals - _at(self.plain, (count - 1).clamp(min=0)) - lost, 0)


def _prefixes(values: Tensor) -> Tensor:
    """(n + 1,) sums of what lies before each place."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _at(values: Tensor, places: Tensor) -> Tensor:
    """values[places], three times as fast."""
    return values.index_select(0, places)
