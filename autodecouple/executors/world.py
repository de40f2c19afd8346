"""The processes of one training, and how they agree that they train the same thing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from autodecouple.errors import InputError, PeerError, PlanError
from autodecouple.executors.attempt import attempt
from autodecouple.plans import Plan
from autodecouple.replication import DataParallel
from autodecouple.schedules.program import Program

FOR_EVER = timedelta(days=365)
"""A rank may idle for as long as its script does; that a peer is lost is noticed otherwise."""
ARRIVAL = timedelta(minutes=10)
"""How long ranks wait for each other when the pipeline is made: capturing takes them about equally long."""
READING = timedelta(seconds=20)
"""How long a rank that ends with an error waits until all know why."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Grid:
    """Which lane and replica every rank is: `ranks` has a row per lane, and in it the rank of each replica."""

    ranks: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(size: int, data: DataParallel) -> Grid:
        """Of so many processes; raises InputError where they are not lanes times replicas."""
        if data.ranks is not None:
            if len(data.ranks) * data.replicas != size:
                raise InputError(f"there are {size} processes, but the mesh has the ranks {data.ranks}")
            return Grid(data.ranks)
        if size % data.replicas:
            raise InputError(
                f"{size} processes cannot hold {data.replicas} replicas of each lane: start lanes x replicas of them"
                f" (torchrun --nproc-per-node={data.replicas * max(2, size // data.replicas)}), or choose another"
                " data_parallel"
            )
        return Grid(tuple(tuple(range(r, r + data.replicas)) for r in range(0, size, data.replicas)))

    def place(self, rank: int) -> tuple[int, int]:
        """Lane and replica of a rank."""
        return next((lane, row.index(rank)) for lane, row in enumerate(self.ranks) if rank in row)

    def column(self, replica: int) -> list[int]:
        """The ranks of one pipeline: a replica of every lane."""
        return [row[replica] for row in self.ranks]


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and the store in which they leave notes."""

    rank: int
    size: int
    store: Any

    @staticmethod
    def current() -> World:
        """Where torchrun or the user put this process; raises InputError outside of any such world."""
        if dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())
        if not is_launched():
            raise InputError(
                'executor="distributed" needs several processes: start the script with'
                " torchrun --nproc-per-node=N, or call torch.distributed.init_process_group first"
            )
        store, rank, size = next(rendezvous("env://"))
        return World(rank, size, store)

    def apart(self) -> World:
        """The same world with a store for one pipeline; every rank makes its pipelines in the same order."""
        store = PrefixStore(f"autodecouple/{next(_numbers)}", self.store)
        name = attempt(store, self.rank, self.size, ARRIVAL)
        return World(self.rank, self.size, PrefixStore(name, store))

    def part(self, name: str, ranks: Sequence[int]) -> World:
        """Some of the processes, this one among them, as a world with a store of their own."""
        return World(list(ranks).index(self.rank), len(ranks), PrefixStore(name, self.store))

    def group(self) -> Any:
        """A process group of its own: what the user does with theirs, nobody here waits for."""
        return dist.ProcessGroupGloo(PrefixStore("gloo", self.store), self.rank, self.size, FOR_EVER)

    def tell(self, name: str, text: str) -> list[str]:
        """What every rank tells under this name; raises PeerError where one does not."""
        self.store.set(f"{name}/{self.rank}", text)
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(keys, ARRIVAL)
        except dist.DistStoreError as error:
            late = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise PeerError(f"ranks {late} have not compiled the model within {ARRIVAL}: every rank must") from error
        return [self.store.get(key).decode() for key in keys]

    def agree(self, program: Program, data: DataParallel) -> None:
        """Raises PlanError, on every rank, where ranks have other plans, naming the first difference."""
        mine = {**_summary(program), "data parallel": repr(data)}
        plans = [json.loads(text) for text in self.tell("plan", json.dumps(mine))]
        self.store.set(f"read/{self.rank}", "")
        for rank, theirs in enumerate(plans):
            if theirs != plans[0]:
                with contextlib.suppress(dist.DistError):  # the store may end with rank 0: the others read first
                    self.store.wait([f"read/{rank}" for rank in range(self.size)], READING)
                raise PlanError(_difference(plans[0], theirs, rank))


def is_launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def world_size() -> int:
    """Processes of this training; 1 outside of any launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def one_lane_per_rank(data: DataParallel) -> list[str]:
    """This rank's lane on its own GPU where there is one; those of other ranks are only kept here, on the CPU."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = f"cuda:{local}" if torch.cuda.is_available() and local < torch.cuda.device_count() else "cpu"
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    grid = Grid.of(world_size(), data)
    return [own if lane == grid.place(rank)[0] else "cpu" for lane in range(len(grid.ranks))]


def _summary(program: Program) -> Mapping[str, Any]:
    """What must be the same on every rank; devices may differ."""
    plan: Plan = program.plan
    return {
        "model": plan.model,
        "cuts": [f"{cut.after}{'' if cut.detached else ' (coupled)'}" for cut in plan.cuts],
        "lanes": [stage.lane for stage in plan.stages],
        "losses": [stage.objective for stage in plan.stages],
        "schedule": repr(program.schedule),
        "inputs": [spec.name for spec in plan.inputs],
        "values that cross": [[spec.name for spec in cut.crossing] for cut in plan.cuts],
        "operations": [list(stage.nodes) for stage in plan.stages],
    }


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    name = next(name for name in first if first[name] != other[name])
    mine, theirs = first[name], other[name]
    if isinstance(mine, list) and len(mine) == len(theirs):
        at = next(index for index, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        name, mine, theirs = f"{name} [{at}]", mine[at], theirs[at]
    return (
        f"the ranks have different plans: the first difference is in the {name}: {mine!r} on rank 0, {theirs!r} on rank"
        f" {rank}. Every rank must compile the same model with the same arguments; plan=Plan.from_json(text) of one"
        " file makes sure of it"
    )
