"""When each lane does what: a schedule is a value, and calling it on a plan makes one order of actions per lane.

    sequential     one lane, stage after stage: the reference
    streaming      a stage starts the next batch right after its own update: no bubbles once filled
    barrier        streaming with a barrier after every batch, as SCPL was published
    micro_batched  streaming in micro-batches with the loss over the whole batch (SCPL+GPipe)
    gpipe, 1f1b    the two classical schedules of coupled stages
    interleaved    1f1b on lanes that hold several stages in turn
    zero_bubble    the same with each backward in two, so that weights' gradients fill the gaps
    pipedream      1f1b over the stream of batches, each stage on weights that are a few updates old

Any callable value with the same three fields is a schedule too; `Program` checks the lanes that it makes. One that
needs its stages on other lanes than the plan's has a method `place`, from a plan to a plan; one whose actions are not
all of the newest batch, a method `lag` (see `actions.lag`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Lane, Op, Schedule, dependencies, dependencies_across, lag
from autodecouple.schedules.gpipe import GPipe
from autodecouple.schedules.interleaved import Interleaved
from autodecouple.schedules.micro_batched import MicroBatched
from autodecouple.schedules.one_f_one_b import OneFOneB
from autodecouple.schedules.pipedream import PipeDream
from autodecouple.schedules.program import Program, check, order
from autodecouple.schedules.sequential import Sequential
from autodecouple.schedules.streaming import Streaming
from autodecouple.schedules.zero_bubble import ZeroBubble

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "sequential": Sequential(),
        "streaming": Streaming(),
        "barrier": Streaming(barrier=True),
        "micro_batched": MicroBatched(),
        "gpipe": GPipe(),
        "1f1b": OneFOneB(),
        "interleaved": Interleaved(),
        "zero_bubble": ZeroBubble(),
        "pipedream": PipeDream(),
    }
)
"""The schedules that have a name, with their default fields."""


def resolve(schedule: str | Schedule) -> Schedule:
    """The schedule of that name, or the given one itself; raises ScheduleError listing the names."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ScheduleError(f"no schedule is called {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        return SCHEDULES[schedule]
    if isinstance(schedule, type) or not callable(schedule):
        raise ScheduleError(
            f"{schedule!r} is not a schedule; give a name ({', '.join(SCHEDULES)}) or a value such as Streaming()"
        )
    return schedule


def placed(plan: Plan, schedule: Schedule) -> Plan:
    """The plan with its stages on the lanes that the schedule wants them on: mostly those that they are on."""
    place = getattr(schedule, "place", None)
    return plan if place is None else place(plan)


__all__ = [
    "SCHEDULES",
    "Action",
    "GPipe",
    "Interleaved",
    "Lane",
    "MicroBatched",
    "OneFOneB",
    "Op",
    "PipeDream",
    "Program",
    "Schedule",
    "Sequential",
    "Streaming",
    "ZeroBubble",
    "check",
    "dependencies",
    "dependencies_across",
    "lag",
    "order",
    "placed",
    "resolve",
]
