"""One lane per process: under torchrun the same script trains on every rank its part of the model.

A rank runs its lane's actions in the caller's thread, one batch at a time, and waits where a batch has not come yet:

    rank 0   ... F0 L0 B0 U0 F1 L1 B1 U1 F2 ...         the script feeds batches here
    rank 1         ... F0 L0 B0 U0 F1 L1 B1 U1 ...      train_step here takes the next one from rank 0
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
from autodecouple.executors.executor import Recorder
from autodecouple.executors.gloo import GlooLinks, LinkLostError
from autodecouple.executors.job import Job
from autodecouple.executors.lane import LaneRunner, neighbours
from autodecouple.executors.peers import Peers
from autodecouple.executors.ranks import ALONE, Ranks
from autodecouple.executors.world import World
from autodecouple.schedules.program import Program
from autodecouple.stage import Stage
from autodecouple.stage_state import restore_stage, stage_state
from autodecouple.timeline import Timeline

LAST_WRITES = 300.0
"""Seconds for a checkpoint under way when the ranks have parted, and nobody notices any more who is gone."""
EXPLANATION = 5.0
"""Seconds that a thread behind the training waits for it to find out what a lost link means."""


class Distributed:
    """Runs the lane of this rank; rank r is lane r. The operators' threads are those that torch uses in this process.

    `gather` is collective, as are `synchronize` and `close` (unless it aborts): every rank must call them, at the same
    places. After the failure of any rank all of them end: that one with its error, the others with PeerError.
    """

    def __init__(self, stages: Sequence[Stage], program: Program, num_threads: int) -> None:
        world = World.current().apart()
        _check_size(world, program)
        world.agree(program)
        self._stages = stages
        self._rank = world.rank
        self._lanes = program.plan.lanes
        self._recorder = Recorder(world.size)
        peers = neighbours(program, world.rank)
        self._links = links = GlooLinks(world.group(), peers, program.schedule.queue_depth)
        self._peers = Peers(world, program, lambda: links.lose(None))
        feeder = None if world.rank == 0 else world.rank - 1
        self._lane = LaneRunner(world.rank, stages, program, self._links, feeder, self._recorder)
        writers = tuple(rank for rank, own in enumerate(self._lanes) for _ in own)
        store = PrefixStore("checkpoints", world.store.clone())
        self._ranks = Ranks(world.rank, world.size, writers, store, self._check, self._ended)
        self._batches = 0
        self._is_current = False  # whether all ranks hold the same state
        self._stopped = False
        self._why = ""  # all have ended
        self._parted = self._lost = math.inf
        _running.add(self)

    @property
    def feeds(self) -> bool:
        return self._rank == 0

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
            try:
                self._links.check()
                self._is_current = False
                self._lane.run(job)
                self._batches = job.index + 1
            finally:
                job.finish()

    def synchronize(self) -> None:
        with self._guarded():
            self._lane.meet(self._batches, "waits for all batches")
            self._lane.synchronize()

    def gather(self) -> None:
        """Every rank gets the weights, buffers and training states of all stages; cheap where it has them."""
        if self._is_current or self._stopped:
            return
        with self._guarded():
            self._lane.meet(self._batches, "reads the model or its state")
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
        """Part in peace: what was sent arrives."""
        with self._guarded():
            self._links.end(self._batches)
            self._stop()

    def _stop(self) -> None:
        self._stopped = True
        self._parted = time.monotonic()
        self._peers.end()
        self._links.cut()

    def _fail(self) -> None:
        self._stop()
        self._peers.settle()

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
            found = self._peers.explain(error.lane)
            self._why = str(found)
            self._fail()
            raise found from None
        except BaseException as error:
            self._why = f"{type(error).__name__}: {error}"
            self._peers.publish(error)
            self._fail()
            raise

    def _check(self) -> None:
        """Raise what has ended the training, unless that is known already."""
        if not self._stopped:
            with self._guarded():
                self._links.check()

    def _ended(self) -> str:
        """Why others cannot be waited for: one failed or is gone, or all have parted long ago; empty while they can.

        What was lost is explained by the thread that trains, at its next look.
        """
        is_lost, now = self._links.is_lost, time.monotonic()  # first: parting cuts the links, and says so before
        if self._why or not (is_lost and not self._stopped):
            return self._why or ("the ranks have parted" if now > self._parted + LAST_WRITES else "")
        self._lost = min(self._lost, now)
        return "another rank is gone" if now > self._lost + EXPLANATION else ""

    # ---------------------------------------------------------------- the state of all ranks

    def _share(self, stage: Stage, owner: int) -> None:
        try:
            for tensor in (*stage.parameters, *stage.buffers):
                self._broadcast_into(tensor, owner)
            state = _without_devices(stage_state(stage)) if owner == self._rank else None
            found = self._broadcast_bytes(pickle.dumps(state), owner)
        except RuntimeError as error:
            self._links.check()
            raise LinkLostError(None, error) from error
        if owner != self._rank:
            restore_stage(stage, pickle.loads(found))

    def _broadcast_into(self, tensor: torch.Tensor, owner: int) -> None:
        mine = owner == self._rank
        whole = tensor.detach().cpu().contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._broadcast(whole, owner)
        if not mine:
            with torch.no_grad():
                tensor.copy_(whole)

    def _broadcast_bytes(self, mine: bytes, owner: int) -> bytes:
        size = torch.tensor(len(mine))
        self._broadcast(size, owner)
        data = torch.frombuffer(bytearray(mine if owner == self._rank else int(size)), dtype=torch.uint8)
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


def _check_size(world: World, program: Program) -> None:
    if (count := len(program.lanes)) != world.size:
        raise InputError(
            f"there are {world.size} processes, but the plan has {count} lanes of {len(program.plan.stages)} stages:"
            f" start {count} processes (torchrun --nproc-per-node={count}), or ask for n_stages={world.size} or more"
        )


def _without_devices(state: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), state)
