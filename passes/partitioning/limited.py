"""Stages under a memory limit: their peaks follow no order of starts, so that each has to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autodecouple.objectives.objective import Objective
from autodecouple.passes.measuring.stage_costs import Kind, StageCosts
from autodecouple.passes.partitioning.columns import minimise_slowest
from autodecouple.passes.partitioning.runs import FORBIDDEN, StageRuns

SLACKS = (101, 105, 125, 200)
"""Per cent of the unlimited optimum: bounds that are tried first, since a tight one leaves few stages to look at."""


class Limited:
    """The stages that take no more than `limit` bytes, with all that `Columns` asks for."""

    def __init__(
        self,
        costs: StageCosts,
        stages: Sequence[StageRuns],
        objectives: Sequence[Objective],
        preference: Sequence[int],
        limit: int,
    ) -> None:
        self.costs = costs
        self.stages = stages
        self.objectives = objectives
        self.preference = preference
        self.limit = limit

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def column(self, start: int, bound: int) -> Tensor:
        """(stages, ends) costs of the stages from one start; those that cost more than `bound` may be FORBIDDEN."""
        stop = max(runs.reach(start, bound) for runs in self.stages)
        known: dict[tuple[Kind, int], Tensor] = {}
        for stage, runs in enumerate(self.stages):
            key = self.costs.kind(stage, self.objectives), id(runs)
            if key not in known:
                known[key] = self._column(stage, start, stop, bound)
        return torch.stack([known[self.costs.kind(k, self.objectives), id(r)] for k, r in enumerate(self.stages)])

    def _column(self, stage: int, start: int, stop: int, bound: int) -> Tensor:
        costs = self.stages[stage].costs_from(start, stop)
        cheap = (costs <= bound).nonzero()[:, 0]
        if len(cheap):
            first, last = int(cheap[0]), int(cheap[-1])
            needs = self.costs.needs(stage, self.objectives, start, (start + first, start + last))
            costs[first : last + 1][needs > self.limit] = FORBIDDEN
        return costs


def minimise_within(stages: Limited, fastest: int) -> tuple[int, ...] | None:
    """The cuts of the best plan within the limit, None if there is none.

    fastest: cost of the slowest stage without a limit
    """
    bounds = [*(fastest * slack // 100 for slack in SLACKS), FORBIDDEN - 1]
    return next((cuts for bound in bounds if (cuts := minimise_slowest(stages, bound)) is not None), None)
