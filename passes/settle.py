"""Let a plan be what a schedule makes of it: its stages on other lanes, or with several batches under way in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from autodecouple.devices import Device
from autodecouple.errors import PartitionError
from autodecouple.plans import Plan
from autodecouple.schedules import Schedule, placed


class Limits(Protocol):
    """Bytes that a stage, and that the stages of each lane together, may take."""

    @property
    def memory_limit(self) -> int | None: ...
    @property
    def devices(self) -> Sequence[Device]: ...


def settle(plan: Plan, schedule: Schedule, limits: Limits) -> Plan:
    """The plan as the schedule wants it.

    Cuts were chosen for one batch under way: raises PartitionError where the versions of several do not fit.
    """
    plan = placed(plan, schedule)
    if any(plan.staleness):
        for stages, limit in _limited(plan, limits):
            _check(plan, schedule, stages, limit)
    return plan


def _limited(plan: Plan, limits: Limits) -> Iterator[tuple[tuple[int, ...], int]]:
    """Stages that have a limit together."""
    if limits.memory_limit is not None:
        yield from (((stage.index,), limits.memory_limit) for stage in plan.stages)
    for lane, device in zip(plan.lanes, limits.devices, strict=False):
        if device.memory_limit is not None:
            yield lane, device.memory_limit


def _check(plan: Plan, schedule: Schedule, stages: tuple[int, ...], limit: int) -> None:
    taken = sum(plan.stages[index].memory_bytes for index in stages)
    if taken <= limit:
        return
    stashed = sum(plan.stages[index].stashed_bytes for index in stages)
    named = f"stage {stages[0]}" if len(stages) == 1 else f"stages {', '.join(map(str, stages))}"
    raise PartitionError(
        f"{type(schedule).__name__} keeps several batches under way at once, each with its own version of the weights:"
        f" {named} would take {taken:,} bytes, {stashed:,} of them for that, but the limit is {limit:,}. Pass"
        ' recompute=True, take fewer stages, or schedule="1f1b", which keeps one version'
    )
