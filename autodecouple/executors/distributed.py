"""One lane per process: under torchrun the same script trains on every rank its part of the model.

A rank runs its lane's actions in the caller's thread, one batch at a time, and waits where a batch has not come yet:

    rank 0   ... F0 L0 B0 U0 F1 L1 B1 U1 F2 ...         the script feeds batches here
    rank 1         ... F0 L0 B0 U0 F1 L1 B1 U1 ...      train_step here takes the next one from rank 0

Where every cut is coupled, the lane is walked in the runtime of torch.distributed.pipelining (`coupled`).

With data_parallel=2 there are two such pipelines, whose ranks of one lane take each update together (see `replicas`):

    lane 0   rank 0 | rank 1      both are fed, with rows of their own
    lane 1   rank 2 | rank 3
"""

from __future__ import annotations

import atexit
import contextlib
import math
import pickle
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.utils import _pytree as pytree

from autodecouple.errors import ClosedError, InputError
from autodecouple.executors.carriers import can_use_nccl, nccl_carrier, nccl_group
from autodecouple.executors.coupled import Pipelining, suits
from autodecouple.executors.executor import Recorder
from autodecouple.executors.gloo import GlooLinks, LinkLostError
from autodecouple.executors.job import Job
from autodecouple.executors.lane import LaneRunner, in_order, neighbours
from autodecouple.executors.peers import Peers
from autodecouple.executors.ranks import ALONE, Ranks
from autodecouple.executors.replicas import ReplicaLostError, Replicas
from autodecouple.executors.world import Grid, World
from autodecouple.objectives.together import gather_rows
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.stage_state import restore_stage, stage_state
from autodecouple.timeline import Timeline

LAST_WRITES = 300.0
"""Seconds for a checkpoint under way when the ranks have parted, and nobody notices any more who is gone."""
EXPLANATION = 5.0
"""Seconds that a thread behind the training waits for it to find out what a lost link means."""


