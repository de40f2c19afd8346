"""Links over a gloo process group: two threads per neighbour, so that tensors travel while the lane works.

Where lanes lie on devices, their tensors are left to a carrier, and only what tells of them goes through gloo.

The lane's own thread never waits inside gloo, which nothing but a peer or a timeout could end: it waits here, and is
woken by a message, by room, or by the first failure of any link.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from autodecouple.executors.carriers import TAG, PairCarrier, end_group
from autodecouple.executors.wire import NUM_FIELDS, Decoder, Encoder, Layout, Message

Flight = tuple[int, list[tuple[Any, Any]]]
"""A message under way: its batch, and what to wait for with the memory that it reads."""


class LinkLostError(Exception):
    """A connection ended; `lane` is the other side, None where it is not known."""

    def __init__(self, lane: int | None, cause: BaseException | None = None) -> None:
        super().__init__(f"link to lane {lane}: {cause}")
        self.lane = lane


class GlooLinks:
    """This rank's connections to its neighbours; a lane's number is its rank.

    depth: batches that may be on their way to a neighbour, who holds one more that it has not begun
    carrier: takes the tensors on devices; None: links take those on the CPU only
    All methods raise LinkLostError once a link is lost; what was received before still counts.
    """

    def __init__(self, group: Any, peers: Iterable[int], depth: int, carrier: PairCarrier | None = None) -> None:
        self.group = group
        self.carrier = carrier
        self._peers = sorted(peers)
        self._depth = depth
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._encoders = {peer: Encoder() for peer in self._peers}
        self._flights: dict[int, deque[Flight]] = {peer: deque() for peer in self._peers}
        self._inbox: defaultdict[int, deque[Message]] = defaultdict(deque)
        self._lost: LinkLostError | None = None
        self._ending = False
        self._threads = [
            threading.Thread(target=_watched, args=(work, self, peer), name=f"autodecouple-link-{peer}", daemon=True)
            for peer in self._peers
            for work in (_land, _receive_all)
        ]
        for thread in self._threads:
            thread.start()

    # ---------------------------------------------------------------- the lane's side

    def takes(self, kind: str) -> bool:
        return kind == "cpu" or self.carries(kind)

    def carries(self, kind: str) -> bool:
        """Whether tensors on this type of device are left to the carrier."""
        return self.carrier is not None and self.carrier.takes(kind)

    def send(self, lane: int, message: Message) -> None:
        flights = self._flights[lane]
        with self._lock:
            self._wait(lambda: not flights or flights[0][0] > message.batch - self._depth)
        packed = self._encoders[lane].encode(message)
        parts = [torch.tensor(packed.header, dtype=torch.int64)]
        if packed.description:
            parts.append(torch.frombuffer(bytearray(packed.description), dtype=torch.uint8))
        payload = [pair for pair in zip(packed.layouts, packed.payload, strict=True) if pair[1].numel()]
        parts += [memory for layout, memory in payload if not self.carries(layout.device)]
        carried = [memory for layout, memory in payload if self.carries(layout.device)]
        try:
            works: list[tuple[Any, Any]] = [(self.group.send([part], lane, TAG), part) for part in parts]
            if carried and self.carrier is not None:
                works.append((self.carrier.send(lane, carried, message.events), carried))
        except RuntimeError as error:
            self.lose(lane, error)
            raise LinkLostError(lane, error) from error
        with self._lock:
            flights.append((message.batch, works))
            self._changed.notify_all()

    def receive(self, lane: int) -> Message:
        inbox = self._inbox[lane]
        with self._lock:
            self._wait(lambda: bool(inbox))
            self._changed.notify_all()
            return inbox.popleft()

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def end(self, batches: int, seconds: float = 2.0) -> None:
        """Wait until everything has arrived, say goodbye, and wait a little for the peers to do so.

        A peer that has said it before may be gone: it needs no answer.
        """
        present = [peer for peer in self._peers if not self._has_left(peer)]
        for peer in present:
            self.send(peer, Message("end", batches))
        with self._lock:
            self._wait(lambda: not any(self._flights[peer] for peer in present))
            self._ending = True
            self._changed.notify_all()
        stop = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, stop - time.monotonic()))
        self.cut()

    def _has_left(self, peer: int) -> bool:
        with self._lock:
            return any(message.kind == "end" for message in self._inbox[peer])

    def lose(self, lane: int | None, cause: BaseException | None = None) -> None:
        """Fail everybody who waits here, now and later."""
        with self._lock:
            self._lost = self._lost or LinkLostError(lane, cause)
            self._changed.notify_all()

    def cut(self) -> None:
        """End all connections and threads, and the peers' waits."""
        self.lose(None)
        if any(thread.is_alive() for thread in self._threads):
            end_group(self.group, self._peers)
            if self.carrier is not None:
                self.carrier.cut()
        for thread in self._threads:
            thread.join(5.0)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._lost is not None or ready())
        if not ready():
            self.check()

    # ---------------------------------------------------------------- the threads' side

    def first_flight(self, lane: int) -> Flight | None:
        """The oldest message under way; None when all is over."""
        flights = self._flights[lane]
        with self._lock:
            self._changed.wait_for(lambda: self._lost is not None or self._ending or bool(flights))
            return flights[0] if flights and self._lost is None else None

    def landed(self, lane: int) -> None:
        with self._lock:
            self._flights[lane].popleft()
            self._changed.notify_all()

    def hand_over(self, lane: int, message: Message) -> None:
        """Give a message to the lane; waits while it has not taken an earlier batch's."""
        inbox = self._inbox[lane]
        with self._lock:
            self._changed.wait_for(lambda: self._lost is not None or not inbox or inbox[-1].batch == message.batch)
            inbox.append(message)
            self._changed.notify_all()


