"""GPipe: all micro-batches forward, then all backward, for coupled stages."""

from __future__ import annotations

from dataclasses import dataclass

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Lane
from autodecouple.schedules.sequential import canonical, deal, require_counts, require_coupled


@dataclass(frozen=True)
class GPipe:
    """Backpropagation over lanes, with one loss over the whole batch (Huang et al. 2019).

        lane 0   F0 F1 F2 .................... B0 B1 B2 U
        lane 1      F0 F1 F2 L  B0 B1 B2 U                    idle share (K-1) / (M+K-1) of balanced stages

    One micro-batch is naive model parallelism. Counts are whole numbers from 1. Raises ScheduleError for counts, and
    when called on a plan with a detached cut.
    """

    num_micro_batches: int = 4
    queue_depth: int = 2
    barrier: bool = False

    def __post_init__(self) -> None:
        require_counts(self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        require_coupled(self, plan)
        return deal(canonical(plan, self.num_micro_batches), plan)
