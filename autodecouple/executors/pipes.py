"""Links between processes of one machine: headers go through a socket, tensors lie in memory that both sides map.

    sender     copies tensors into a free slot, then sends header, description and the slot's number
    receiver   reads them where they lie; says which batches it is done with, and which slots nobody reads any more

A slot is free again when the last tensor on it is gone, however long a head or the caller keeps one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection

import torch

from autodecouple.executors.gloo import LinkLostError
from autodecouple.executors.memory import borrow, make_file, offsets_of, parts_of
from autodecouple.executors.wire import NUM_FIELDS, Decoder, Encoder, Message

PREFIX = struct.Struct(f"{NUM_FIELDS + 2}q")
"""The header, the slot and its bytes if it is new, else 0."""
NO_SLOT = -1
COUNTED = ("activations", "signal", "gradient", "result")
"""Messages that belong to a batch, which the receiver says to be done with."""


@dataclass
class Slot:
    number: int
    memory: torch.Tensor
    is_free: bool = True


class PipeSender:
    """One direction of a link.

    depth: batches that may lie at the receiver, beside the one that it works on
    """

    def __init__(self, lane: int, connection: Connection, depth: int) -> None:
        self._lane = lane
        self._connection = connection
        self._depth = depth
        self._encoder = Encoder()
        self._slots: list[Slot] = []
        self._open: list[int] = []  # batches that the receiver is not done with

    def send(self, message: Message) -> None:
        try:
            if message.kind in COUNTED:
                self._open_batch(message.batch)
            self._post(message)
        except (EOFError, OSError) as error:
            raise LinkLostError(self._lane, error) from error

    def close(self) -> None:
        self._connection.close()

    def _open_batch(self, batch: int) -> None:
        while self._connection.poll():
            self._take_report()
        if batch not in self._open:
            while len(self._open) > self._depth:
                self._take_report()
            self._open.append(batch)

    def _take_report(self) -> None:
        batch, *freed = memoryview(self._connection.recv_bytes()).cast("q")
        self._open = [number for number in self._open if number > batch]
        for number in freed:
            self._slots[number].is_free = True

    def _post(self, message: Message) -> None:
        packed = self._encoder.encode(message)
        sizes = [layout.room for layout in packed.layouts]
        slot, new_bytes = self._slot(offsets_of(sizes)[-1])
        if slot is not None:
            rooms = parts_of(slot.memory, sizes)
            for room, layout, memory in zip(rooms, packed.layouts, packed.payload, strict=True):
                room[layout.shift :].copy_(memory)
        number = slot.number if slot is not None else NO_SLOT
        self._connection.send_bytes(PREFIX.pack(*packed.header, number, new_bytes) + packed.description)
        if new_bytes:
            self._share(self._new_file)

    def _slot(self, num_bytes: int) -> tuple[Slot | None, int]:
        """A free slot that is large enough, and its size where the receiver does not know it; None for no bytes."""
        if not num_bytes:
            return None, 0
        free = [slot for slot in self._slots if slot.is_free]
        large = [slot for slot in free if slot.memory.numel() >= num_bytes]
        if large:
            slot = min(large, key=lambda slot: slot.memory.numel())
            slot.is_free = False
            return slot, 0
        number = free[0].number if free else len(self._slots)  # one that is too small gives its place
        self._new_file = make_file(num_bytes)
        mapped = mmap.mmap(self._new_file, num_bytes)
        slot = Slot(number, torch.frombuffer(mapped, dtype=torch.uint8), is_free=False)
        self._slots[number : number + 1] = [slot]
        return slot, num_bytes

    def _share(self, descriptor: int) -> None:
        reduction.send_handle(self._connection, descriptor, os.getpid())
        os.close(descriptor)


class PipeReceiver:
    """The other end."""

    def __init__(self, lane: int, connection: Connection) -> None:
        self._lane = lane
        self.connection = connection
        self._decoder = Decoder()
        self._mapped: dict[int, mmap.mmap] = {}
        self._freed: deque[int] = deque()  # tensors die in any thread, at any moment

    def receive(self) -> Message:
        try:
            return self._receive()
        except (EOFError, OSError) as error:
            raise LinkLostError(self._lane, error) from error

    def _receive(self) -> Message:
        data = self.connection.recv_bytes()
        *header, number, new_bytes = PREFIX.unpack_from(data)
        if header[-1]:
            self._decoder.learn(header, data[PREFIX.size :])
        if new_bytes:
            descriptor = reduction.recv_handle(self.connection)
            self._mapped[number] = mmap.mmap(descriptor, new_bytes)
            os.close(descriptor)
        sizes = [layout.room for layout in self._decoder.layouts(header)]
        memory = self._borrow(number, offsets_of(sizes)[-1])
        return self._decoder.decode(header, parts_of(memory, sizes))

    def _borrow(self, number: int, num_bytes: int) -> torch.Tensor:
        if number == NO_SLOT:
            return torch.empty(0, dtype=torch.uint8)
        return borrow(self._mapped[number], num_bytes, lambda freed=self._freed: freed.append(number))  # type: ignore[misc]

    def done(self, batch: int) -> None:
        """Tell the sender that batches up to this one are done with, and which slots are free."""
        freed = [self._freed.popleft() for _ in range(len(self._freed))]
        try:
            self.connection.send_bytes(struct.pack(f"{1 + len(freed)}q", batch, *freed))
        except OSError:
            return  # whoever has ended needs no report

    def close(self) -> None:
        self.connection.close()


@dataclass(frozen=True)
class PipeLinks:
    """All links of one process, by the lane on the other side."""

    senders: Mapping[int, PipeSender]
    receivers: Mapping[int, PipeReceiver]

    def send(self, lane: int, message: Message) -> None:
        self.senders[lane].send(message)

    def receive(self, lane: int) -> Message:
        return self.receivers[lane].receive()

    def takes(self, kind: str) -> bool:
        return kind == "cpu"

    def done(self, batch: int) -> None:
        for receiver in self.receivers.values():
            receiver.done(batch)

    def close(self) -> None:
        for sender in self.senders.values():
            sender.close()
        for receiver in self.receivers.values():
            receiver.close()
