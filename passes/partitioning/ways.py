"""Which places plans within a bound can go through: what no such plan reaches need not be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodecouple.passes.partitioning.runs import StageRuns


def find_ways(stages: Sequence[StageRuns], bound: int) -> tuple[Tensor, Tensor]:
    """(stages, starts) and (stages, ends): which starts are reached from the model's beginning, and which ends lead to
    the model's, by stages that cost at most `bound` each."""
    most, count = torch.tensor(bound), stages[0].sums.num_segments
    ranges = [(runs.end, runs.search(lambda starts: most)[0], runs.last + 1) for runs in stages]
    reached, leading = [_marked([0], count)], [_marked([count - 1], count)]
    for end, first, stop in ranges[:-1]:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), reached[-1].cumsum(0)])
        ends = end[(first < stop) & (before[stop] > before[torch.minimum(first, stop)])]
        reached.append(_marked(ends + 1, count + 1)[:count])  # the next stage begins behind its end
    for end, first, stop in reversed(ranges[1:]):
        used = (first < stop) & leading[0][end]
        begun = _counted(first[used], count + 1) - _counted(stop[used], count + 1)
        leading.insert(0, begun.cumsum(0)[1:] > 0)  # an end leads on where the start behind it does
    return torch.stack(reached), torch.stack(leading)


def _marked(places: Tensor | list[int], count: int) -> Tensor:
    return _counted(torch.as_tensor(places), count) > 0


def _counted(places: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64).index_add_(0, places, torch.ones_like(places))
