"""The fastest choice of stages whose cost falls with every later start: near linear in the number of cuts.

best[k][e] = min over b of max(best[k-1][b-1], cost[k][b, e])      first round: the slowest stage
best[k][e] = min over b of best[k-1][b-1] + preference[e]          second round: over plans no slower than that

cost[k][b, e] falls as b grows. So in the first round, with the least of best[k-1] from b on in place of best[k-1][b-1],
which rises, the minimum lies where the two cross; in the second the starts that are fast enough are a range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autodecouple.passes.partitioning.ranges import RangeMinimum
from autodecouple.passes.partitioning.sums import RunSums

FORBIDDEN = 2**60
"""Cost of a stage that is not allowed; far above any real one, far below the overflow of a sum."""


@dataclass(frozen=True)
class StageRuns:
    """What stage number k may be: each row is an end with a range of starts, whose stages have heads of one cost.

    sums:     what the segments between two cuts cost; a stage from start b to end e holds those from b to e
    end:      (rows,) an end per row, rising; an end may stand in several rows, a start of it in one only
    first, last: (rows,) the starts, both included, at most the end
    head:     (rows,) what the head adds
    slowness: what all of it is multiplied with
    """

    sums: RunSums
    end: Tensor
    first: Tensor
    last: Tensor
    head: Tensor
    slowness: int = 1

    def where(self, rows: Tensor) -> StageRuns:
        """With these rows only, given as a mask."""
        return StageRuns(self.sums, self.end[rows], self.first[rows], self.last[rows], self.head[rows], self.slowness)

    def behind(self, first: Tensor) -> StageRuns:
        """Without the stages from starts before these, (ends,)."""
        runs = replace(self, first=torch.maximum(self.first, first[self.end]))
        return runs.where(runs.first <= runs.last)

    def slowed(self, slowness: int) -> StageRuns:
        """The same stages on a slower lane."""
        return replace(self, slowness=slowness)

    @property
    def dearest(self) -> int:
        """No stage costs more than this, without its slowness."""
        head = int(self.head.max()) if len(self.head) else 0
        return self.sums.sum(0, self.sums.num_segments - 1) + head

    def holds(self, start: int, end: int) -> bool:
        """Whether this stage is allowed."""
        return bool(((self.end == end) & (self.first <= start) & (start <= self.last)).any())

    def reach(self, start: int, bound: int) -> int:
        """The end up to which stages from a start may cost no more than this: those behind it cost more."""
        return self.sums.reach(start, bound // self.slowness)

    def costs_from(self, start: int, stop: int) -> Tensor:
        """(stop - start,) costs of the stages from one start to each end from there on, up to `stop`."""
        low, high = (int(i) for i in torch.searchsorted(self.end, torch.tensor([start, stop])))
        at = ((self.first[low:high] <= start) & (start <= self.last[low:high])).nonzero()[:, 0] + low
        costs = torch.full((stop - start,), FORBIDDEN, dtype=torch.int64)
        places = self.end[at] - start
        costs[places] = self.slowness * (self.sums.sums_from(start, stop)[places] + self.head[at])
        return costs

    def search(self, bound: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(start, cost) per row: the first start whose stage costs no more than `bound(starts)`, which may not fall
        as they grow (behind `last` where there is none), and what the stage from the start before it costs."""

        def refuses(start: Tensor, sums: Tensor) -> Tensor:
            known = start.clamp(self.first, self.last)
            dear = self.slowness * (sums + self.head) > bound(known)
            return (start < self.first) | ((start <= self.last) & dear)

        start, sums = self.sums.search(self.end, refuses)
        return start, torch.where(start > self.first, self.slowness * (sums + self.head), FORBIDDEN)


def minimise_slowest(stages: Sequence[StageRuns], preference: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """(cost of the slowest stage, cuts) of the best plan, None if no plan is allowed.

    preference: what each legal cut costs among plans that are equally fast
    """
    before = _begin(stages[0])
    for runs in stages:
        best = _smallest(runs, _slowest(runs, RangeMinimum(before)))
        before = _next(best)
    slowest = int(best[-1])
    return (slowest, _preferred(stages, preference, slowest)) if slowest < FORBIDDEN else None


def _slowest(runs: StageRuns, before: RangeMinimum) -> Tensor:
    """(rows,) the slowest stage so far of the best way to each row."""
    start, cost_before = runs.search(lambda starts: before.within(starts, runs.last))
    crossed = torch.where(start <= runs.last, before.within(torch.minimum(start, runs.last), runs.last), FORBIDDEN)
    return torch.minimum(crossed, cost_before)


def _preferred(stages: Sequence[StageRuns], preference: Sequence[int], slowest: int) -> tuple[int, ...]:
    """Cuts of the plan with the least sum of preferences among those no slower than this."""
    ends = torch.tensor([*preference, 0], dtype=torch.int64)
    before, ways = _begin(stages[0]), []
    bound = torch.tensor(slowest)
    distinct = {id(runs): runs for runs in stages}
    fast_enough = {key: runs.search(lambda starts: bound)[0] for key, runs in distinct.items()}
    for runs in stages:
        start = fast_enough[id(runs)]
        allowed = start <= runs.last
        least = RangeMinimum(before).within(torch.minimum(start, runs.last), runs.last)
        best = _smallest(runs, torch.where(allowed, least, FORBIDDEN))
        ways.append((runs, start, before))
        before = _next((best + ends).clamp(max=FORBIDDEN))
    return _trace(ways)


def _trace(ways: Sequence[tuple[StageRuns, Tensor, Tensor]]) -> tuple[int, ...]:
    """The cuts, from the last stage back: what each may start at, and how good the way to that start is."""
    end, cuts = ways[-1][0].sums.num_segments - 1, []
    for runs, first, before in reversed(ways[1:]):
        ranges = [(int(first[row]), int(runs.last[row]) + 1) for row in (runs.end == end).nonzero()[:, 0]]
        best = [(start + int(before[start:stop].argmin()), stop) for start, stop in ranges if start < stop]
        start = min((int(before[start]), start) for start, _ in best)[1]
        end = start - 1
        cuts.append(end)
    return tuple(reversed(cuts))


def _begin(runs: StageRuns) -> Tensor:
    """The first stage begins at the model's beginning."""
    before = torch.full((runs.sums.num_segments,), FORBIDDEN, dtype=torch.int64)
    before[0] = 0
    return before


def _next(best: Tensor) -> Tensor:
    """By starts: a stage from start b follows one that ended at cut b-1."""
    return torch.cat([best.new_full((1,), FORBIDDEN), best[:-1]])


def _smallest(runs: StageRuns, values: Tensor) -> Tensor:
    """(ends,) the smallest value of each end's rows."""
    best = torch.full((runs.sums.num_segments,), FORBIDDEN, dtype=torch.int64)
    return best.scatter_reduce_(0, runs.end, values, "amin")
