"""1F1B: each lane alternates a forward and a backward, so it holds few micro-batches at a time."""

from __future__ import annotations

from dataclasses import dataclass

from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op
from autodecouple.schedules.sequential import require_counts, require_coupled


@dataclass(frozen=True)
class OneFOneB:
    """Backpropagation over lanes in GPipe's time but less memory (PipeDream-flush, Narayanan et al. 2021).

        lane 0   F0 F1 F2 .. .. .. B0 F3 B1 .. B2 .. B3 U      warm-up: a forward for each lane behind
        lane 1      F0 F1 .. .. B0 F2 B1 F3 B2 .. B3 U         then one forward, one backward
        lane 2         F0 L0 B0 F1 L1 B1 F2 L2 B2 F3 L3 B3 U   then drain

    The loss is taken per micro-batch. A lane holds at most as many micro-batches as there are lanes from it to the
    end. Counts are whole numbers from 1. Raises ScheduleError for counts, and when called on a plan with a detached
    cut.
    """

    num_micro_batches: int = 4
    queue_depth: int = 2
    barrier: bool = False

    def __post_init__(self) -> None:
        require_counts(self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        require_coupled(self, plan)
        return tuple(_lane(stages, plan, self.num_micro_batches) for stages in plan.lanes)


def _lane(stages: tuple[int, ...], plan: Plan, num_micro_batches: int) -> Lane:
    if not stages:
        return ()
    warm_up = sum(1 for other in plan.lanes if other and other[0] > stages[0])
    actions: list[Action] = []
    for m in range(num_micro_batches + warm_up):
        if m < num_micro_batches:
            actions += [Action(stage, Op.FORWARD, m) for stage in stages]
        if m >= warm_up:
            actions += _backward(stages, plan, m - warm_up)
    return (*actions, *(Action(stage, Op.UPDATE) for stage in reversed(stages)))


def _backward(stages: tuple[int, ...], plan: Plan, micro_batch: int) -> list[Action]:
    """One micro-batch back through a lane's stages; the last stage of all takes its loss first."""
    actions = [Action(stage, Op.BACKWARD, micro_batch) for stage in reversed(stages)]
    is_last = stages[-1] == len(plan.stages) - 1
    return [Action(stages[-1], Op.LOSS, micro_batch), *actions] if is_last else actions
