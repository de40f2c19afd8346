"""Stages under a memory limit: their peaks follow no order of starts, so that each has to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autodecouple.objectives.objective import Objective
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partitioning import columns, runs
from autodecouple.passes.partitioning.runs import FORBIDDEN, StageRuns
from autodecouple.passes.partitioning.ways import find_ways

SLACKS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""How much slower than the best that may fit the slowest stage may be, at first: tight bounds leave few stages to look
at."""


class Limited:
    """The stages that take no more bytes than they may, with all that `Columns` asks for.

    limits: bytes per stage number, None for no limit
    """

    def __init__(
        self,
        costs: StageCosts,
        stages: Sequence[StageRuns],
        objectives: Sequence[Objective],
        preference: Sequence[int],
        limits: Sequence[int | None],
    ) -> None:
        self.costs = costs
        self.objectives = objectives
        self.preference = preference
        self.limits = limits
        self._alike: dict[Any, list[int]] = {}  # stage numbers whose stages cost and take the same
        for stage, (same, limit) in enumerate(zip(stages, limits, strict=True)):
            self._alike.setdefault((costs.kind(stage, objectives), id(same), limit), []).append(stage)
        self.stages = list(stages)
        self._firsts: list[Tensor] = []
        for alike in self._alike.values():
            self._narrow(alike)
        self._bound = -1

    def _narrow(self, alike: Sequence[int]) -> None:
        """Leave out what is too large for certain."""
        limit = self.limits[alike[0]]
        nothing = torch.zeros(len(self.costs.ends), dtype=torch.int64)
        first = nothing if limit is None else self.costs.first_within(alike[0], self.objectives, limit)
        narrower = self.stages[alike[0]].behind(first)
        for stage in alike:
            self.stages[stage] = narrower
        self._firsts.append(first.flip(0).cummin(0).values.flip(0))

    def fits(self, cuts: Sequence[int]) -> bool:
        """Whether no stage of a plan takes more than it may."""
        begins, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(self.costs.legal)]
        needs = [
            int(self.costs.needs(stage, self.objectives, begin, (end, end)))
            for stage, (begin, end) in enumerate(zip(begins, ends, strict=True))
        ]
        return all(limit is None or need <= limit for need, limit in zip(needs, self.limits, strict=True))

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def column(self, start: int, bound: int) -> Tensor:
        """(stages, ends) costs of the stages from one start, FORBIDDEN where no plan within `bound` could hold one."""
        if bound != self._bound:
            self._bound, (self._reached, self._leading) = bound, find_ways(self.stages, bound)
        reach = max(int(torch.searchsorted(first, start, right=True)) for first in self._firsts)
        stop = max(start, min(reach, max(stage.reach(start, bound) for stage in self.stages)))
        column = torch.full((len(self.stages), stop - start), FORBIDDEN, dtype=torch.int64)
        for alike in self._alike.values():
            used = [stage for stage in alike if self._reached[stage, start]]
            if used:
                column[used] = self._column(used, start, stop, bound)
        return column

    def _column(self, alike: Sequence[int], start: int, stop: int, bound: int) -> Tensor:
        stage = alike[0]
        costs, limit = self.stages[stage].costs_from(start, stop), self.limits[stage]
        costs[(costs > bound) | ~self._leading[alike, start:stop].any(0)] = FORBIDDEN
        left = (costs < FORBIDDEN).nonzero()[:, 0]
        if len(left) and limit is not None:
            first, last = int(left[0]), int(left[-1])
            needs = self.costs.needs(stage, self.objectives, start, (start + first, start + last))
            costs[first : last + 1][needs > limit] = FORBIDDEN
        return costs


def minimise_within(limited: Limited) -> tuple[int, ...] | None:
    """The cuts of the best plan within the limit, None if there is none.

    The best of all plans whose stages are not too large for certain is the best one if it fits; else none is faster.
    """
    found = runs.minimise_slowest(limited.stages, limited.preference)
    if found is None:
        return None
    if limited.fits(found[1]):
        return found[1]
    bounds = [*(min(int(found[0] * (1 + slack)), FORBIDDEN - 1) for slack in SLACKS), FORBIDDEN - 1]
    return next((cuts for bound in bounds if (cuts := columns.minimise_slowest(limited, bound)) is not None), None)
