"""One batch on its way through all the stages, and what the caller holds of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autodecouple.executors.caller import Caller
from autodecouple.executors.transport import Parcel, Queue, Queues, lend_to_caller, pack, pack_from_caller
from autodecouple.plans import Plan
from autodecouple.randomness import Randomness
from autodecouple.schedules.actions import Action, Op
from autodecouple.schedules.program import Program
from autodecouple.shards import Shard, row_sizes
from autodecouple.stage import Stage
from autodecouple.work import Values, Work, tensors_in

Key = tuple[str, int, int | None]
"""Of a value in transit: what it is ("activations", "signal", "gradient", "target"), for or of which stage, slice."""


class Job:
    """A batch: its program, the values in transit between its stages, and its results.

    inputs: the graph's input values by name, None where another process gives them: `begin` is then called when the
            first of them arrive; target: what the last signal compares with; rows: of the batch;
    written: inputs that the model writes into, and that are copied: the caller's own would change at some later time
    """

    def __init__(
        self,
        index: int,
        program: Program,
        plan: Plan,
        inputs: Values | None,
        target: Any,
        rows: int,
        seed: int,
        written: Collection[str] = (),
    ):
        self.index = index
        self.plan = plan
        self.seed = seed
        self.caller = Caller.current()
        self.shard: Shard | None = None
        self.done: set[Action] = set()
        self.losses: list[torch.Tensor | None] = [None] * len(plan.stages)
        self.ends: list[Parcel] = []  # complete when the devices have done what the lanes queued
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self.parcels: dict[Key, Parcel] = {}
        self._devices = {torch.device(stage.device) for stage in plan.stages}
        self.lent = _memory((inputs, target))  # the caller may write there again
        self.begin(program, rows)
        if inputs is not None:
            self.parcels["target", 0, None] = pack_from_caller(target, self._devices)
            self._post_inputs(inputs, written)

    def begin(self, program: Program, rows: int) -> None:
        """Know the batch's rows, and with them its micro-batches."""
        self.program = program
        self.rows = rows
        self._sizes = row_sizes(rows, program.schedule.num_micro_batches)
        self.work = [Work(self._sizes) for _ in self.plan.stages]
        lanes = range(len(program.lanes))
        self.to_take, self.to_leave = set(lanes), set(lanes)  # which lanes have still to begin it, and to end it

    def share(self, shard: Shard) -> None:
        """Know the batch as a part of a global one."""
        self.shard = shard
        self.parcels["shard", 0, None] = pack(shard)
        for work in self.work:
            work.share = shard.share

    def _post_inputs(self, inputs: Values, written: Collection[str]) -> None:
        """The first stage is sent the model's inputs, micro-batch by micro-batch."""
        batched = {spec.name for spec in self.plan.inputs if spec.batch_dim == 0}
        count = len(self._sizes)
        parts = {
            name: _split(value, self.rows, self._sizes) if name in batched else [value] * count
            for name, value in inputs.items()
        }
        for micro_batch in range(len(self._sizes)):
            values = {name: split[micro_batch] for name, split in parts.items()}
            values |= {name: values[name].clone() for name in written}
            self.parcels["activations", 0, micro_batch] = pack_from_caller(values, self._devices)

    def perform(self, action: Action, stage: Stage, queue: Queue) -> None:
        """Run one action; its dependencies must be done."""
        with self.caller.entered(), queue.entered():
            _PERFORM[action.op](self, action, stage, queue)

    def _forward(self, action: Action, stage: Stage, queue: Queue) -> None:
        micro_batch = _number(action)
        received = queue.receive(self.parcels.pop(("activations", stage.index, micro_batch)))
        if stage.wants_signal:
            self.work[stage.index].signal = self._signal(stage.index, None, queue)
        if stage.replicas is not None:
            stage.replicas.share = self.work[stage.index].share
        randomness = Randomness(self.seed, self.index, micro_batch, self.shard, stage.replicas)
        sent = stage.forward(self.work[stage.index], micro_batch, received, randomness)
        if stage.index + 1 < len(self.plan.stages):
            self.parcels["activations", stage.index + 1, micro_batch] = queue.send(sent)

    def _loss(self, action: Action, stage: Stage, queue: Queue) -> None:
        signal = self._signal(stage.index, action.micro_batch, queue)
        randomness = Randomness(self.seed, self.index, action.micro_batch or 0, self.shard)
        encoded = stage.loss(self.work[stage.index], action.micro_batch, signal, randomness)
        if stage.index < len(self.plan.cuts) and self.plan.cuts[stage.index].encodes:
            self.parcels["signal", stage.index, action.micro_batch] = queue.send(encoded)

    def _signal(self, stage: int, micro_batch: int | None, queue: Queue) -> Any:
        """What the stage's head compares with: the target, or the last encoding of it."""
        source = self.plan.signal_source(stage)
        if source is not None:
            return queue.receive(self.parcels["signal", source, micro_batch])
        target = queue.receive(self.parcels["target", 0, None])
        return target if micro_batch is None else _split(target, self.rows, self._sizes)[micro_batch]

    def _backward(self, action: Action, stage: Stage, queue: Queue) -> None:
        micro_batch = _number(action)
        gradients = None if stage.overlaps else self._gradients(stage.index, micro_batch, queue)
        self._keep(stage, micro_batch, queue)
        split = Action(stage.index, Op.WEIGHT, micro_batch) in self.program.lane_of
        sent = stage.backward(self.work[stage.index], micro_batch, gradients, split=split)
        if sent is not None:
            self.parcels["gradient", stage.index - 1, micro_batch] = queue.send(sent)

    def _weight(self, action: Action, stage: Stage, queue: Queue) -> None:
        micro_batch = _number(action)
        gradients = None
        if stage.overlaps:
            gradients = self._gradients(stage.index, micro_batch, queue)
            self._keep(stage, micro_batch, queue)
        stage.weight(self.work[stage.index], micro_batch, gradients)

    def _keep(self, stage: Stage, micro_batch: int, queue: Queue) -> None:
        """Let what was sent to a stage stay until its device has read it."""
        values = self.work[stage.index].passages[micro_batch].values
        made = set(stage.code.outputs)  # here, and so their memory comes back here, in order: nothing need hold it
        queue.keep({name: value for name, value in values.items() if name not in made})

    def _gradients(self, stage: int, micro_batch: int, queue: Queue) -> dict[str, torch.Tensor] | None:
        """What the next stage has sent back; None where it sends nothing."""
        parcel = self.parcels.pop(("gradient", stage, micro_batch), None)
        return queue.receive(parcel) if parcel is not None else None

    def _update(self, action: Action, stage: Stage, queue: Queue) -> None:
        judges = (self.work[index] for index in stage.loss_stages)
        self.losses[stage.index] = stage.update(self.work[stage.index], *judges)

    def is_done(self, requirement: Action) -> bool:
        return all(action in self.done for action in self.program.expand(requirement))

    def discard(self, stages: Sequence[Stage], queues: Queues) -> None:
        """Bring stages back to where they were before this batch."""
        for stage in stages:
            if Action(stage.index, Op.UPDATE) not in self.done:
                with queues[stage.device].entered():
                    stage.discard(self.work[stage.index])

    def finish(self) -> None:
        self.parcels.clear()
        for work in self.work:  # a caller may keep the step for its losses and output
            work.passages.clear()
            work.rests.clear()
            work.before = None
        self.finished.set()

    @property
    def has_outputs(self) -> bool:
        """Whether the last stage has run in this process."""
        return bool(self.work[-1].outputs)

    def outputs(self, batch_dims: Sequence[int | None]) -> tuple[Any, ...]:
        """The model's flat outputs of the whole batch."""
        parts = [self.work[-1].outputs[m] for m in sorted(self.work[-1].outputs)]
        if len(parts) == 1:
            return parts[0]
        columns = zip(zip(*parts, strict=True), batch_dims, strict=True)
        return tuple(torch.cat(column, dim) if dim is not None else column[0] for column, dim in columns)


