"""The replicas of a lane: processes that train the same stages, each on rows of its own.

replica 0   ... F L B --+-- U ...      loss and gradients of the global batch: the replicas' own, weighted by their
replica 1   ... F L B --+-- U ...      rows and summed; from the same gradients every replica takes the same step

All that is exchanged comes in the same order on all replicas, since they run the same program.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autodecouple.errors import InputError
from autodecouple.executors.carriers import end_group
from autodecouple.executors.gloo import LinkLostError
from autodecouple.executors.world import World
from autodecouple.shards import Shard
from autodecouple.work import Flag, Work

BUCKET = 25 * 2**20
"""Bytes of gradients that travel as one: DDP's default."""
DOINGS = ("trains", "waits")


class ReplicaLostError(LinkLostError):
    """The connection to another replica of the lane ended."""


class Replicas:
    """This process among those that train its lane's stages.

    world: the replicas; device_group: for what lies on a device, None: that goes through the CPU
    share: of the global batch's rows, how much is here
    All methods raise LinkLostError once a replica is lost, or `lose` was called.
    """

    def __init__(self, world: World, device_group: Any = None) -> None:
        self.replica = world.rank
        self.size = world.size
        self.share = 1.0 / world.size
        self._group = world.group()
        self._device_group = device_group
        self._changed = threading.Condition()
        self._lost: LinkLostError | None = None

    # ---------------------------------------------------------------- a batch

    def meet(self, batch: int, rows: int, count: int) -> Shard:
        """The global batch that this one is a part of; all replicas must be at the same batch.

        rows, count: of the batch here, and its micro-batches
        """
        found = self._compare("trains", batch, rows, count)
        if len(counts := {each[3] for each in found}) > 1:
            raise InputError(
                f"the replicas have {[each[2] for each in found]} rows of batch {batch}, too few on some for the"
                f" {max(counts)} micro-batches of others: give every replica about as many rows"
            )
        return Shard(tuple(each[2] for each in found), self.replica, count)

    def wait(self, batches: int) -> None:
        """Wait until all replicas have trained this many batches, and wait as well."""
        self._compare("waits", batches)

    def _compare(self, doing: str, batch: int, *more: int) -> list[list[int]]:
        mine = torch.tensor([DOINGS.index(doing), batch, *more, *[0] * (2 - len(more))])
        found = [each.tolist() for each in self._gather_alike(mine)]
        for replica, (other, at, *_) in enumerate(found):
            if [other, at] != found[self.replica][:2]:
                raise InputError(
                    f"the replicas are not at the same place: replica {replica} {_said(DOINGS[other], at)}, but this"
                    f" one, replica {self.replica}, {_said(doing, batch)}. Every replica must be given the same number"
                    " of batches (DistributedSampler sees to that), and call model, state_dict(), save(), evaluate(),"
                    " synchronize() and close() at the same places"
                )
        return found

    def unite(self, parameters: Sequence[nn.Parameter], work: Work, judge: Work) -> None:
        """Let losses and gradients of the batch be those of the global one, on every replica to the last bit.

        Once more for the same `judge`, of another stage that it trains, changes nothing: shares add up to 1.
        """
        held = [parameter.grad is not None for parameter in parameters]
        own = sum(float(loss) for loss in judge.losses) * work.share
        facts = torch.tensor([own, *map(float, held)], dtype=torch.float64)
        self._reduce(facts)
        if judge.losses:
            loss = facts[0].to(judge.losses[0])
            judge.losses[:], judge.finite[:] = [loss], [Flag(loss)]
        anywhere = [parameter for parameter, number in zip(parameters, facts[1:], strict=True) if number]
        for bucket in _buckets([_gradient(parameter) for parameter in anywhere]):
            self._average(bucket, work.share)

    def _average(self, gradients: list[Tensor], share: float) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).mul_(share)
        self._reduce(torch.view_as_real(flat) if flat.is_complex() else flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # ---------------------------------------------------------------- rows of all replicas

    def sum(self, values: Tensor) -> Tensor:
        """Of all replicas; no gradient."""
        total = values.detach().clone()
        self._reduce(total)
        return total

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The rows (R, ...) of every replica, of which each may have another number; no gradient."""
        counts = [int(each) for each in self._gather_alike(torch.tensor([len(rows)]))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return [each[:count] for each, count in zip(self._gather_alike(padded), counts, strict=True)]

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Let these be on all replicas what they are on the first."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        for tensor in tensors:
            memory = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # whatever its type
            self._carry(memory, lambda group, value: group.broadcast([value], options))
            with torch.no_grad():
                tensor.copy_(memory.view(tensor.dtype).view_as(tensor))
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # the lane reads them on another stream

    # ---------------------------------------------------------------- what groups do

    def _reduce(self, tensor: Tensor) -> None:
        self._carry(tensor, lambda group, value: group.allreduce([value], dist.AllreduceOptions()))

    def _gather_alike(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every replica; shapes must be the same."""
        whole = tensor.new_empty(self.size, *tensor.shape)
        whole[self.replica] = tensor
        self._carry(whole, lambda group, value: group.allgather([list(value.unbind())], [value[self.replica].clone()]))
        return list(whole.unbind())

    def _carry(self, tensor: Tensor, begin: Callable[[Any, Tensor], Any]) -> None:
        """Let a group change a tensor: that of the device, whose stream then waits, or through the CPU."""
        self.check()
        on_device = tensor.device.type != "cpu" and self._device_group is not None
        value = tensor.contiguous() if on_device else tensor.cpu().contiguous()
        try:
            if on_device:
                begin(self._device_group, value).wait()
            else:
                self._wait(begin(self._group, value))
        except RuntimeError as error:
            self.lose(error)
            raise ReplicaLostError(None, error) from error
        if value is not tensor:
            with torch.no_grad():
                tensor.copy_(value)

    def _wait(self, work: Any) -> None:
        """Not inside gloo, which nothing but a peer or a timeout could end."""
        self._landed(work)
        self.check()
        work.wait()

    def _landed(self, work: Any, seconds: float | None = None) -> None:
        """Wait until it is done, all is lost or the time is over.

        gloo's thread is given nothing that holds the group: dropped there last, the group would wait for that thread.
        """
        future, changed = work.get_future(), self._changed
        future.add_done_callback(lambda _: _wake(changed))
        with changed:
            changed.wait_for(lambda: self._lost is not None or future.done(), seconds)

    # ---------------------------------------------------------------- the end

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def end(self, seconds: float = 10.0) -> None:
        """Wait a little until all replicas end: with the first of them the store may go."""
        with contextlib.suppress(RuntimeError):
            whole = [torch.zeros(1) for _ in range(self.size)]
            self._landed(self._group.allgather([whole], [torch.zeros(1)]), seconds)

    def lose(self, cause: BaseException | None = None) -> None:
        """Fail whoever waits here, now and later."""
        with self._changed:
            self._lost = self._lost or LinkLostError(None, cause)
            self._changed.notify_all()

    def cut(self) -> None:
        """End the connections, and the other replicas' waits."""
        self.lose()
        end_group(self._group, [peer for peer in range(self.size) if peer != self.replica])
        if self._device_group is not None:
            end_group(self._device_group, ())


def _wake(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, of zeros where other replicas have one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout is not torch.strided:
        raise InputError(
            f"a parameter {tuple(parameter.shape)} has a {parameter.grad.layout} gradient, which data_parallel cannot"
            " average: build the layer with sparse=False"
        )
    return parameter.grad


def _buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """Gradients of one type and device each, in their order, that travel together."""
    buckets: list[list[Tensor]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        kind = gradient.dtype, gradient.device
        bucket, size = open_.get(kind, ([], BUCKET))
        if size + gradient.nbytes > BUCKET:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(gradient)
        open_[kind] = bucket, size + gradient.nbytes
    return buckets


def _said(doing: str, batch: int) -> str:
    return f"trains batch {batch}" if doing == "trains" else f"waits for all, after {batch} batches,"
