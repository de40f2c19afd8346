"""One worker per lane: a thread on a CPU lane, a thread and a CUDA stream on a GPU lane.

Workers share a board of what is done. Each runs the actions of its lane in order, batch after batch, and starts one as
soon as what it waits for is done: the same rules as everywhere (`dependencies`, `dependencies_across`). The queues
between lanes are bounded by those rules, too: a stage is at most `queue_depth` batches ahead of the next one.

Where a schedule lets actions lag behind, a lane holds several batches (`in_flight`), and takes each action of its order
for the one whose turn it is. When the caller waits for all batches, those rounds follow that have no new one.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autodecouple.errors import ClosedError
from autodecouple.executors.executor import Local, Recorder, stages_of_lane
from autodecouple.executors.in_flight import InFlight
from autodecouple.executors.job import Job
from autodecouple.executors.transport import Parcel, Queues, make_queues
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op, dependencies_across
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline

SECONDS_AT_EXIT = 10.0
"""How long a process that ends without close() waits for the actions under way."""


class Streams(Local):
    """Runs jobs on one worker per lane; `submit` returns as soon as the first lane has room."""

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        self._board = _Board(program.plan)
        self._recorder = Recorder(len(program.lanes))
        self._queues = [make_queues(stages_of_lane(program, lane, stages)) for lane in range(len(program.lanes))]
        self._pid = os.getpid()
        self._workers = [
            threading.Thread(
                target=_work,
                args=(_Lane(lane, self._board, stages, queues, self._recorder), InFlight(program, lane), num_threads),
                name=f"autodecouple-lane-{lane}",
                daemon=True,  # an exit without close() must not hang
            )
            for lane, queues in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()
        _running.add(self)

    def submit(self, job: Job) -> None:
        self._check_process()
        self._board.submit(job)

    def synchronize(self) -> None:
        self._check_process()
        self._board.drain()
        for queue in itertools.chain.from_iterable(queues.values() for queues in self._queues):
            queue.synchronize()

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        if self._pid != os.getpid():
            return  # the workers live in the parent
        try:
            if not abort:
                self.synchronize()
        finally:
            self._board.close()
            if wait:
                self.join()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the workers to end, which they do once closed."""
        stop = None if seconds is None else time.monotonic() + seconds
        for worker in self._workers:
            worker.join(None if stop is None else max(0.0, stop - time.monotonic()))

    @property
    def timeline(self) -> Timeline:
        return self._recorder.timeline()

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ClosedError(
                "this process was forked after compile(): the workers stayed behind; compile in the child"
            )


_running: weakref.WeakSet[Streams] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Let no worker be inside an operator when the interpreter goes down: that would abort the process."""
    running = list(_running)
    for executor in running:
        executor.close(abort=True, wait=False)
    for executor in running:
        executor.join(SECONDS_AT_EXIT / len(running))


def _work(lane: _Lane, in_flight: InFlight, num_threads: int) -> None:
    """The life of a worker: it holds no reference to the executor, which may be collected."""
    torch.set_num_threads(num_threads)
    while True:
        job = lane.board.next(lane.index, in_flight.newest)
        if job is None and not in_flight:
            return
        for action in in_flight.enter(job).lanes[lane.index]:
            lane.take(in_flight.of(action), action)
        lane.leave(in_flight.leave())
        del job


@dataclass(frozen=True)
class _Lane:
    """What a worker works with."""

    index: int
    board: _Board
    stages: Sequence[Stage]
    queues: Queues
    recorder: Recorder

    def take(self, job: Job | None, action: Action) -> None:
        """One action of a batch, unless that was dropped."""
        if job is None:
            return
        try:
            if self.board.wait(job, action):
                stage = self.stages[action.stage]
                self.recorder.perform(job, action, stage, self.queues[stage.device], self.index)
                self.board.mark(job, action)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: nothing may hang
            self.board.fail(job, error)

    def leave(self, job: Job | None) -> None:
        """Have done with a batch."""
        if job is None:
            return
        ends: list[Parcel] = []
        try:
            job.discard(stages_of_lane(job.program, self.index, self.stages), self.queues)
            ends = [queue.send(()) for queue in self.queues.values()]
        except BaseException as error:  # of a device that is lost; the caller still gets an answer
            self.board.fail(job, error)
        self.board.leave(job, self.index, ends)


class _Board:
    """What is done, and who waits for it; all under one lock.

    Ctrl-C may leave the caller's side at any instruction: every change it makes is a single one, and whoever waits
    wakes the workers up first.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.RLock()  # `with` takes it in one instruction; that of a Condition runs Python code
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[int, Job] = {}  # by index, until every lane has left them
        self._error: BaseException | None = None
        self._failed_at: int | None = None  # jobs from here on are dropped
        self._waited_for = -1  # jobs up to here end before younger ones begin
        self._closed = False

    # ---------------------------------------------------------------- the caller's side

    def submit(self, job: Job) -> None:
        """Post a job once the first stage has room for it."""
        depth = job.program.schedule.queue_depth
        with self._lock:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._error is not None or self._is_taken(job.index - depth))
            self._raise_error()
            self._check_open()
            self._jobs[job.index] = job
            self._changed.notify_all()

    def drain(self) -> None:
        with self._lock:
            self._waited_for = last = max(self._jobs, default=self._waited_for)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(index <= last for index in self._jobs))
            self._raise_error()

    def close(self) -> None:
        with self._lock:
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
        try:
            raise error
        finally:
            del error  # it holds this frame, and the frame would hold it

    # ---------------------------------------------------------------- the workers' side

    def next(self, lane: int, newest: Job | None) -> Job | None:
        """The oldest job that the lane has not run; None when it is to end those in flight, or itself if none are.

        newest: of those in flight
        """
        with self._lock:
            self._changed.wait_for(lambda: self._closed or self._untaken(lane) is not None or self._is_last(newest))
            job = self._untaken(lane)
            if job is None or (newest is not None and newest.index <= self._waited_for < job.index):
                return None
            job.to_take.remove(lane)
            return job

    def _is_last(self, newest: Job | None) -> bool:
        """Whether no younger job comes before this one has ended."""
        return newest is not None and (newest.index <= self._waited_for or self._error is not None)

    def _untaken(self, lane: int) -> Job | None:
        return next((job for job in self._jobs.values() if lane in job.to_take), None)

    def wait(self, job: Job, action: Action) -> bool:
        """Wait until the action may start; False if its job is dropped."""
        with self._lock:
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
        with self._lock:
            job.done.add(action)
            self._changed.notify_all()

    def fail(self, job: Job, error: BaseException) -> None:
        """The oldest failed job's error counts; it and younger jobs are dropped, older ones go on to their end."""
        with self._lock:
            job.error = error if job.error is None else job.error
            if self._failed_at is None or job.index < self._failed_at:
                self._error, self._failed_at = error, job.index
            self._changed.notify_all()

    def leave(self, job: Job, lane: int, ends: list[Parcel]) -> None:
        """A lane has done with a job, as soon as `ends` are complete; the last one to leave finishes it."""
        with self._lock:
            job.ends += ends
            job.to_leave.remove(lane)
            if not job.to_leave:
                del self._jobs[job.index]
                if job.error is None and len(job.done) < len(job.program.actions):
                    closed = ClosedError(f"batch {job.index} was dropped: the pipeline was closed")
                    job.error = closed if self._error is None else self._error
                job.finish()
            self._changed.notify_all()