_PERFORM: dict[Op, Callable[[Job, Action, Stage, Queue], None]] = {
    Op.FORWARD: Job._forward,
    Op.LOSS: Job._loss,
    Op.BACKWARD: Job._backward,
    Op.WEIGHT: Job._weight,
    Op.UPDATE: Job._update,
}


class Step:
    """The result of one `train_step`; reading it waits for the batch."""

    def __init__(self, job: Job, unflatten: Callable[[Job], Any]) -> None:
        self._job = job
        self._unflatten = unflatten

    @property
    def batch(self) -> int:
        """Number of the batch since the start of training."""
        return self._job.index

    @property
    def losses(self) -> tuple[float | None, ...]:
        """One per stage; None for a stage whose loss is the next one's (coupled), or is known to another process."""
        self._wait()
        return tuple(None if loss is None else float(loss) for loss in self._job.losses)

    @property
    def output(self) -> Any:
        """The model's output in training mode, in its own structure; None where another process has it."""
        self._wait()
        return lend_to_caller(self._unflatten(self._job))

    def _wait(self) -> None:
        self._job.finished.wait()
        if self._job.error is not None:
            raise self._job.error
        for end in self._job.ends:
            for event in end.events:
                event.synchronize()

    def __repr__(self) -> str:
        state = "failed" if self._job.error is not None else "done" if self._job.finished.is_set() else "running"
        return f"Step(batch={self.batch}, {state})"


def _memory(values: Any) -> frozenset[int]:
    """Where the tensors among these values lie."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors_in(values))


def _number(action: Action) -> int:
    assert action.micro_batch is not None, f"{action} needs a micro-batch"
    return action.micro_batch


def _split(value: Any, rows: int, sizes: list[int]) -> list[Any]:
    """The value for each micro-batch; what has not one entry per row goes to all of them."""
    if len(sizes) == 1:
        return [value]
    leaves, spec = pytree.tree_flatten(value)
    split = [
        leaf.split(sizes)
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == rows
        else [leaf] * len(sizes)
        for leaf in leaves
    ]
    return [pytree.tree_unflatten([part[m] for part in split], spec) for m in range(len(sizes))]
