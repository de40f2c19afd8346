"""Streaming: every lane works through its own stages, and nobody waits for a gradient from behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Lane
from autodecouple.schedules.sequential import canonical, deal, require_counts


@dataclass(frozen=True)
class Streaming:
    """Each lane takes its stages in order, batch after batch; the order is exactly the sequential one per stage.

        lane 0   F0 L0 B0 U0 F1 L1 B1 U1 F2 ...
        lane 1      F0 L0 B0 U0 F1 L1 B1 U1 ...       full after the first K-1 forwards; barrier=True waits for all
                                                      updates of a batch before the next one (SCPL as published)

    `queue_depth` is the batches that a stage may be ahead of the next one's forward, 1 or more (else ScheduleError);
    with 2 the rate is already that of the slowest lane, so a deeper queue only evens out jitter.
    """

    num_micro_batches: int = field(default=1, init=False)
    queue_depth: int = 2
    barrier: bool = False

    def __post_init__(self) -> None:
        require_counts(self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        return deal(canonical(plan, 1), plan)
