"""Which of the blocks behind a cut a head has: those that fit each other, at about equal distances."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

Form = Hashable
"""What has to be equal for a tensor to be taken as another one: shape, dtype, which dimension is the batch."""


class Block(NamedTuple):
    """The forms of what enters a block, and of what leaves it."""

    enters: Form
    leaves: Form


class _Path(NamedTuple):
    """A choice of blocks. The first two are compared: misfits, and squared distances from where it should be."""

    misfits: int
    distance: int
    chosen: tuple[int, ...]


def select(start: Form, blocks: Sequence[Block], end: Form, wanted: Sequence[int]) -> tuple[int, ...]:
    """Indices of blocks, in order: with the fewest places where forms differ, and of such those nearest to the wanted.

    So a block that lowers resolution or changes the number of channels is there to do that: an adapter in its place,
    pooling and a linear map, loses more.

    start: of the features; end: of what enters the output layers; wanted: as many indices as are chosen
    """
    paths = [_Path(start != block.enters, (i - wanted[0]) ** 2, (i,)) for i, block in enumerate(blocks)]
    for place in range(1, len(wanted)):
        paths = [_longer(paths, blocks, i, (i - wanted[place]) ** 2) for i in range(place, len(blocks))]
    return min(path._replace(misfits=path.misfits + (blocks[path.chosen[-1]].leaves != end)) for path in paths).chosen


def _longer(paths: Sequence[_Path], blocks: Sequence[Block], index: int, distance: int) -> _Path:
    """The best of the paths in front of a block, with the block."""
    found = [
        _Path(p.misfits + (blocks[p.chosen[-1]].leaves != blocks[index].enters), p.distance + distance, p.chosen)
        for p in paths
        if p.chosen[-1] < index
    ]
    best = min(found)
    return best._replace(chosen=(*best.chosen, index))
