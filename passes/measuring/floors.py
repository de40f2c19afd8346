"""Bytes that stages take at least: sums, so that all stages which are too large for certain are found at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autodecouple.passes.measuring.memory import FROZEN, GRADIENTS, SAVED, WEIGHTS, MemoryWalk
from autodecouple.passes.measuring.stage_memory import OPTIMIZER_STATES, UPDATE_TENSORS, HeadMemory
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


def first_within(walk: MemoryWalk, heads: HeadMemory, limit: int) -> Tensor:
    """(ends,) the first start from which a stage to each end may stay within a limit, behind the end if none does.

    heads: (ends,) of the smallest head at each end
    """
    ends, saving = torch.arange(len(walk.crossing.ends)), limit - (2 + OPTIMIZER_STATES) * heads.parameters
    updating = saving - UPDATE_TENSORS * heads.largest
    found = [
        sums.search(ends, lambda start, size, left=left: (start <= ends) & (size > left))[0]  # type: ignore[misc]
        for sums, left in zip(floors(walk), (saving, updating), strict=True)
    ]
    return torch.maximum(*found)
