"""Values from one lane to the next: copied to its device, in the right order, and alive for as long as they are read.

CPU lanes hand over references. On a GPU every lane has a stream of its own, made once; an event orders the reader
behind the writer, and the reader keeps what it reads until an event says that it is done with it:

    lane 0   ... F0 ---- event ----> F1 ...
    lane 1            wait(event)  F0 ... event: F0's input may be freed
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from autodecouple.errors import InputError
from autodecouple.stage import Stage
from autodecouple.work import tensors_in


@dataclass(frozen=True)
class Parcel:
    """Values in transit: the versions they were sent at, and the events after which they are complete."""

    values: Any
    versions: tuple[int, ...]
    events: tuple[torch.cuda.Event, ...] = ()


def pack(values: Any, *events: torch.cuda.Event) -> Parcel:
    return Parcel(values, _versions(values), events)


def check_unchanged(parcel: Parcel) -> None:
    """Raises InputError if somebody wrote into the values since they were sent."""
    if _versions(parcel.values) != parcel.versions:
        raise InputError(
            "a tensor given to train_step was changed in place before a stage had read it: train_step returns at once,"
            " so call synchronize() before you reuse the tensor, or pass a copy"
        )


def _versions(values: Any) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors_in(values))


class Queue(Protocol):
    """Where a lane's work is queued, and the clock that times it."""

    device: torch.device

    def entered(self) -> contextlib.AbstractContextManager[None]: ...
    def send(self, values: Any) -> Parcel: ...
    def receive(self, parcel: Parcel) -> Any: ...
    def keep(self, values: Any) -> None: ...
    def mark(self) -> Any: ...
    def seconds(self, mark: Any) -> float: ...
    def synchronize(self) -> None: ...


class CpuQueue:
    """The processor itself: work is done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def send(self, values: Any) -> Parcel:
        return pack(values)

    def receive(self, parcel: Parcel) -> Any:
        check_unchanged(parcel)
        for event in parcel.events:
            event.synchronize()  # from a GPU: the copy below must find complete values
        return _moved(parcel.values, self.device)

    def keep(self, values: Any) -> None:
        return None

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def synchronize(self) -> None:
        return None


class CudaQueue:
    """One stream of a GPU. The host runs ahead of it by at most `num_ahead` received parcels."""

    def __init__(self, device: torch.device, num_ahead: int = 8) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # parameters were made there
        self._num_ahead = num_ahead
        self._reading: list[Any] = []
        self._read: deque[tuple[torch.cuda.Event, list[Any]]] = deque()
        self._host_start = time.perf_counter()
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record(self.stream)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield
        self._settle()

    def send(self, values: Any) -> Parcel:
        event = torch.cuda.Event()
        event.record(self.stream)
        return pack(values, event)

    def receive(self, parcel: Parcel) -> Any:
        check_unchanged(parcel)
        for event in parcel.events:
            self.stream.wait_event(event)
        self.keep(parcel.values)
        return _moved(parcel.values, self.device)

    def keep(self, values: Any) -> None:
        """Values of another stream that the work queued now reads, or of one that the host is about to drop.

        Autograd drops what it saved as soon as the host has queued a backward. The memory then goes back to the stream
        it came from, which would fill it anew while this one still reads it.
        """
        self._reading.append(values)

    def _settle(self) -> None:
        """Free what has been read; wait only when the host is too far ahead."""
        if self._reading:
            event = torch.cuda.Event()
            event.record(self.stream)
            self._read.append((event, self._reading))
            self._reading = []
        while self._read and (self._read[0][0].query() or len(self._read) > self._num_ahead):
            self._read.popleft()[0].synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        return self._host_start + float(self._start.elapsed_time(mark)) / 1000

    def synchronize(self) -> None:
        self.stream.synchronize()
        self._read.clear()


Queues = dict[torch.device, Queue]


def make_queues(stages: Iterable[Stage]) -> Queues:
    """One queue per device that the stages of a lane lie on."""
    devices = {stage.device for stage in stages}
    return {device: CudaQueue(device) if device.type == "cuda" else CpuQueue(device) for device in devices}


def pack_from_caller(values: Any, devices: Iterable[torch.device]) -> Parcel:
    """Values of the caller, to be read when what the caller's own streams have queued so far is done.

    devices: of all stages. Also where the values are on the CPU: an evaluation that the caller queued just before may
    still be reading the parameters that this batch will update.
    """
    own = {tensor.device for tensor in tensors_in(values)}
    events = []
    for device in {*own, *devices}:
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
    return pack(values, *events)


def lend_to_caller(values: Any) -> Any:
    """The same values, their memory not used again before the caller's stream has done with them."""
    for tensor in tensors_in(values):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return values


def _moved(values: Any, device: torch.device) -> Any:
    if all(tensor.device == device for tensor in tensors_in(values)):
        return values

    def move(value: Any) -> Any:
        # a copy to the processor must be complete when it returns: nothing on that side would wait for it
        return value.to(device, non_blocking=device.type != "cpu") if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(move, values)
