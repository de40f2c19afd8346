"""The life of a worker process: one lane, batch after batch, until its links or its parent end."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch

from autodecouple.errors import PeerError
from autodecouple.executors.executor import Recorder
from autodecouple.executors.gloo import LinkLostError
from autodecouple.executors.job import Job
from autodecouple.executors.lane import FEEDER, LaneRunner
from autodecouple.executors.pipes import PipeLinks
from autodecouple.executors.wire import Message
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.stage_state import stage_state

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker looks whether its parent still lives, beside the pipes that end with it."""


@dataclass(frozen=True)
class Command:
    """What the parent wants of a worker between two batches; when the pipe of commands ends, the worker does.

    kind: "state", to be sent; "groups": hyper-parameters of optimizers by stage, from `batch` on
    """

    kind: str
    batch: int = 0
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do, all of it made before the fork."""

    lane: int
    stages: Sequence[Stage]
    program: Program
    num_threads: int
    seed: int
    links: PipeLinks
    commands: Connection
    parent: int


def live(assignment: Assignment) -> None:
    """Work in a thread of its own: the OpenMP threads of the one that was forked stayed behind in the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    worker = threading.Thread(target=_work, args=(assignment,), name=f"lane-{assignment.lane}", daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(SECONDS_BETWEEN_LOOKS)
        if os.getppid() != assignment.parent:
            os._exit(1)


def _work(assignment: Assignment) -> None:
    torch.set_num_threads(assignment.num_threads)
    recorder = Recorder(len(assignment.program.lanes))
    feeder = FEEDER if assignment.lane == 0 else assignment.lane - 1
    links = assignment.links
    lane = LaneRunner(assignment.lane, assignment.stages, assignment.program, links, feeder, recorder)
    try:
        _serve(assignment, lane, recorder, feeder)
    except (LinkLostError, EOFError):
        pass  # somebody else has ended, and says why
    except BaseException as error:
        _tell(assignment, error)
    try:
        links.send(FEEDER, _state(lane))
    except LinkLostError:
        sys.exit(1)


def _serve(assignment: Assignment, lane: LaneRunner, recorder: Recorder, feeder: int) -> None:
    feed = assignment.links.receivers[feeder].connection
    later: list[Command] = []
    while True:
        ready = connection.wait([feed, assignment.commands])
        while assignment.commands.poll():
            command: Command = assignment.commands.recv()
            if command.kind == "state":
                assignment.links.send(FEEDER, _state(lane))
            else:
                later.append(command)
        if feed in ready:
            _train(assignment, lane, recorder, later)


def _train(assignment: Assignment, lane: LaneRunner, recorder: Recorder, later: list[Command]) -> None:
    """One batch, with the hyper-parameters that hold from it on."""
    batch = lane.next_batch()
    while assignment.commands.poll():  # what holds from this batch on was said before its inputs came
        later.append(assignment.commands.recv())
    for command in [command for command in later if command.batch <= batch]:
        _set_groups(lane, command)
        later.remove(command)
    job = Job(batch, lane.programs.full, lane.plan, None, None, 0, assignment.seed)
    try:
        lane.run(job)
    except BaseException as error:
        error.__dict__["batch"] = batch
        raise
    last = lane.plan.stages[-1].index in {stage.index for stage in lane.own}
    losses = {stage.index: job.losses[stage.index] for stage in lane.own}
    outputs = job.work[-1].outputs if last else {}
    values = {"losses": losses, "outputs": outputs, "spans": recorder.take()}
    assignment.links.send(FEEDER, Message("result", batch, values=values))
    job.finish()
    del job, values, outputs
    assignment.links.done(batch)


def _set_groups(lane: LaneRunner, command: Command) -> None:
    for stage in lane.own:
        if stage.optimizer is not None and stage.index in command.groups:
            for group, new in zip(stage.optimizer.param_groups, command.groups[stage.index], strict=True):
                group.update(new)


def _state(lane: LaneRunner) -> Message:
    return Message("state", 0, values={stage.index: stage_state(stage) for stage in lane.own})


def _tell(assignment: Assignment, error: BaseException) -> None:
    """Send an error with its own type, if that can be made again over there."""
    batch = error.__dict__.pop("batch", 0)
    error.add_note(f"in the worker process of lane {assignment.lane}:\n{''.join(traceback.format_exception(error))}")
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        named = PeerError(f"{type(error).__name__}: {error}")
        named.__notes__ = error.__notes__
        data = pickle.dumps(named)
    try:
        assignment.links.send(FEEDER, Message("failure", batch, values=data))
    except LinkLostError:
        return  # the parent is gone
