"""Bytes that stages take at least: sums, so that all stages which are too large for certain are found at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autodecouple.passes.measuring.memory import FROZEN, GRADIENTS, SAVED, WEIGHTS, WORKING, MemoryWalk
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
    weight = torch.zeros(WORKING + 1, dtype=torch.int64)
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
    saving, updating = floors(walk)
    left = limit - (2 + OPTIMIZER_STATES) * heads.parameters
    return torch.maximum(_first(saving, left), _first(updating, left - UPDATE_TENSORS * heads.largest))


def _first(sums: RunSums, limits: Tensor) -> Tensor:
    """(ends,) the first start from which the sum to each end is within its limit."""
    ends = torch.arange(sums.num_segments)

    def refuses(start: Tensor, size: Tensor) -> Tensor:
        return (start <= ends) & (size > limits)

    return sums.search(ends, refuses)[0]
