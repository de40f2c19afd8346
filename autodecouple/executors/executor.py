"""What every executor offers, and what they share."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from autodecouple.executors.job import Job
from autodecouple.executors.ranks import ALONE, Ranks
from autodecouple.executors.transport import Queue
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Schedule
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Span, Timeline


class Executor(Protocol):
    """Runs jobs through the stages in the order of a schedule.

    feeds: whether the batches' inputs come from this process; elsewhere a job has none
    ranks: who writes a checkpoint; where there are several, each saves what it has without `gather`
    leads: whether this process writes it where all have everything
    """

    @property
    def feeds(self) -> bool: ...

    @property
    def ranks(self) -> Ranks: ...

    @property
    def leads(self) -> bool: ...

    @property
    def timeline(self) -> Timeline: ...

    def submit(self, job: Job) -> None:
        """Take a job; may return before it is done, and may wait for room. Raises the error of an earlier job."""
        ...

    def synchronize(self) -> None:
        """Wait until every job is done; raises the first error."""
        ...

    def gather(self) -> None:
        """Let this process's stages hold what was trained elsewhere; nothing may be under way."""
        ...

    def scatter(self) -> None:
        """Hand the state of this process's stages to where they are trained; nothing may be under way."""
        ...

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        """End workers; `abort` drops jobs that are still running, `wait=False` returns before they have ended."""
        ...


class Local:
    """What is the same for every executor whose stages are trained in this process."""

    feeds = True
    ranks = ALONE
    leads = True

    def gather(self) -> None:
        return None

    def scatter(self) -> None:
        return None


class Programs:
    """The programs of a schedule on a plan, made once per number of micro-batches: a small batch has fewer.

    smallest: rows that a micro-batch must have
    """

    def __init__(self, plan: Plan, schedule: Schedule, smallest: int = 1) -> None:
        self.plan = plan
        self.schedule = schedule
        self.smallest = smallest
        self._made: dict[int, Program] = {}

    @property
    def full(self) -> Program:
        """The program of a batch with rows for all micro-batches."""
        return self.for_rows(self.schedule.num_micro_batches * self.smallest)

    def for_rows(self, rows: int) -> Program:
        count = max(1, min(self.schedule.num_micro_batches, rows // self.smallest))
        if count not in self._made:
            schedule = self.schedule
            if count != schedule.num_micro_batches:
                schedule = dataclasses.replace(schedule, num_micro_batches=count)  # type: ignore[type-var]
            self._made[count] = Program(self.plan, schedule)
        return self._made[count]


class Recorder:
    """The spans of the last actions, as the lanes' own clocks saw them."""

    def __init__(self, num_lanes: int, limit: int = 20_000) -> None:
        self.num_lanes = num_lanes
        self._marks: deque[tuple[int, Action, int, Any, Any, Callable[[Any], float]]] = deque(maxlen=limit)

    def perform(self, job: Job, action: Action, stage: Stage, queue: Queue, lane: int) -> None:
        """Run an action between two marks; an error that leaves it says where it happened."""
        start = queue.mark()
        try:
            job.perform(action, stage, queue)
        except BaseException as error:
            error.add_note(_place(job, action, stage))
            raise
        self._marks.append((lane, action, job.index, start, queue.mark(), queue.seconds))

    def take(self) -> tuple[Span, ...]:
        """The spans so far, which are forgotten here."""
        spans = self.timeline().spans
        self._marks.clear()
        return spans

    def timeline(self) -> Timeline:
        spans = [
            Span(lane, action, batch, seconds(start), seconds(stop))
            for lane, action, batch, start, stop, seconds in list(self._marks)
        ]
        return Timeline(tuple(sorted(spans, key=lambda span: span.start)), self.num_lanes, "measured")


def _place(job: Job, action: Action, stage: Stage) -> str:
    plan = stage.plan
    names = [cut.module or cut.after for cut in plan.cuts]
    where = f"up to {names[stage.index]!r}" if stage.index < len(names) else f"after {names[-1]!r}" if names else "all"
    return (
        f"in {action.op.name.lower()} of stage {stage.index} of {len(plan.stages)} ({where}), device {stage.device},"
        f" batch {job.index}"
    )


def stages_of_lane(program: Program, lane: int, stages: Sequence[Stage]) -> list[Stage]:
    return [stages[index] for index in dict.fromkeys(action.stage for action in program.lanes[lane])]
