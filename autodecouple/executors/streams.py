"""One worker per lane: a thread on a CPU lane, a thread and a CUDA stream on a GPU lane.

Workers share a board of what is done. Each runs the actions of its lane in order, batch after batch, and starts one as
soon as what it waits for is done: the same rules as everywhere (`dependencies`, `dependencies_across`). The queues
between lanes are bounded by those rules, too: a stage is at most `queue_depth` batches ahead of the next one.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence

import torch

from autodecouple.errors import ClosedError
from autodecouple.executors.executor import Recorder, stages_of_lane
from autodecouple.executors.job import Job
from autodecouple.executors.transport import Parcel, Queues, make_queues
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op, dependencies_across
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline


class Streams:
    """Runs jobs on one worker per lane; `submit` returns as soon as the first lane has room."""

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        self._board = _Board(program.plan, len(program.lanes))
        self._recorder = Recorder(len(program.lanes))
        self._queues = [make_queues(stages_of_lane(program, lane, stages)) for lane in range(len(program.lanes))]
        self._pid = os.getpid()
        self._workers = [
            threading.Thread(
                target=_work,
                args=(lane, self._board, stages, queues, self._recorder, num_threads),
                name=f"autodecouple-lane-{lane}",
                daemon=True,  # an exit without close() must not hang
            )
            for lane, queues in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, job: Job) -> None:
        self._check_process()
        self._board.submit(job)

    def synchronize(self) -> None:
        self._check_process()
        self._board.drain()
        for queue in itertools.chain.from_iterable(queues.values() for queues in self._queues):
            queue.synchronize()

    def close(self, *, abort: bool = False) -> None:
        if self._pid != os.getpid():
            return  # the workers live in the parent
        try:
            if not abort:
                self.synchronize()
        finally:
            self._board.close()
            for worker in self._workers:
                if worker is not threading.current_thread():
                    worker.join()

    @property
    def timeline(self) -> Timeline:
        return self._recorder.timeline()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError(
                "this process was forked after compile(): the workers stayed behind; compile in the child"
            )


def _work(
    lane: int, board: _Board, stages: Sequence[Stage], queues: Queues, recorder: Recorder, num_threads: int
) -> None:
    """The life of a worker: it holds no reference to the executor, which may be collected."""
    torch.set_num_threads(num_threads)
    while (job := board.next(lane)) is not None:
        own = stages_of_lane(job.program, lane, stages)
        try:
            for action in job.program.lanes[lane]:
                if not board.wait(job, action):
                    job.discard(own)
                    break
                stage = stages[action.stage]
                recorder.perform(job, action, stage, queues[stage.device], lane)
                board.mark(job, action)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: nothing may hang
            job.discard(own)
            board.fail(job, error)
        board.leave(job, [queue.send(()) for queue in queues.values()])
        del job


class _Board:
    """What is done, and who waits for it; all under one condition."""

    def __init__(self, plan: Plan, num_lanes: int) -> None:
        self._plan = plan
        self._changed = threading.Condition()
        self._inboxes: list[deque[Job]] = [deque() for _ in range(num_lanes)]
        self._jobs: dict[int, Job] = {}  # by index, until every lane has left them
        self._lanes_left: dict[int, int] = {}
        self._error: BaseException | None = None
        self._failed_at: int | None = None  # jobs from here on are dropped
        self._closed = False

    # ---------------------------------------------------------------- the caller's side

    def submit(self, job: Job) -> None:
        """Post a job once the first stage has room for it."""
        depth = job.program.schedule.queue_depth
        with self._changed:
            self._check_open()
            self._changed.wait_for(lambda: self._error is not None or self._is_taken(job.index - depth))
            self._raise_error()
            self._jobs[job.index] = job
            self._lanes_left[job.index] = len(self._inboxes)
            for inbox in self._inboxes:
                inbox.append(job)
            self._changed.notify_all()

    def drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)
            self._raise_error()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the pipeline was closed; compile the model again to go on training")

    def _is_taken(self, index: int) -> bool:
        job = self._jobs.get(index)
        return job is None or job.is_done(Action(0, Op.FORWARD))

    def _raise_error(self) -> None:
        """Hand the error to the caller, once, when all lanes have come to rest; then go on as new."""
        if self._error is None:
            return
        self._changed.wait_for(lambda: not self._jobs)
        error, self._error, self._failed_at = self._error, None, None
        raise error

    # ---------------------------------------------------------------- the workers' side

    def next(self, lane: int) -> Job | None:
        """The oldest job that the lane has not run, None when closed and none is left."""
        inbox = self._inboxes[lane]
        with self._changed:
            self._changed.wait_for(lambda: self._closed or inbox)
            return inbox.popleft() if inbox else None

    def wait(self, job: Job, action: Action) -> bool:
        """Wait until the action may start; False if its job is dropped."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_dropped(job) or self._may_start(job, action))
            return not self._is_dropped(job)

    def _is_dropped(self, job: Job) -> bool:
        return self._closed or (self._failed_at is not None and job.index >= self._failed_at)

    def _may_start(self, job: Job, action: Action) -> bool:
        if any(needed not in job.done for needed in job.program.waits[action]):
            return False
        across = dependencies_across(action, self._plan, job.program.schedule)
        return all(self._was_done(job.index - age, needed) for needed, age in across)

    def _was_done(self, index: int, needed: Action) -> bool:
        job = self._jobs.get(index)  # a job that all lanes have left is done
        return job is None or job.is_done(needed)

    def mark(self, job: Job, action: Action) -> None:
        with self._changed:
            job.done.add(action)
            self._changed.notify_all()

    def fail(self, job: Job, error: BaseException) -> None:
        """The first error counts; older jobs go on to their end, this one and younger ones are dropped."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._failed_at = job.index if self._failed_at is None else min(self._failed_at, job.index)
            self._changed.notify_all()

    def leave(self, job: Job, ends: list[Parcel]) -> None:
        """A lane has done with a job, as soon as `ends` are complete; the last one to leave finishes it."""
        with self._changed:
            job.ends += ends
            self._lanes_left[job.index] -= 1
            if self._lanes_left[job.index] == 0:
                del self._lanes_left[job.index], self._jobs[job.index]
                if len(job.done) < len(job.program.actions):
                    job.error = self._error or ClosedError(f"batch {job.index} was dropped: the pipeline was closed")
                job.finish()
            self._changed.notify_all()
