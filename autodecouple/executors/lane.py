"""One lane in a process of its own: what it needs of a batch is received, what others need is sent.

lane 0   ... F0 --+---------- L B U        activations and the target go on as soon as they are there
lane 1            +--> F0 L B U
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError, PeerError
from autodecouple.executors.executor import Programs, Recorder, stages_of_lane
from autodecouple.executors.job import Job, Key
from autodecouple.executors.transport import CpuQueue, Parcel, check_unchanged, make_queues, pack
from autodecouple.executors.wire import Message
from autodecouple.plans import Plan
from autodecouple.schedules.actions import Action, Op
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.work import Flag

PASSED = {"target", "caller", "shard"}
"""What travels with the first activations of a batch, from lane to lane: the caller's state only where it is needed."""
FEEDER = -1
"""In place of a lane: the process that gives the batches."""


class Links(Protocol):
    """Connections to other lanes; what one lane sends to another arrives in that order."""

    def send(self, lane: int, message: Message) -> None:
        """May return before it has arrived, and may wait for room."""
        ...

    def receive(self, lane: int) -> Message:
        """The next message from a lane; waits for it."""
        ...

    def takes(self, kind: str) -> bool:
        """Whether tensors on devices of this type are sent as they lie."""
        ...


Walk = Callable[[Program, int, Callable[[Action], None]], None]
"""Takes each action of a lane in its order: of (program, lane, what to do with an action)."""


def in_order(program: Program, lane: int, act: Callable[[Action], None]) -> None:
    """One action after the other."""
    for action in program.lanes[lane]:
        act(action)


