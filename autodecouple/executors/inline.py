"""The reference: every action in the caller's thread, one batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from autodecouple.executors.executor import Local, Recorder
from autodecouple.executors.job import Job
from autodecouple.executors.transport import make_queues
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline


class Inline(Local):
    """Runs each job to its end before `submit` returns; `num_threads` as the plan's CPU lanes would have them."""

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        self._stages = stages
        self._num_threads = num_threads
        self._queues = make_queues(stages)
        self._recorder = Recorder(1)

    def submit(self, job: Job) -> None:
        try:
            with _threads(self._num_threads):
                for action in job.program.actions:
                    stage = self._stages[action.stage]
                    self._recorder.perform(job, action, stage, self._queues[stage.device], 0)
                    job.done.add(action)
        except BaseException as error:
            job.discard(self._stages, self._queues)
            job.error = error
            raise
        finally:
            for queue in self._queues.values():
                queue.synchronize()
            job.finish()

    def synchronize(self) -> None:
        return None

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        return None

    @property
    def timeline(self) -> Timeline:
        return self._recorder.timeline()


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
