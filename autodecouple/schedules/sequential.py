"""Stage after stage on one lane: the reference order, which the streaming schedules deal out to lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op, Schedule


@dataclass(frozen=True)
class Sequential:
    """Everything on one lane, a batch at a time: what every other schedule must equal, and the memory-saving one.

    Counts are whole numbers from 1; raises ScheduleError. `barrier` changes nothing on one lane.
    """

    num_micro_batches: int = 1
    queue_depth: int = 2
    barrier: bool = True

    def __post_init__(self) -> None:
        require_counts(self)

    def __call__(self, plan: Plan) -> tuple[Lane, ...]:
        return (canonical(plan, self.num_micro_batches),)


def canonical(plan: Plan, num_micro_batches: int) -> Lane:
    """The total order of one batch: each group of coupled stages is finished before the next one starts.

    Two stages coupled, two micro-batches; and three stages whose cuts overlap, so that each is finished with the next:

        0F0 1F0 0F1 1F1   1L   1B0 0B0 1B1 0B1   1U 0U
        0F0 0L 0B0   1F0 1L 1B0   0W0 0U   2F0 2L 2B0   1W0 1U   2W0 2U

    Micro-batches go backward in ascending order, as in every schedule here, so gradients are summed in one order.
    """
    slices = range(num_micro_batches)
    actions: list[Action] = []
    waiting: list[Action] = []
    for group in _coupled_groups(plan):
        actions += [Action(stage, Op.FORWARD, m) for m in slices for stage in group]
        actions.append(Action(group[-1], Op.LOSS))
        actions += [Action(stage, Op.BACKWARD, m) for m in slices for stage in reversed(group)]
        actions, waiting = [*actions, *waiting], []
        for stage in reversed(group):
            weights = [Action(stage, Op.WEIGHT, m) for m in slices] if plan.splits_backward(stage) else []
            later = waiting if plan.overlaps_after(stage) else actions
            later += [*weights, Action(stage, Op.UPDATE)]
    return tuple(actions)


def deal(actions: Lane, plan: Plan) -> tuple[Lane, ...]:
    """One total order dealt out to the plan's lanes; it cannot deadlock, for every lane follows the same order."""
    lanes: list[list[Action]] = [[] for _ in plan.lanes]
    for action in actions:
        lanes[plan.stages[action.stage].lane].append(action)
    return tuple(map(tuple, lanes))


def require_counts(schedule: Schedule) -> None:
    """Raise ScheduleError unless the schedule's counts are whole numbers from 1."""
    for name in ("num_micro_batches", "queue_depth"):
        value = getattr(schedule, name)
        if not isinstance(value, int) or value < 1:
            raise ScheduleError(f"{type(schedule).__name__}({name}={value!r}): give a whole number, 1 or more")


def require_coupled(schedule: Schedule, plan: Plan) -> None:
    """Raise ScheduleError if the plan has a detached cut: a schedule of backpropagation does not suit it."""
    for index, cut in enumerate(plan.cuts):
        if cut.detached:
            raise ScheduleError(
                f"{type(schedule).__name__} is for coupled stages, but the cut between stages {index} and {index + 1} "
                f'(after {cut.after!r}) is detached; use schedule="micro_batched", or couple the stages with loss="bp"'
            )


def _coupled_groups(plan: Plan) -> Iterator[tuple[int, ...]]:
    """Runs of stages between detached cuts: a gradient comes back within a run and never leaves it."""
    group: tuple[int, ...] = ()
    for stage in range(len(plan.stages)):
        group = (*group, stage)
        if not plan.coupled_after(stage):
            yield group
            group = ()
