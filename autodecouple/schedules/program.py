"""Lanes that are known to be whole and free of deadlock, and what each of their actions waits for."""

from __future__ import annotations

import graphlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op, Schedule, dependencies, expand


@dataclass(frozen=True)
class Program:
    """One batch of a schedule on a plan, worked out once for all who run it: simulator and executors.

    Raises ScheduleError when made, if the lanes leave work out or would deadlock. For a batch of fewer rows than
    micro-batches make another one: `Program(plan, dataclasses.replace(schedule, num_micro_batches=rows))`.
    """

    plan: Plan
    schedule: Schedule

    def __post_init__(self) -> None:
        check(self.lanes, self.plan)
        if (count := _num_micro_batches(self.lanes)) != (said := self.schedule.num_micro_batches):
            raise ScheduleError(f"{self.schedule!r} says {said} micro-batches, but its lanes hold {count}")

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        return self.schedule(self.plan)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """Every action, in one order that keeps all lanes and all waits."""
        return order(self.lanes, self.plan)

    @cached_property
    def lane_of(self) -> Mapping[Action, int]:
        return {action: index for index, lane in enumerate(self.lanes) for action in lane}

    @cached_property
    def waits(self) -> Mapping[Action, tuple[Action, ...]]:
        """The actions of the same batch that each action waits for, besides those before it on its lane."""
        return {
            action: tuple(chain.from_iterable(map(self.expand, dependencies(action, self.plan))))
            for action in self.actions
        }

    def expand(self, requirement: Action) -> tuple[Action, ...]:
        """The actions whose completion meets a requirement; remembered."""
        if requirement not in self._expanded:
            self._expanded[requirement] = expand(requirement, self._by_op[requirement.stage, requirement.op])
        return self._expanded[requirement]

    @cached_property
    def _by_op(self) -> defaultdict[tuple[int, Op], list[Action]]:
        return _by_op(self.lanes)

    @cached_property
    def _expanded(self) -> dict[Action, tuple[Action, ...]]:
        return {}


def check(lanes: tuple[Lane, ...], plan: Plan) -> None:
    """Raise ScheduleError unless every needed action stands exactly once, on its stage's lane, without deadlock.

    One lane that holds all stages is always allowed, whatever lanes the plan has.
    """
    _check_whole(lanes, plan)
    if len(lanes) > 1:
        _check_places(lanes, plan)
    order(lanes, plan)


def order(lanes: tuple[Lane, ...], plan: Plan) -> tuple[Action, ...]:
    """One order of a batch's actions that keeps all lanes and all dependencies; ScheduleError names a deadlock."""
    by_op = _by_op(lanes)
    graph: graphlib.TopologicalSorter[Action] = graphlib.TopologicalSorter()
    for action in chain(*lanes):
        needed = dependencies(action, plan)
        graph.add(action, *(found for n in needed for found in expand(n, by_op[n.stage, n.op])))
    for before, after in chain.from_iterable(map(pairwise, lanes)):
        graph.add(after, before)
    try:
        return tuple(graph.static_order())
    except graphlib.CycleError as error:
        waiting, *others = reversed(error.args[1])  # graphlib lists the awaited one first
        chained = ", which waits for ".join(map(str, others))
        raise ScheduleError(f"deadlock: {waiting} waits for {chained}; reorder these on their lanes") from error


def _by_op(lanes: tuple[Lane, ...]) -> defaultdict[tuple[int, Op], list[Action]]:
    """Actions by stage and op, so that expanding a requirement looks at few."""
    found: defaultdict[tuple[int, Op], list[Action]] = defaultdict(list)
    for action in chain(*lanes):
        found[action.stage, action.op].append(action)
    return found


def _check_whole(lanes: tuple[Lane, ...], plan: Plan) -> None:
    counts = Counter(chain(*lanes))
    needed = tuple(_needed(plan, _num_micro_batches(lanes), counts))
    if missing := [action for action in needed if action not in counts]:
        raise ScheduleError(f"{_spelled(missing[0])} is missing: add it to the lane of stage {missing[0].stage}")
    if twice := [action for action, count in counts.items() if count > 1]:
        raise ScheduleError(f"{twice[0]} stands {counts[twice[0]]} times in the lanes, expected once")
    if foreign := sorted(map(str, counts.keys() - needed)):
        raise ScheduleError(
            f"{foreign[0]} has no place here: a plan of {len(plan.stages)} stages needs F and B of each micro-batch "
            "(and W of all or none), one U per stage, and L (of the batch or of each micro-batch) on stages that no "
            "gradient comes back to"
        )


def _needed(plan: Plan, num_micro_batches: int, present: Mapping[Action, int]) -> Iterator[Action]:
    """Every action that a batch takes; a loss is per micro-batch, and weights apart, where the lanes hold one such."""
    slices = range(num_micro_batches)
    for stage in range(len(plan.stages)):
        yield from (Action(stage, op, m) for op in (Op.FORWARD, Op.BACKWARD) for m in slices)
        if plan.overlaps_after(stage) or any(Action(stage, Op.WEIGHT, m) in present for m in slices):
            yield from (Action(stage, Op.WEIGHT, m) for m in slices)
        yield Action(stage, Op.UPDATE)
        if not plan.coupled_after(stage):
            split = any(Action(stage, Op.LOSS, m) in present for m in slices)
            yield from (Action(stage, Op.LOSS, m) for m in (slices if split else (None,)))


def _num_micro_batches(lanes: tuple[Lane, ...]) -> int:
    sliced = (action for action in chain(*lanes) if action.op in (Op.FORWARD, Op.BACKWARD))
    return 1 + max((action.micro_batch or 0 for action in sliced), default=0)


def _spelled(action: Action) -> str:
    """Its name, and for a loss of the whole batch the other way to give it."""
    return f"{action} (or {action}0 for each micro-batch)" if action == Action(action.stage, Op.LOSS) else str(action)


def _check_places(lanes: tuple[Lane, ...], plan: Plan) -> None:
    if len(lanes) != len(plan.lanes):
        raise ScheduleError(
            f"{len(lanes)} lanes for a plan of {len(plan.lanes)}; give one per lane of the plan, or one"
        )
    for index, lane in enumerate(lanes):
        for action in lane:
            if (place := plan.stages[action.stage].lane) != index:
                raise ScheduleError(f"{action} stands on lane {index}, but the plan puts its stage on lane {place}")
