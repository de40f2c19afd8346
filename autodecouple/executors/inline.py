"""The reference: every action in the caller's thread, one batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from autodecouple.errors import ClosedError
from autodecouple.executors.executor import Local, Recorder
from autodecouple.executors.in_flight import InFlight
from autodecouple.executors.job import Job
from autodecouple.executors.transport import make_queues
from autodecouple.schedules.actions import Action
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline


class Inline(Local):
    """Runs each job to its end before `submit` returns; `num_threads` as the plan's CPU lanes would have them.

    Where actions lag behind, a job ends in a later round, or when it is waited for.
    """

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        self._stages = stages
        self._num_threads = num_threads
        self._queues = make_queues(stages)
        self._recorder = Recorder(1)
        self._in_flight = InFlight(program)
        self._error: BaseException | None = None

    def submit(self, job: Job) -> None:
        self._round(job)
        if self._error is not None:
            self.synchronize()

    def synchronize(self) -> None:
        while self._in_flight:
            self._round(None)
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame, and the frame would hold it

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        if abort:
            self._give_up(ClosedError("the batch was dropped: the pipeline was closed"))
        else:
            self.synchronize()

    @property
    def timeline(self) -> Timeline:
        return self._recorder.timeline()

    def _round(self, new: Job | None) -> None:
        """Every action once, each for the batch that it has come to."""
        try:
            with _threads(self._num_threads):
                for action in self._in_flight.enter(new).actions:
                    self._take(self._in_flight.of(action), action)
            if (ended := self._in_flight.leave()) is not None:
                self._finish(ended)
        except BaseException as error:  # Ctrl-C, between two actions
            self._give_up(error)
            raise

    def _take(self, job: Job | None, action: Action) -> None:
        if job is None or job.error is not None:
            return
        stage = self._stages[action.stage]
        try:
            self._recorder.perform(job, action, stage, self._queues[stage.device], 0)
            job.done.add(action)
        except BaseException as error:  # this batch and younger ones are left out, older ones go on to their end
            self._error = error
            self._drop([other for other in self._in_flight.oldest_first() if other.index >= job.index], error)

    def _drop(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            if job.error is None:
                job.discard(self._stages, self._queues)
                job.error = error

    def _give_up(self, error: BaseException) -> None:
        """Drop all that is in flight."""
        jobs = self._in_flight.clear()
        self._drop(jobs, error)
        for job in jobs:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        for queue in self._queues.values():
            queue.synchronize()
        job.finish()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)
