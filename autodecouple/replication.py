"""What the user asks of data parallel training: how often each stage is replicated, and what replicas share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from autodecouple.errors import InputError

DIMENSIONS = ("pipeline", "data")
STRATEGIES = ("ddp",)


@dataclass(frozen=True)
class DataParallel:
    """Each stage in several processes, every one of which trains it on rows of its own (executor="distributed").

    replicas: processes per lane; their gradients are averaged, weighted by rows, before every update
    gather:   local losses compare the rows of all replicas: embeddings and labels are gathered, with gradient, so that
              losses such as SupCon are those of the global batch; without, they are means of the replicas' own
    ranks:    which rank has which lane (rows) and replica (columns); None counts replicas first: 0 1 | 2 3 | ...
    strategy: "ddp", every replica holds the whole stage
    """

    replicas: int = 1
    gather: bool = False
    ranks: tuple[tuple[int, ...], ...] | None = None
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise InputError(f"data_parallel needs a positive number of replicas, not {self.replicas!r}")
        if self.strategy == "fsdp":
            raise InputError(
                'strategy="fsdp" is not possible: fully_shard puts a DTensor with a part of each parameter in the place'
                " of the parameter, so that neither decoupled.model nor what the optimizer was given would be the"
                ' user\'s own any more, and it weights replicas equally, whatever their rows. Take strategy="ddp" and'
                " more stages: each process holds its own stage only"
            )
        if self.strategy not in STRATEGIES:
            raise InputError(f'strategy={self.strategy!r} is not known; there is "ddp"')
        if self.ranks is not None:
            _check_ranks(self.ranks, self.replicas)

    @staticmethod
    def resolve(given: Any) -> DataParallel:
        """Of a number of replicas, a DeviceMesh with the dimensions ("pipeline", "data"), or a DataParallel."""
        if isinstance(given, DataParallel):
            return given
        if isinstance(given, DeviceMesh):
            return DataParallel.of_mesh(given)
        return DataParallel(given)

    @staticmethod
    def of_mesh(mesh: DeviceMesh, *, gather: bool = False) -> DataParallel:
        """Lanes and replicas as a mesh has them; only its ranks are read, its process groups stay the user's."""
        if mesh.mesh_dim_names != DIMENSIONS:
            raise InputError(
                f"the mesh has the dimensions {mesh.mesh_dim_names}, but stages need {DIMENSIONS}:"
                f' init_device_mesh("cpu", (lanes, replicas), mesh_dim_names={DIMENSIONS})'
            )
        ranks = tuple(tuple(row) for row in mesh.mesh.tolist())
        return DataParallel(len(ranks[0]), gather, ranks)


def _check_ranks(ranks: tuple[tuple[int, ...], ...], replicas: int) -> None:
    flat = sorted(rank for row in ranks for rank in row)
    if any(len(row) != replicas for row in ranks) or flat != list(range(len(flat))):
        raise InputError(
            f"ranks={ranks} must hold a row of {replicas} ranks for each lane, and every rank from 0 on once"
        )
