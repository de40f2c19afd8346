"""How long an action takes: predicted from FLOPs and bytes, given as a table, or measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autodecouple.errors import InputError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op, Schedule
from autodecouple.timeline import Timeline

_BACKWARD = (Op.BACKWARD, Op.WEIGHT)


class Cost(Protocol):
    """Seconds of work and of travel."""

    def seconds(self, action: Action) -> float:
        """Seconds that the action keeps its lane busy."""

    def transfer(self, cut: int) -> float:
        """Seconds that one micro-batch takes over cut number `cut`; counted between different lanes only."""


@dataclass(frozen=True)
class FlopCost:
    """Time is FLOPs over a speed and bytes over a link; a relative measure where the real speed is unknown.

    flops_per_second: of a lane of speed 1   bytes_per_second, latency (seconds): of every link between lanes
    num_micro_batches must be the schedule's. UPDATE takes no time: it moves bytes rather than computing, and a plan's
    stages are balanced without it, so that streaming tends to exactly `Plan.speedup`.
    splits_backward: the schedule's, which takes weights apart: half of the backward, as of a product of two matrices
    """

    plan: Plan
    num_micro_batches: int = 1
    flops_per_second: float = 1e12
    bytes_per_second: float = math.inf
    latency: float = 0.0
    splits_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("num_micro_batches", "flops_per_second", "bytes_per_second"):
            if not getattr(self, name) > 0:
                raise InputError(f"FlopCost({name}={getattr(self, name)!r}): give a number above 0")

    def seconds(self, action: Action) -> float:
        stage = self.plan.stages[action.stage]
        backward = stage.backward_flops * _share(action, self.plan, self.splits_backward)
        flops = {Op.FORWARD: stage.forward_flops, Op.LOSS: stage.head_flops, **dict.fromkeys(_BACKWARD, backward)}
        slices = 1 if action.micro_batch is None else self.num_micro_batches
        return flops.get(action.op, 0) / slices / (self.flops_per_second * stage.speed)

    def transfer(self, cut: int) -> float:
        return self.latency + self.plan.cuts[cut].num_bytes / self.num_micro_batches / self.bytes_per_second


@dataclass(frozen=True)
class TimedCost:
    """The seconds that a plan holds, of stages and of links; a micro-batch takes its share of them.

    num_micro_batches must be the schedule's; splits_backward as for FlopCost. Raises InputError for a plan whose stages
    were not timed.
    """

    plan: Plan
    num_micro_batches: int = 1
    splits_backward: bool = False

    def __post_init__(self) -> None:
        if not self.plan.is_timed:
            raise InputError('the plan holds no seconds: make it with plan(..., cost="measured")')

    def seconds(self, action: Action) -> float:
        stage = self.plan.stages[action.stage]
        backward = (stage.backward_seconds or 0.0) * _share(action, self.plan, self.splits_backward)
        found = {Op.FORWARD: stage.forward_seconds, Op.LOSS: stage.head_seconds, **dict.fromkeys(_BACKWARD, backward)}
        slices = 1 if action.micro_batch is None else self.num_micro_batches
        return (found.get(action.op, stage.update_seconds) or 0.0) / slices

    def transfer(self, cut: int) -> float:
        lane = self.plan.stages[cut].lane
        if lane >= len(self.plan.links):
            return 0.0
        return self.plan.links[lane].seconds(self.plan.cuts[cut].num_bytes / self.num_micro_batches)


def _share(action: Action, plan: Plan, halves: bool) -> float:
    """What part of its stage's backward an action is: beside a cut that overlaps as the plan says, else all or half."""
    if plan.splits_backward(action.stage):
        returning = plan.stages[action.stage].returning
        return returning if action.op is Op.BACKWARD else 1 - returning
    return 0.5 if halves else 1.0


def predicted(plan: Plan, schedule: Schedule) -> Cost:
    """The best that the plan itself tells: its seconds where it was timed, else its FLOPs at 1e12 per second."""
    kind = TimedCost if plan.is_timed else FlopCost
    return kind(plan, schedule.num_micro_batches, splits_backward=getattr(schedule, "splits_backward", False))


@dataclass(frozen=True)
class TableCost:
    """Seconds per single action of a stage and op, and seconds per cut (0 for cuts that `transfers` leaves out)."""

    table: Mapping[tuple[int, Op], float]
    transfers: Sequence[float] = ()

    def seconds(self, action: Action) -> float:
        """Raises InputError if the table lacks the action."""
        try:
            return self.table[action.stage, action.op]
        except KeyError:
            raise InputError(
                f"the cost table has no seconds for {action}; add the key ({action.stage}, Op.{action.op.name})"
            ) from None

    def transfer(self, cut: int) -> float:
        return self.transfers[cut] if cut < len(self.transfers) else 0.0


def measured(timeline: Timeline) -> TableCost:
    """Costs as a run had them: the median seconds of each stage's actions; waits and transfers are not among them."""
    return TableCost(timeline.seconds())