def _land(links: GlooLinks, peer: int) -> None:
    """Wait for what was sent: gloo has sent it when the peer has asked for it."""
    while (flight := links.first_flight(peer)) is not None:
        for work, _ in flight[1]:
            work.wait()
        links.landed(peer)


def _receive_all(links: GlooLinks, peer: int) -> None:
    """Receive ahead of the lane that will ask for it."""
    decoder = Decoder()
    message = None
    while message is None or message.kind != "end":
        (part,) = _receive(links, peer, [torch.empty(NUM_FIELDS, dtype=torch.int64)])
        header = part.tolist()
        if header[-1]:
            (part,) = _receive(links, peer, [torch.empty(header[-1], dtype=torch.uint8)])
            decoder.learn(header, part.numpy().tobytes())
        rooms, events = _receive_payload(links, peer, decoder.layouts(header))
        message = dataclasses.replace(decoder.decode(header, iter(rooms)), events=events)
        links.hand_over(peer, message)


def _receive_payload(links: GlooLinks, peer: int, layouts: list[Layout]) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """Memory with what lies in it, and the events after which that on a device is complete."""
    rooms: dict[int, torch.Tensor] = {}

    def make(carried: bool, device: torch.device) -> list[torch.Tensor]:
        """Where to receive what the carrier takes, or the rest."""
        own = [(i, layout) for i, layout in enumerate(layouts) if links.carries(layout.device) is carried]
        rooms.update({i: torch.empty(layout.room, dtype=torch.uint8, device=device) for i, layout in own})
        return [rooms[i][layout.shift :] for i, layout in own]

    _receive(links, peer, make(False, torch.device("cpu")))
    events: tuple[Any, ...] = ()
    if (carrier := links.carrier) is not None and any(links.carries(layout.device) for layout in layouts):
        events = carrier.receive(peer, lambda: make(True, carrier.device))
    return [rooms[i] for i in range(len(layouts))], events


def _receive(links: GlooLinks, peer: int, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    works = [links.group.recv([part], peer, TAG) for part in parts if part.numel()]
    for work in works:
        work.wait()
    return parts


def _watched(work: Callable[[GlooLinks, int], None], links: GlooLinks, peer: int) -> None:
    """The life of a link's thread: its failure is everybody's."""
    try:
        work(links, peer)
    except BaseException as error:
        links.lose(peer, error)