class LaneRunner:
    """Runs one lane's part of every batch, in the thread that calls.

    feeder: the lane that gives the first activations; None where the caller does
    """

    def __init__(
        self,
        lane: int,
        stages: Sequence[Stage],
        program: Program,
        links: Links,
        feeder: int | None,
        recorder: Recorder,
        walk: Walk = in_order,
    ) -> None:
        self.lane = lane
        self.plan: Plan = program.plan
        self.own = stages_of_lane(program, lane, stages)
        self.programs = Programs(program.plan, program.schedule)
        self._stages = stages
        self._links = links
        self._feeder = feeder
        self._recorder = recorder
        self._walk = walk
        self._home = {action.stage: index for index, actions in enumerate(program.lanes) for action in actions}
        self._num_lanes = len(program.lanes)
        self._queues = make_queues(self.own)
        self._peeked: Message | None = None
        self._kept: dict[tuple[int, int, Key], Message] = {}

    # ---------------------------------------------------------------- a batch

    def next_batch(self) -> int:
        """Wait for the next batch's first message; returns the batch's number."""
        assert self._feeder is not None
        self._peeked = self._links.receive(self._feeder)
        return self._peeked.batch

    def run(self, job: Job) -> None:
        """Train the lane's stages on a batch; on an error they are as they were before it, as far as not updated."""
        try:
            if job.program.schedule.barrier:
                self.meet(job.index, f"begins batch {job.index}")
            if self._feeder is not None:
                self._open(job, self._next(self._feeder, f"trains batch {job.index}"))
            self._walk(job.program, self.lane, partial(self._act, job))
        except BaseException as error:
            job.discard(self.own, self._queues)
            job.error = error
            raise
        finally:
            job.ends = [queue.send(()) for queue in self._queues.values()]

    def _act(self, job: Job, action: Action) -> None:
        """Take one action, between what it needs of other lanes and what they need of it."""
        self._receive_for(job, action)
        stage = self._stages[action.stage]
        self._recorder.perform(job, action, stage, self._queues[stage.device], self.lane)
        job.done.add(action)
        self._send_after(job, action)

    def synchronize(self) -> None:
        """Wait for the lane's devices."""
        for queue in self._queues.values():
            queue.synchronize()

    def _open(self, job: Job, message: Message) -> None:
        """Begin a batch with its first activations, which tell its rows."""
        if message.kind == "sync" or message.batch != job.index:
            assert self._feeder is not None
            raise _apart(self._feeder, message, f"trains batch {job.index}")
        job.begin(self.programs.for_rows(message.count), message.rows)
        self._deliver(job, message)

    def meet(self, batches: int, purpose: str) -> None:
        """Wait until every lane has come here, after the same number of batches and for the same purpose.

        lane 0 ---> lane 1 ---> lane 2        down: all before have come; up: all behind have, too
               <---        <---
        """
        message = Message("sync", batches, values=purpose)
        before = self.lane - 1 if self.lane > 0 else None
        behind = self.lane + 1 if self.lane + 1 < self._num_lanes else None
        if before is not None:
            self._expect(before, message)
        if behind is not None:
            self._links.send(behind, message)
            self._expect(behind, message)
        if before is not None:
            self._links.send(before, message)

    def _expect(self, lane: int, expected: Message) -> None:
        doing = f"{expected.values} after {expected.batch} batches"
        message = self._next(lane, doing)
        if (message.kind, message.batch, message.values) != ("sync", expected.batch, expected.values):
            raise _apart(lane, message, doing)

    # ---------------------------------------------------------------- what comes

    def _receive_for(self, job: Job, action: Action) -> None:
        """Bring what an action reads and another lane makes."""
        wanted = self._wanted(action)
        if wanted is not None and wanted[1] not in job.parcels:
            lane, key = wanted
            self._deliver(job, self._take(lane, job.index, key))

    def _wanted(self, action: Action) -> tuple[int, Key] | None:
        stage, micro_batch = action.stage, action.micro_batch
        match action.op:
            case Op.FORWARD:
                source = self._feeder if stage == 0 else self._home[stage - 1]
                key: Key = ("activations", stage, micro_batch)
            case Op.LOSS if (encoder := self.plan.signal_source(stage)) is not None:
                source, key = self._home[encoder], ("signal", encoder, micro_batch)
            case Op.BACKWARD | Op.WEIGHT if self._takes_gradient(action):
                source, key = self._home[stage + 1], ("gradient", stage, micro_batch)
            case _:
                return None
        return (source, key) if source is not None and source != self.lane else None

    def _takes_gradient(self, action: Action) -> bool:
        """Whether an action reads what the next stage sends back."""
        overlaps = self.plan.overlaps_after(action.stage)
        return overlaps if action.op is Op.WEIGHT else self.plan.coupled_after(action.stage)

    def _take(self, lane: int, batch: int, key: Key) -> Message:
        """The message with that value; those that come before it are kept until they are asked for."""
        while (lane, batch, key) not in self._kept:
            doing = f"trains batch {batch}"
            message = self._next(lane, doing)
            if message.kind == "sync":
                raise _apart(lane, message, doing)
            self._kept[lane, message.batch, (message.kind, message.stage, message.micro_batch)] = message
        return self._kept.pop((lane, batch, key))

    def _next(self, lane: int, doing: str) -> Message:
        message = self._links.receive(lane) if lane != self._feeder or self._peeked is None else self._peeked
        self._peeked = None if lane == self._feeder else self._peeked
        if message.kind == "end":
            raise PeerError(f"lane {lane} has ended the training after {message.batch} batches; this one {doing}")
        return message

    def _deliver(self, job: Job, message: Message) -> None:
        values = dict(message.values)
        if message.kind == "gradient":  # the losses tell whether this batch may be trained on
            work = job.work[self._stages[message.stage + 1].loss_stage]
            work.losses = max(work.losses, values["losses"], key=len)
            work.finite = [Flag(loss) for loss in work.losses]
        for name in PASSED & values.keys():
            job.parcels[name, 0, None] = pack(values[name], *message.events)
        job.caller = values.get("caller", job.caller)
        if "shard" in values:
            job.share(values["shard"])
        job.parcels[message.kind, message.stage, message.micro_batch] = pack(values[message.kind], *message.events)

    # ---------------------------------------------------------------- what goes

    def _send_after(self, job: Job, action: Action) -> None:
        """Send on what an action has made and other lanes read."""
        stage, micro_batch = action.stage, action.micro_batch
        match action.op:
            case Op.FORWARD if self._is_elsewhere(stage + 1):
                values = job.parcels.pop(("activations", stage + 1, micro_batch))
                first = not any(done.op is Op.FORWARD and done.stage == stage for done in job.done - {action})
                passed = [key for key in job.parcels if first and key[0] in PASSED]
                self._send(self._home[stage + 1], job, "activations", Action(stage + 1, action.op, micro_batch),
                           {"activations": values} | {key[0]: job.parcels[key] for key in passed})  # fmt: skip
            case Op.LOSS if stage < len(self.plan.cuts) and self.plan.cuts[stage].encodes:
                encoded = job.parcels["signal", stage, micro_batch]
                for lane in self._readers(stage):
                    self._send(lane, job, "signal", action, {"signal": encoded})
            case Op.BACKWARD if self._stages[stage].coupled_before and self._is_elsewhere(stage - 1):
                losses = [loss.cpu() for loss in job.work[self._stages[stage].loss_stage].losses]
                values = job.parcels.pop(("gradient", stage - 1, micro_batch))
                self._send(self._home[stage - 1], job, "gradient", Action(stage - 1, action.op, micro_batch),
                           {"gradient": values, "losses": pack(losses)})  # fmt: skip

    def _is_elsewhere(self, stage: int) -> bool:
        return self._home.get(stage, self.lane) != self.lane

    def _readers(self, encoder: int) -> list[int]:
        """Other lanes with a head that reads the signal of this stage."""
        lanes = {self._home[stage] for stage in _signals(self.plan).get(encoder, ())}
        return sorted(lanes - {self.lane})

    def _send(self, lane: int, job: Job, kind: str, about: Action, parcels: dict[str, Parcel]) -> None:
        count = job.program.schedule.num_micro_batches
        ready = {name: _ready(parcel, job.lent, self._links.takes) for name, parcel in parcels.items()}
        values = {name: parcel.values for name, parcel in ready.items()}
        events = tuple(dict.fromkeys(event for parcel in ready.values() for event in parcel.events))
        message = Message(kind, job.index, about.stage, about.micro_batch, job.rows, count, values, events)
        self._links.send(lane, message)