class Distributed:
    """Runs the lane of this rank; without replicas rank r is lane r.

    The operators' threads are those that torch uses in this process.

    `gather` is collective, as are `synchronize` and `close` (unless it aborts): every rank must call them, at the same
    places. After the failure of any rank all of them end: that one with its error, the others with PeerError.
    """

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        world, data = World.current().apart(), stages[0].training.data_parallel
        self._grid = grid = Grid.of(world.size, data)
        _check_size(grid, program)
        world.agree(program, data)
        self._stages = stages
        self._lane_index, self._replica = lane, replica = grid.place(world.rank)
        self._lanes = program.plan.lanes
        self._recorder = Recorder(len(grid.ranks))
        column, peers = world.part(f"replica/{replica}", grid.column(replica)), sorted(neighbours(program, lane))
        device = self._own[0].device
        on_gpus = can_use_nccl(world, device)
        carrier = nccl_carrier(column, peers, device) if on_gpus else None
        self._links = GlooLinks(column.group(), peers, program.schedule.queue_depth, carrier)
        self._replicas: Replicas | None = None
        self._peers = Peers(world, grid, program, self._lose)
        feeder = None if lane == 0 else lane - 1
        walk = Pipelining() if suits(program.plan) and not program.lags else in_order
        self._lane = LaneRunner(lane, stages, program, self._links, feeder, self._recorder, walk)
        writers = tuple(grid.ranks[stage.lane][0] for stage in program.plan.stages)
        store = PrefixStore("checkpoints", world.store.clone())
        self._ranks = Ranks(world.rank, world.size, writers, store, self._check_running, self._ended)
        self._batches = 0
        self._is_current = False  # whether all ranks hold the same state
        self._stopped = False
        self._why = ""  # all have ended
        self._parted = self._lost = math.inf
        if data.replicas > 1:
            row = world.part(f"lane/{lane}", grid.ranks[lane])
            self._replicas = Replicas(row, nccl_group(row) if on_gpus else None)
            self._join(self._replicas)
        _running.add(self)

    def _join(self, replicas: Replicas) -> None:
        """Train the lane's stages together with its other replicas, from the first one's weights on."""
        for stage in self._own:
            stage.replicas = replicas
            local = stage.code.head if stage.index < len(stage.plan.cuts) else None
            if stage.training.data_parallel.gather and local is not None:
                gather_rows(local, replicas)
            with self._guarded():
                replicas.align(list(_tensors(stage)))

    @property
    def _own(self) -> list[Stage]:
        return [self._stages[index] for index in self._lanes[self._lane_index]]

    @property
    def feeds(self) -> bool:
        return self._lane_index == 0

    @property
    def leads(self) -> bool:
        return self._lane_index == 0 and self._replica == 0

    @property
    def ranks(self) -> Ranks:
        """Once the ranks have parted each has everything, and those that feed may write it."""
        return ALONE if self._stopped else self._ranks

    @property
    def timeline(self) -> Timeline:
        """Of this rank's lane."""
        return self._recorder.timeline()

    def submit(self, job: Job) -> None:
        """Train this rank's stages on a batch; on other ranks than 0, on the next one that comes."""
        with self._guarded():
            ended: Job | None = job
            try:
                self._check()
                self._is_current = False
                if self._replicas is not None and self.feeds:
                    count = job.program.schedule.num_micro_batches
                    job.share(self._replicas.meet(job.index, job.rows, count))
                ended = self._lane.run(job)
                self._batches = job.index + 1
            finally:
                job.known.set()
                if ended is not None:
                    ended.finish()

    def synchronize(self) -> None:
        with self._guarded():
            self._meet("waits for all batches")
            self._lane.synchronize()

    def _meet(self, purpose: str) -> None:
        """Wait until every rank has come here: a pipeline's lanes wait for its first, which waits for its replicas.

        Then each ends the batches that are in flight in its lane.
        """
        if self._replicas is not None and self.feeds:
            self._replicas.wait(self._batches)
        self._lane.meet(self._batches, purpose)
        self._lane.drain()

    def gather(self) -> None:
        """Every rank gets the weights, buffers and training states of all stages; cheap where it has them.

        Buffers, the statistics of BatchNorm, differ among replicas: those of the first count from here on.
        """
        if self._is_current or self._stopped:
            return
        with self._guarded():
            self._meet("reads the model or its state")
            if self._replicas is not None:
                self._replicas.align([buffer for stage in self._own for buffer in stage.buffers])
            for owner, stages in enumerate(self._lanes):
                for index in stages:
                    self._share(self._stages[index], owner)
            self._is_current = True

    def scatter(self) -> None:
        """Nothing to do: every rank was given the same state, and trains its own part of it."""
        return None

    def close(self, *, abort: bool = False, wait: bool = True) -> None:
        """Let all ranks hold the trained model, and part; `abort` just parts, telling the error under way."""
        if self._stopped:
            return
        if not abort:
            self.gather()
            self._leave()
            return
        error = sys.exc_info()[1]
        if error is None:
            self._stop()
        else:
            self._why = f"{type(error).__name__}: {error}"
            self._peers.publish(error)
            self._fail()

    def _leave(self) -> None:
        """Part in peace: what was sent arrives, and from here on nobody's end is a failure."""
        with self._guarded():
            self._peers.end()
            self._links.end(self._batches)
            if self._replicas is not None:
                self._replicas.end()
            self._stop()

    def _stop(self) -> None:
        self._stopped = True
        self._parted = time.monotonic()
        self._peers.end()
        self._links.cut()

    def _fail(self) -> None:
        if self._replicas is not None:
            self._replicas.cut()
        self._stop()
        self._peers.settle()

    def _lose(self) -> None:
        """End whatever waits here."""
        self._links.lose(None)
        if self._replicas is not None:
            self._replicas.lose()

    def _check(self) -> None:
        self._links.check()
        if self._replicas is not None:
            self._replicas.check()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever fails ends the training of all ranks, and all of them say why."""
        if self._stopped:
            raise ClosedError(
                "the pipeline was closed, or ended by an error; compile the model again to go on training"
            )
        try:
            yield
        except LinkLostError as error:
            found = self._peers.explain(self._lost_rank(error))
            self._why = str(found)
            self._fail()
            raise found from None
        except BaseException as error:
            self._why = f"{type(error).__name__}: {error}"
            self._peers.publish(error)
            self._fail()
            raise

    def _check_running(self) -> None:
        """Raise what has ended the training, unless that is known already."""
        if not self._stopped:
            with self._guarded():
                self._check()

    def _ended(self) -> str:
        """Why others cannot be waited for: one failed or is gone, or all have parted long ago; empty while they can.

        What was lost is explained by the thread that trains, at its next look.
        """
        is_lost, now = self._links.is_lost, time.monotonic()  # first: parting cuts the links, and says so before
        if self._why or not (is_lost and not self._stopped):
            return self._why or ("the ranks have parted" if now > self._parted + LAST_WRITES else "")
        self._lost = min(self._lost, now)
        return "another rank is gone" if now > self._lost + EXPLANATION else ""

    def _lost_rank(self, error: LinkLostError) -> int | None:
        """Which rank an error is about; of several replicas nobody knows which."""
        if isinstance(error, ReplicaLostError):
            others = [rank for at, rank in enumerate(self._grid.ranks[self._lane_index]) if at != self._replica]
            return others[0] if len(others) == 1 else None
        return None if error.lane is None else self._grid.ranks[error.lane][self._replica]

    # ---------------------------------------------------------------- the state of all ranks

    def _share(self, stage: Stage, owner: int) -> None:
        try:
            for tensor in (*stage.parameters, *stage.buffers):
                self._broadcast_into(tensor, owner)
            state = _without_devices(stage_state(stage)) if owner == self._lane_index else None
            found = self._broadcast_bytes(pickle.dumps(state), owner)
        except RuntimeError as error:
            self._check()
            raise LinkLostError(None, error) from error
        if owner != self._lane_index:
            restore_stage(stage, pickle.loads(found))

    def _broadcast_into(self, tensor: torch.Tensor, owner: int) -> None:
        mine = owner == self._lane_index
        whole = tensor.detach().cpu().contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._broadcast(whole, owner)
        if not mine:
            with torch.no_grad():
                tensor.copy_(whole)

    def _broadcast_bytes(self, mine: bytes, owner: int) -> bytes:
        size = torch.tensor(len(mine))
        self._broadcast(size, owner)
        data = torch.frombuffer(bytearray(mine if owner == self._lane_index else int(size)), dtype=torch.uint8)
        self._broadcast(data, owner)
        return data.numpy().tobytes()

    def _broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = owner
        self._links.group.broadcast([tensor], options).wait()


_running: weakref.WeakSet[Distributed] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Let what was sent arrive, or tell the others what this script ended with."""
    error = getattr(sys, "last_value", None)
    for executor in list(_running):
        with contextlib.suppress(Exception):
            if error is not None and not executor._stopped:
                executor._peers.publish(error)
                executor._fail()
            elif not executor._stopped:
                executor._leave()


def _check_size(grid: Grid, program: Program) -> None:
    lanes, replicas = len(program.lanes), len(grid.ranks[0])
    if (size := len(grid.ranks) * replicas) != lanes * replicas:
        each = f", each {replicas} times" if replicas > 1 else ""
        raise InputError(
            f"there are {size} processes, but the plan has {lanes} lanes of {len(program.plan.stages)} stages{each}:"
            f" start {lanes * replicas} processes (torchrun --nproc-per-node={lanes * replicas}), or ask for"
            f" n_stages={len(grid.ranks)} or more"
        )


def _tensors(stage: Stage) -> Iterator[torch.Tensor]:
    """Everything that the stage computes with."""
    for module in (stage.code.body, *([stage.code.head] if stage.code.head is not None else [])):
        yield from module.parameters()
        yield from module.buffers()


def _without_devices(state: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), state)
