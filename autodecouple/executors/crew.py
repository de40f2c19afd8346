"""The parent's side of a set of worker processes: it forks them, feeds them, and collects what they send.

    caller     submit ---> board ---> feeder ---> lane 0 ---> lane 1 ---> ...
               wait   <--- board <--- collector <---+------------+

The caller may be interrupted anywhere, by Ctrl-C; the two threads that hold the pipes are not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch

from autodecouple.executors.board import Board
from autodecouple.executors.gloo import LinkLostError
from autodecouple.executors.job import Job
from autodecouple.executors.lane import FEEDER, pairs
from autodecouple.executors.pipes import PipeLinks, PipeReceiver, PipeSender
from autodecouple.executors.transport import CpuQueue
from autodecouple.executors.wire import Message
from autodecouple.executors.worker import Assignment, Command, live
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.timeline import Span

SECONDS_TO_END = 10.0
"""What a worker may take to end when it has nothing more to say, or when its parent ends; then it is killed."""
HOST = CpuQueue(torch.device("cpu"))


class Crew:
    """One worker process per lane, forked now: it begins with the stages as they are now.

    When any worker ends all do, those behind it with the batches that have reached them; then whoever waits is
    told why, and `states` holds what the stages of each lane go on from, of those workers that could still tell.
    """

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int, seed: int) -> None:
        self._board = Board(program.plan, len(program.lanes))
        context = multiprocessing.get_context("fork")
        ends = _Ends(program, context)
        self._commands = ends.commands
        self._processes = []
        for lane in range(len(program.lanes)):
            assignment = Assignment(
                lane, stages, program, num_threads, seed, ends.links(lane), ends.orders[lane], os.getpid()
            )
            process = context.Process(
                target=_begin, args=(assignment, ends), name=f"autodecouple-lane-{lane}", daemon=True
            )
            process.start()
            self._processes.append(process)
        ends.keep(FEEDER)
        links = ends.links(FEEDER)
        self._threads = [
            threading.Thread(target=_feed, args=(self._board, links.senders[0], self._commands)),
            threading.Thread(target=_collect, args=(self._board, links.receivers, self._processes)),
        ]
        for thread, name in zip(self._threads, ("feeder", "collector"), strict=True):
            thread.name, thread.daemon = f"autodecouple-{name}", True
            thread.start()

    @property
    def has_ended(self) -> bool:
        return self._board.has_ended

    @property
    def states(self) -> Mapping[int, Any]:
        return self._board.states

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def submit(self, job: Job) -> None:
        """Returns when the first lane has the inputs; raises the error that ended the crew."""
        self._board.submit(job)

    def drain(self) -> None:
        self._board.drain()

    def fetch_states(self) -> Mapping[int, Any]:
        """By lane and stage; nothing may be under way."""
        self.drain()
        self._board.states.clear()
        self.order([Command("state")] * len(self._commands))
        self._board.wait_for_states()
        return self._board.states

    def order(self, commands: Sequence[Command]) -> None:
        """Tell every worker something, to be done before the batches that are submitted from here on."""
        for pipe, command in zip(self._commands, commands, strict=True):
            with contextlib.suppress(OSError):  # it has ended: the board will say why
                pipe.send(command)

    def spans(self) -> Sequence[Span]:
        return self._board.spans

    def end(self, wait: bool = True) -> None:
        """Let the workers end after the batch under way."""
        self._board.close()
        for thread in self._threads if wait else ():
            thread.join()

    def kill(self) -> None:
        """End the workers, those that take too long in the middle of what they do."""
        self.end(wait=False)
        self._threads[-1].join(SECONDS_TO_END)
        for process in self._processes:
            process.kill()  # nothing where it has ended
        self.end()


class _Ends:
    """All pipes of a crew: (from, to) -> (writing end, reading end), and those of the commands."""

    def __init__(self, program: Program, context: Any) -> None:
        lanes = range(len(program.lanes))
        wanted = pairs(program) | {(FEEDER, 0)} | {(lane, FEEDER) for lane in lanes}
        self._depth = program.schedule.queue_depth
        self._pipes: dict[tuple[int, int], tuple[Connection, Connection]] = {key: context.Pipe() for key in wanted}
        made = [context.Pipe(duplex=False) for _ in lanes]
        self.orders: list[Connection] = [reading for reading, _ in made]
        self.commands: list[Connection] = [writing for _, writing in made]

    def links(self, lane: int) -> PipeLinks:
        senders = {b: PipeSender(b, w, self._depth) for (a, b), (w, _) in self._pipes.items() if a == lane}
        receivers = {a: PipeReceiver(a, r) for (a, b), (_, r) in self._pipes.items() if b == lane}
        return PipeLinks(senders, receivers)

    def keep(self, lane: int) -> None:
        """Close the ends of all others: a pipe ends when nobody holds its other side any more."""
        for (a, b), (writing, reading) in self._pipes.items():
            for owner, end in ((a, writing), (b, reading)):
                if owner != lane:
                    end.close()
        for owner, end in enumerate(self.orders):
            if owner != lane:
                end.close()
        if lane != FEEDER:
            for end in self.commands:
                end.close()


def _begin(assignment: Assignment, ends: _Ends) -> None:
    ends.keep(assignment.lane)
    live(assignment)


# -------------------------------------------------------------------- the threads


def _feed(board: Board, sender: PipeSender, commands: Sequence[Connection]) -> None:
    """Send batches to the first lane until there are no more, then let the workers end."""
    try:
        while (job := board.next_job()) is not None:
            for message in _messages(job):
                sender.send(message)
            board.fed(job)
    except LinkLostError:
        pass  # the first worker has ended: the collector knows
    except BaseException as error:
        board.fail(job.index if job is not None else 0, error, FEEDER)
    failed_lane = board.wait_for_end_of_feeding()
    sender.close()
    for lane, pipe in enumerate(commands):
        # Behind a lane that failed, batches that have passed it are trained to their end.
        if failed_lane is None or lane <= failed_lane:
            pipe.close()


def _messages(job: Job) -> Iterator[Message]:
    """A batch as the first lane receives it."""
    count = job.program.schedule.num_micro_batches
    passed = {"target": HOST.receive(job.parcels["target", 0, None]), "caller": job.caller}
    for micro_batch in range(count):
        values = {"activations": HOST.receive(job.parcels["activations", 0, micro_batch])} | passed
        yield Message("activations", job.index, 0, micro_batch, job.rows, count, values)
        passed = {}


def _collect(board: Board, receivers: Mapping[int, PipeReceiver], processes: Sequence[Any]) -> None:
    """Take what workers send until all of them have ended."""
    open_ends = {receiver.connection: lane for lane, receiver in receivers.items()}
    while open_ends:
        for ready in connection.wait(list(open_ends)):
            lane = open_ends[ready]  # type: ignore[index]
            try:
                message = receivers[lane].receive()
            except LinkLostError:
                del open_ends[ready]  # type: ignore[arg-type]
                board.worker_ended(lane, _reap(processes[lane]))
                receivers[lane].close()
                continue
            board.take(lane, message)
            if message.kind == "result":
                receivers[lane].done(message.batch)
            del message
    board.end()


def _reap(process: Any) -> int:
    process.join(SECONDS_TO_END)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)
