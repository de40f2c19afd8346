"""Stages under a memory limit: their peaks follow no order of starts, so that each has to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autodecouple.objectives.objective import Objective
from autodecouple.passes.measuring.stage_costs import StageCosts
from autodecouple.passes.partitioning.columns import minimise_slowest
from autodecouple.passes.partitioning.runs import FORBIDDEN, StageRuns

SLACKS = (101, 105, 125, 200)
"""Per cent of the unlimited optimum: bounds that are tried first, since a tight one leaves few stages to look at."""


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
        self.stages = stages
        self.objectives = objectives
        self.preference = preference
        self.limits = limits
        kinds = [costs.kind(stage, objectives) for stage in range(len(stages))]
        self._keys = [(kind, id(runs), limit) for kind, runs, limit in zip(kinds, stages, limits, strict=True)]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def column(self, start: int, bound: int) -> Tensor:
        """(stages, ends) costs of the stages from one start; those that cost more than `bound` may be FORBIDDEN."""
        stop = max(runs.reach(start, bound) for runs in self.stages)
        known: dict[Any, Tensor] = {}
        for stage, key in enumerate(self._keys):
            if key not in known:
                known[key] = self._column(stage, start, stop, bound)
        return torch.stack([known[key] for key in self._keys])

    def _column(self, stage: int, start: int, stop: int, bound: int) -> Tensor:
        costs, limit = self.stages[stage].costs_from(start, stop), self.limits[stage]
        cheap = (costs <= bound).nonzero()[:, 0]
        if len(cheap) and limit is not None:
            first, last = int(cheap[0]), int(cheap[-1])
            needs = self.costs.needs(stage, self.objectives, start, (start + first, start + last))
            costs[first : last + 1][needs > limit] = FORBIDDEN
        return costs


def minimise_within(stages: Limited, fastest: int) -> tuple[int, ...] | None:
    """The cuts of the best plan within the limit, None if there is none.

    fastest: cost of the slowest stage without a limit
    """
    bounds = [*(min(fastest * slack // 100, FORBIDDEN - 1) for slack in SLACKS), FORBIDDEN - 1]
    return next((cuts for bound in bounds if (cuts := minimise_slowest(stages, bound)) is not None), None)
