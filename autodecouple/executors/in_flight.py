"""The batches that a lane has begun and not ended: one, or several where a schedule lets actions lag behind.

round        0       1       2            3            4 and 5: no new batch, the stream is waited for
lane 0       F0      F1      F2 B0 U0     F3 B1 U1     B2 U2    B3 U3
in flight    0       0 1     0 1 2        1 2 3        2 3      3
"""

from __future__ import annotations

from collections import deque

from autodecouple.executors.job import Job
from autodecouple.schedules.actions import Action
from autodecouple.schedules.program import Program


class InFlight:
    """Says in every round which batch each action of a lane is for; no threads, and no waiting.

    lane: None for one that takes all of the program's actions
    """

    def __init__(self, program: Program, lane: int | None = None) -> None:
        actions = program.actions if lane is None else program.lanes[lane]
        self._program = program
        self._lags = program.lags
        self._longest = max((self._lags.get(action, 0) for action in actions), default=0)
        self._rounds: deque[Job | None] = deque()  # what each has begun, the newest first

    def __bool__(self) -> bool:
        return self.newest is not None

    @property
    def newest(self) -> Job | None:
        return next((job for job in self._rounds if job is not None), None)

    def oldest_first(self) -> list[Job]:
        return [job for job in reversed(self._rounds) if job is not None]

    def enter(self, job: Job | None) -> Program:
        """Begin a round, with a new batch or without one; returns the program whose order is to be taken."""
        self._rounds.appendleft(job)
        return self._program if job is None else job.program

    def of(self, action: Action) -> Job | None:
        """The batch that an action of this round is for, None where there is none so old."""
        lag = self._lags.get(action, 0)
        return self._rounds[lag] if lag < len(self._rounds) else None

    def leave(self) -> Job | None:
        """End the round; returns the batch whose last action on this lane was in it."""
        return self._rounds.pop() if len(self._rounds) > self._longest else None

    def clear(self) -> list[Job]:
        """Give up; returns the batches that were in flight, the oldest first."""
        found = self.oldest_first()
        self._rounds.clear()
        return found
