"""Links over a gloo process group: two threads per neighbour, so that tensors travel while the lane works.

The lane's own thread never waits inside gloo, which nothing but a peer or a timeout could end: it waits here, and is
woken by a message, by room, or by the first failure of any link.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch

from autodecouple.executors.wire import NUM_FIELDS, Decoder, Encoder, Message

TAG, UNUSED_TAG = 1, 2
Flight = tuple[int, list[tuple[Any, torch.Tensor]]]
"""A message under way: its batch, and gloo's works with the memory that they read."""


class LinkLostError(Exception):
    """A connection ended; `lane` is the other side, None where it is not known."""

    def __init__(self, lane: int | None, cause: BaseException | None = None) -> None:
        super().__init__(f"link to lane {lane}: {cause}")
        self.lane = lane


class GlooLinks:
    """This rank's connections to its neighbours; a lane's number is its rank.

    depth: batches that may be on their way to a neighbour, who holds one more that it has not begun
    All methods raise LinkLostError once a link is lost; what was received before still counts.
    """

    def __init__(self, group: Any, peers: Iterable[int], depth: int) -> None:
        self.group = group
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

    def send(self, lane: int, message: Message) -> None:
        flights = self._flights[lane]
        with self._lock:
            self._wait(lambda: not flights or flights[0][0] > message.batch - self._depth)
        packed = self._encoders[lane].encode(message)
        parts = [torch.tensor(packed.header, dtype=torch.int64)]
        if packed.description:
            parts.append(torch.frombuffer(bytearray(packed.description), dtype=torch.uint8))
        parts += [memory for memory in packed.payload if memory.numel()]
        try:
            works = [(self.group.send([part], lane, TAG), part) for part in parts]
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
        """End all connections and threads, and the peers' waits.

        What wakes a thread that waits inside gloo is that its connection fails. Neither abort() nor shutdown() of torch
        2.13 does that; any wait that runs into its timeout does, for the whole group.
        """
        self.lose(None)
        if any(thread.is_alive() for thread in self._threads):
            for peer in self._peers:
                with contextlib.suppress(RuntimeError):
                    self.group.recv([torch.zeros(1)], peer, UNUSED_TAG).wait(timedelta(milliseconds=1))
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
        layouts = decoder.layouts(header)
        rooms = [torch.empty(layout.room, dtype=torch.uint8) for layout in layouts]
        _receive(links, peer, [room[layout.shift :] for room, layout in zip(rooms, layouts, strict=True)])
        message = decoder.decode(header, iter(rooms))
        links.hand_over(peer, message)


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
