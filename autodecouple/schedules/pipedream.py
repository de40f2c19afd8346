"""PipeDream: coupled stages that stream, batch after batch, each on weights that are a few updates old."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op
from autodecouple.schedules.sequential import canonical, deal, require_counts, require_coupled


@dataclass(frozen=True)
class PipeDream:
    """1F1B over the stream of batches, without a flush (Narayanan et al., SOSP 2019).

        lane 0   F0 F1 F2 .. .. .. B0 U0 F3 B1 U1 F4 B2 U2 ...     numbers count batches
        lane 1      F0 F1 .. B0 U0 F2 B1 U1 F3 B2 U2 F4 ...        full after the first K-1 forwards
        lane 2         F0 B0 U0 F1 B1 U1 F2 B2 U2 F3 ...

    In every round a stage goes forward with a new batch and backward, of K stages stage k, with the one K-1-k rounds
    ago, at the weights which that one went forward with. They lack the K-1-k updates before: this is not
    backpropagation but for the last stage. The staleness is that of the stages, however many share a lane. Where the
    stream ends or is waited for, the rounds that are left run without a new batch, and the next batch fills it anew.

    `queue_depth` is as for `Streaming`. Raises ScheduleError where it is no whole number from 1, and when called on a
    plan with a detached cut.
    """

    num_micro_batches: int = field(default=1, init=False)
    queue_depth: int = 2
    barrier: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        require_counts(self)

    def place(self, plan: Plan) -> Plan:
        """The plan that says how many batches are under way in each stage at once."""
        count = len(plan.stages)
        stages = (dataclasses.replace(stage, versions=count - stage.index) for stage in plan.stages)
        return dataclasses.replace(plan, stages=tuple(stages))

    def lag(self, action: Action, plan: Plan) -> int:
        """All but forwards are of an older batch: a stage's backward comes a round after the next one's."""
        return 0 if action.op is Op.FORWARD else len(plan.stages) - 1 - action.stage

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        require_coupled(self, plan)
        return deal(canonical(plan, 1), plan)
