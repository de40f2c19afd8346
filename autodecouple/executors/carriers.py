"""What takes tensors from lane to lane where they lie on devices: NCCL, a communicator for each direction of a pair.

    lane's stream   ... F0 --event                                         F0 reads behind the second event
    sending         wait(event), send --+
    receiving                           +--> recv, event --> the message, which the lane may take at once

Headers go through gloo: they tell the receiver what to ask for, in which order. With one communicator for both
directions each side's send could wait for the other's, on the device, for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from autodecouple.executors.world import FOR_EVER, World

TAG, UNUSED_TAG = 1, 2
FIRST, SECOND = 0, 1
"""Of a pair: the one that sends, and the one that receives."""


class Landing(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Let the calling thread wait until it is there."""
        ...

    def events(self) -> tuple[Any, ...]:
        """What to wait for on a device; where there is none, the thread waits here."""
        ...


class PairCarrier:
    """Tensors of one kind of device, to and from this lane's neighbours.

    outgoing, incoming: groups of two by the neighbour's lane, of which the sender is the first; device: where tensors
    are received, and of which type those that are sent must be
    """

    def __init__(self, outgoing: Mapping[int, Any], incoming: Mapping[int, Any], device: torch.device) -> None:
        self.device = device
        self._outgoing = outgoing
        self._incoming = incoming
        self._sides = {
            way: {lane: _Side(device) for lane in ways} for way, ways in (("out", outgoing), ("in", incoming))
        }

    def takes(self, kind: str) -> bool:
        """Whether tensors on devices of this type travel here."""
        return kind == self.device.type

    def send(self, lane: int, parts: Sequence[Tensor], events: Sequence[Any]) -> Landing:
        """Send memory that is complete after the events; it must stay until it has landed."""
        group = self._outgoing[lane]
        return self._sides["out"][lane].run(lambda: [group.send([part], SECOND, TAG) for part in parts], events)

    def receive(self, lane: int, make: Callable[[], Sequence[Tensor]]) -> tuple[Any, ...]:
        """Fill the memory that is made for it; returns the events after which it is complete."""
        group = self._incoming[lane]
        return (
            self._sides["in"][lane]
            .run(lambda: [group.recv([part], FIRST, TAG) for part in make() if part.numel()])
            .events()
        )

    def cut(self) -> None:
        """End the connections, and whatever waits for them."""
        for groups, peer in ((self._outgoing, SECOND), (self._incoming, FIRST)):
            for group in groups.values():
                end_group(group, [peer])


class _Side:
    """A stream for one direction, so that what travels waits for nothing else; the processor has none."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, begin: Callable[[], list[Any]], events: Sequence[Any] = ()) -> Landing:
        """Begin what works, behind the events."""
        if self._stream is None:
            for event in events:
                event.synchronize()
            return _Works(begin())
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for event in events:
                self._stream.wait_event(event)
            for work in begin():
                work.wait()  # of the stream, not of the thread
            return _Event(self._stream.record_event())


class _Works:
    """Works of a group whose tensors lie on the processor."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def events(self) -> tuple[Any, ...]:
        self.wait()
        return ()


class _Event:
    """The point in a stream after which everything is there."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def events(self) -> tuple[Any, ...]:
        return (self._event,)


def nccl_carrier(world: World, peers: Sequence[int], device: torch.device) -> PairCarrier:
    """Through NCCL; world: the lanes of one pipeline, every one on a GPU of its own."""
    return pair_carrier(world, peers, device, nccl_group)


def pair_carrier(world: World, peers: Sequence[int], device: torch.device, make: Callable[[World], Any]) -> PairCarrier:
    """Over groups of two, one for each direction, made in the same order by both."""
    own = world.rank
    ways = sorted({(a, b) for peer in peers for a, b in ((own, peer), (peer, own))})
    groups = {(a, b): make(world.part(f"carrier/{a}-{b}", (a, b))) for a, b in ways}
    outgoing = {b: group for (a, b), group in groups.items() if a == own}
    incoming = {a: group for (a, b), group in groups.items() if b == own}
    return PairCarrier(outgoing, incoming, device)


def nccl_group(world: World) -> Any:
    """A communicator of its own among these processes; connected when first used."""
    kind = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = FOR_EVER
    return kind(PrefixStore("nccl", world.store), world.rank, world.size, options)


def can_use_nccl(world: World, device: torch.device) -> bool:
    """Whether every process has a GPU of its own; asked by all of them."""
    own = ""
    if device.type == "cuda" and dist.is_nccl_available():
        own = str(torch.cuda.get_device_properties(device).uuid)
    found = world.tell("device", own)
    return all(found) and len(set(found)) == len(found)


def end_group(group: Any, peers: Iterable[int]) -> None:
    """End all connections of a group, and what its members wait for.

    What wakes a thread that waits inside gloo is that its connection fails. Neither abort() nor shutdown() of torch
    2.13 does that; any wait that runs into its timeout does, for the whole group. NCCL's abort() does what it says.
    """
    if group.name() != "gloo":
        group.abort()
        return
    for peer in peers:
        with contextlib.suppress(RuntimeError):
            group.recv([torch.zeros(1)], peer, UNUSED_TAG).wait(timedelta(milliseconds=1))
