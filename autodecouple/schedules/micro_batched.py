"""Streaming in micro-batches: lane k+1 starts on the first slice while lane k still works on the second."""

from __future__ import annotations

from dataclasses import dataclass

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Lane
from autodecouple.schedules.sequential import canonical, deal, require_counts


@dataclass(frozen=True)
class MicroBatched:
    """Micro-batches go forward one by one, the loss is taken over the whole batch, then each goes backward.

        lane 0   F0 F1 F2 L  B0 B1 B2 U
        lane 1      F0 F1 F2 L  B0 B1 B2 U            SCPL+GPipe in the SCPL paper

    Batch-wise losses (SupCon, DeInfoReg) so see every row. Counts are whole numbers from 1; raises ScheduleError.
    """

    num_micro_batches: int = 4
    queue_depth: int = 2
    barrier: bool = False

    def __post_init__(self) -> None:
        require_counts(self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        return deal(canonical(plan, self.num_micro_batches), plan)
