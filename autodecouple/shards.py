"""The rows of a batch: parted among micro-batches, and among the replicas of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


def row_sizes(rows: int, count: int) -> list[int]:
    """Rows of each micro-batch: as equal as can be, the larger ones first."""
    return [rows // count + (index < rows % count) for index in range(count)]


@dataclass(frozen=True)
class Piece:
    """Consecutive rows within one micro-batch of the global batch, which has `size` rows."""

    micro_batch: int
    start: int
    rows: int
    size: int


@dataclass(frozen=True)
class Shard:
    """This replica's part of a global batch, in which the replicas' rows follow each other.

    rows: of every replica; replica: which of them this is; count: micro-batches, here as in the global batch

        replica            0                1
        rows        0  1  2  3  4   |  5  6  7
        here        [0     ][1   ]  |  [0  ][1]     micro-batches of the replicas
        globally    [0        ][1           ]       those of one process that has all rows
    """

    rows: tuple[int, ...]
    replica: int
    count: int = 1

    @property
    def share(self) -> float:
        """How much of the global batch is here."""
        return self.rows[self.replica] / sum(self.rows)

    def pieces(self, micro_batch: int) -> Iterator[Piece]:
        """Where the rows of one micro-batch lie in the micro-batches of the global batch, in their order."""
        own = row_sizes(self.rows[self.replica], self.count)
        start = sum(self.rows[: self.replica]) + sum(own[:micro_batch])
        stop = start + own[micro_batch]
        first = 0
        for index, size in enumerate(row_sizes(sum(self.rows), self.count)):
            begin, end = max(start, first), min(stop, first + size)
            if begin < end:
                yield Piece(index, begin - first, end - begin, size)
            first += size
