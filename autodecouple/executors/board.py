"""What the caller of worker processes and the threads that serve it share: batches under way, and what came of them."""

from __future__ import annotations

import pickle
import signal
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autodecouple.errors import ClosedError, PeerError
from autodecouple.executors.job import Job
from autodecouple.executors.wire import Message
from autodecouple.plans import Plan
from autodecouple.timeline import Span


class Board:
    """Batches under way, and what came of them; all under one lock."""

    def __init__(self, plan: Plan, num_lanes: int) -> None:
        self.states: dict[int, Any] = {}
        self.spans: deque[Span] = deque(maxlen=20_000)
        self.has_ended = False
        self._plan = plan
        self._num_lanes = num_lanes
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[int, Job] = {}
        self._unfed: deque[Job] = deque()
        self._failures: list[tuple[int, int, BaseException]] = []  # batch, lane, error
        self._gone: list[BaseException] = []
        self._first_ended: int | None = None  # the lane that failed, or ended by itself
        self._closed = False

    # ---------------------------------------------------------------- the caller's side

    def submit(self, job: Job) -> None:
        with self._lock:
            self._raise_error()
            self._jobs[job.index] = job
            self._unfed.append(job)
            self._changed.notify_all()
            self._changed.wait_for(lambda: job not in self._unfed or self._is_ending())
            self._raise_error()

    def drain(self) -> None:
        with self._lock:
            self._changed.wait_for(lambda: not self._jobs or self._is_ending())
            self._raise_error()

    def wait_for_states(self) -> None:
        with self._lock:
            self._changed.wait_for(lambda: len(self.states) == self._num_lanes or self._is_ending())
            self._raise_error()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def _is_ending(self) -> bool:
        return self._closed or self._first_ended is not None

    def _raise_error(self) -> None:
        """Raise what ended the crew, when all workers have ended: what they could tell is known then."""
        if not self._is_ending():
            return
        self._changed.wait_for(lambda: self.has_ended)
        raise self._error()

    def _error(self) -> BaseException:
        if self._failures:
            return min(self._failures, key=lambda failure: failure[0])[2]
        return self._gone[0] if self._gone else ClosedError("the pipeline was closed")

    # ---------------------------------------------------------------- the threads' side

    def next_job(self) -> Job | None:
        with self._lock:
            self._changed.wait_for(lambda: self._is_ending() or bool(self._unfed))
            return None if self._is_ending() else self._unfed[0]

    def fed(self, job: Job) -> None:
        with self._lock:
            self._unfed.popleft()
            job.parcels.clear()
            self._changed.notify_all()

    def wait_for_end_of_feeding(self) -> int | None:
        """Returns the lane that failed, None where the crew was closed."""
        with self._lock:
            self._changed.wait_for(self._is_ending)
            return None if self._closed else self._first_ended

    def take(self, lane: int, message: Message) -> None:
        if message.kind == "failure":
            self.fail(message.batch, pickle.loads(message.values), lane)
        with self._lock:
            if message.kind == "state":
                self.states[lane] = _cloned(message.values)
            elif message.kind == "result" and (job := self._jobs.get(message.batch)) is not None:
                self._finish_lane(lane, job, message.values)
            self._changed.notify_all()

    def _finish_lane(self, lane: int, job: Job, values: Mapping[str, Any]) -> None:
        for stage, loss in values["losses"].items():
            job.losses[stage] = loss
        job.work[-1].outputs.update(values["outputs"])
        self.spans.extend(values["spans"])
        job.to_leave.remove(lane)
        if not job.to_leave:
            del self._jobs[job.index]
            job.finish()

    def fail(self, batch: int, error: BaseException, lane: int) -> None:
        with self._lock:
            self._failures.append((batch, lane, error))
            self._first_ended = lane if self._first_ended is None else self._first_ended
            self._changed.notify_all()

    def worker_ended(self, lane: int, exit_code: int) -> None:
        """A worker that told its state has ended because of others."""
        with self._lock:
            if lane not in self.states or exit_code != 0:
                self._gone.append(PeerError(_obituary(self._plan, lane, exit_code)))
            self._first_ended = lane if self._first_ended is None else self._first_ended
            self._changed.notify_all()

    def end(self) -> None:
        """All workers have ended: so have the batches."""
        with self._lock:
            for job in self._jobs.values():
                job.error = self._error()
                job.finish()
            self._jobs.clear()
            self._unfed.clear()
            self.has_ended = True
            self._changed.notify_all()


def _cloned(values: Any) -> Any:
    """Out of the memory that goes with the worker's slots."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, values)


def _obituary(plan: Plan, lane: int, exit_code: int) -> str:
    stages = plan.lanes[lane] if lane < len(plan.lanes) else ()
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    return f"the worker process of lane {lane} (stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}) {how}"
