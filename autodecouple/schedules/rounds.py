"""What schedules share whose lanes hold several stages far apart: stages dealt in turn, micro-batches in rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op, Schedule
from autodecouple.schedules.sequential import require_coupled


@dataclass(frozen=True)
class Rounds:
    """In which order a lane takes its stages and micro-batches: round after round, stage after stage within one.

        2 stages on each of 2 lanes, 4 micro-batches   forward  0F0 0F1 2F0 2F1   0F2 0F3 2F2 2F3
                                                       backward 2B0 2B1 0B0 0B1   2B2 2B3 0B2 0B3

    num_stages: on each lane; size: micro-batches of a round
    """

    num_lanes: int
    num_stages: int
    num_micro_batches: int
    size: int

    @staticmethod
    def of(plan: Plan, schedule: Schedule) -> Rounds:
        """Rounds of as many micro-batches as there are lanes, or of more where that does not divide them.

        Raises ScheduleError for a plan with a detached cut, or whose lanes do not hold its stages in turn.
        """
        require_coupled(schedule, plan)
        _require_turns(schedule, plan)
        lanes, micro_batches = len(plan.lanes), schedule.num_micro_batches
        most = max(1, micro_batches // lanes)
        count = next(count for count in range(most, 0, -1) if micro_batches % count == 0)
        return Rounds(lanes, len(plan.stages) // lanes, micro_batches, micro_batches // count)

    def alternate(self, lane: int, ahead: int) -> Iterator[Action]:
        """A lane's forwards until a first backward can have come, then one of each in turn, then the other backwards.

        ahead: forwards that the lane is ahead of the last one. The last stage takes each loss right before its backward
        """
        last = self.num_lanes * self.num_stages - 1
        forwards = self._actions(lane, Op.FORWARD, range(self.num_stages))
        backwards = self._actions(lane, Op.BACKWARD, range(self.num_stages - 1, -1, -1))
        yield from islice(forwards, (self.num_stages - 1) * self.size + ahead)
        for forward, backward in zip_longest(forwards, backwards):
            if forward is not None:
                yield forward
            if backward.stage == last:
                yield Action(last, Op.LOSS, backward.micro_batch)
            yield backward

    def updates(self, lane: int) -> Iterator[Action]:
        """The later stage first, as in every schedule here."""
        last = lane + (self.num_stages - 1) * self.num_lanes
        return (Action(stage, Op.UPDATE) for stage in range(last, -1, -self.num_lanes))

    def _actions(self, lane: int, op: Op, turns: range) -> Iterator[Action]:
        for begin in range(0, self.num_micro_batches, self.size):
            for turn in turns:
                stage = turn * self.num_lanes + lane
                yield from (Action(stage, op, m) for m in range(begin, begin + self.size))


def in_turn(plan: Plan, schedule: Schedule) -> Plan:
    """The plan with its stages dealt to its lanes in turn; raises ScheduleError where that gives unequally many."""
    count = len(plan.lanes)
    if len(plan.stages) % count:
        more = -(-len(plan.stages) // count) * count
        raise ScheduleError(
            f"{type(schedule).__name__} deals the stages to the lanes in turn, equally many to each, but there are"
            f" {len(plan.stages)} stages for {count} lanes: take n_stages={more}, or other devices"
        )
    homes = [plan.stages[lane[0]] for lane in plan.lanes]
    stages = (
        dataclasses.replace(stage, lane=home.lane, device=home.device, speed=home.speed)
        for stage, home in zip(plan.stages, homes * (len(plan.stages) // count), strict=True)
    )
    return dataclasses.replace(plan, stages=tuple(stages))


def _require_turns(schedule: Schedule, plan: Plan) -> None:
    count = len(plan.lanes)
    if len(plan.stages) % count or any(stage.lane != stage.index % count for stage in plan.stages):
        raise ScheduleError(
            f"{type(schedule).__name__} needs lanes that hold the stages in turn, equally many each, but they hold"
            f" {', '.join(map(str, plan.lanes))}; schedules.placed(plan, schedule) gives such a plan"
        )