def neighbours(program: Program, lane: int) -> set[int]:
    """Lanes that this one sends to or receives from."""
    return {b for a, b in pairs(program) if a == lane} | {a for a, b in pairs(program) if b == lane}


def pairs(program: Program) -> set[tuple[int, int]]:
    """From which lane to which one messages go.

    To the next and back for meetings, to the next stage's and back for gradients, and far for signals.
    """
    home = {action.stage: index for index, actions in enumerate(program.lanes) for action in actions}
    far = {(home[source], home[stage]) for source, stages in _signals(program.plan).items() for stage in stages}
    near = {(lane, lane + 1) for lane in range(len(program.lanes) - 1)}
    near |= {(home[a], home[b]) for a, b in pairwise(sorted(home)) if home[a] != home[b]}
    return near | {(b, a) for a, b in near} | {(a, b) for a, b in far if a != b}


def _signals(plan: Plan) -> dict[int, list[int]]:
    """The stages whose own loss reads the signal that a stage encodes."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for stage in range(len(plan.stages)):
        source = plan.signal_source(stage)
        if source is not None and not plan.coupled_after(stage):
            found[source].append(stage)
    return dict(found)


def _ready(parcel: Parcel, lent: frozenset[int], takes: Callable[[str], bool]) -> Parcel:
    """Values as the links take them: complete and on the CPU, or on their device behind the events.

    Of the caller's own tensors, which may be overwritten while they are on their way, copies.
    """
    if all(takes(tensor.device.type) for tensor in _tensors(parcel.values)):
        check_unchanged(parcel)
    else:
        parcel = pack(CpuQueue(torch.device("cpu")).receive(parcel))

    def is_lent(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in lent

    devices = {tensor.device for tensor in _tensors(parcel.values) if tensor.is_cuda and is_lent(tensor)}
    values = pytree.tree_map_only(torch.Tensor, lambda x: x.clone() if is_lent(x) else x, parcel.values)
    written = [torch.cuda.current_stream(device).record_event() for device in devices]
    return pack(values, *parcel.events, *written)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _apart(lane: int, message: Message, doing: str) -> InputError:
    there = message.values if message.kind == "sync" else "trains"
    return InputError(
        f"the processes are not at the same place: lane {lane} {there} (batch {message.batch}), but this one {doing}."
        " Every process must call train_step once for each batch, and all of them model, state_dict(), save(),"
        " evaluate(), synchronize() and close() at the same places"
    )
