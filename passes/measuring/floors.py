"""Bytes that stages take at least: sums, so that all stages which are too large for certain are found at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autodecouple.passes.measuring.memory import FROZEN, GRADIENTS, SAVED, WEIGHTS, MemoryWalk
from autodecouple.passes.measuring.stage_memory import OPTIMIZER_STATES
from autodecouple.passes.partitioning.sums import RunSums

_OWNED = {WEIGHTS: 1 + OPTIMIZER_STATES, FROZEN: 1}


def floors(walk: MemoryWalk) -> tuple[RunSums, RunSums]:
    """With what a stage owns: what it has saved when its backward begins, and its weights' gradients at the update.

    Both only grow with the stage: what is saved, or used, several times counts as at the first time.
    """
    return _sums(walk, {**_OWNED, SAVED: 1}), _sums(walk, {**_OWNED, GRADIENTS: 1})


def _sums(walk: MemoryWalk, factors: Mapping[int, int]) -> RunSums:
    position, row, after, until, size = walk.changes
    weight = torch.zeros(int(row.max()) + 1, dtype=torch.int64)
    weight[list(factors)] = torch.tensor(list(factors.values()))
    starts = torch.tensor(walk.crossing.starts)
    first, last = (torch.bucketize(at, starts, right=True) - 1 for at in (until, position))
    amount = weight[row] * size
    counts = (amount > 0) & (after < 0) & (first >= 0)
    within, across = counts & (first == last), counts & (first < last)
    plain = torch.zeros(len(starts), dtype=torch.int64).index_add_(0, last[within], amount[within])
    return RunSums(plain, torch.stack([first, last, amount], dim=1)[across])


def first_starts(sums: Sequence[RunSums], limit: int) -> Tensor:
    """(ends,) the first start from which a stage to each end may stay within the limit, behind the end if none does."""
    ends = torch.arange(sums[0].num_segments)
    found = [each.search(ends, lambda start, size: (start <= ends) & (size > limit))[0] for each in sums]
    return torch.stack(found).amax(0)
