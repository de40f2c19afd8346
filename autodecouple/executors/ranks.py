"""The processes that save together: which of them writes what, and the notes by which they agree.

rank 0   first: acts, leaves what came of it ---------+
rank r   first: waits for that, or for a failure <----+        whoever fails says so, and all give up
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autodecouple.errors import CheckpointError, PeerError

INTERVAL = 0.01


def _never() -> str:
    return ""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Ranks:
    """This process among those that save together.

    writers:   the rank that writes each stage; empty where one process writes everything
    store:     where notes are left, over a connection that nobody else uses
    check:     raises what has ended the training; for the thread that trains
    ended:     what has, or nothing; for any thread
    """

    rank: int = 0
    size: int = 1
    writers: tuple[int, ...] = ()
    store: Any = None
    check: Callable[[], None] = _nothing
    ended: Callable[[], str] = _never

    def writer(self, stage: int) -> int:
        return self.writers[stage] if self.writers else 0


ALONE = Ranks()
"""One process that holds everything."""


@dataclass(frozen=True)
class Notes:
    """What the ranks tell each other about one save.

    number: counts the saves, alike on every rank; in_front: whether the thread that trains waits for these
    """

    ranks: Ranks
    number: int
    in_front: bool = True

    def leave(self, note: str, text: str = "") -> None:
        if self.ranks.size > 1:
            self.ranks.store.set(self._key(note), text)

    def hear(self, note: str) -> str:
        """Wait for a note. Raises CheckpointError for another rank's failure, PeerError once training has ended."""
        store = self.ranks.store
        while not _asked(store.check, [self._key(note)]):
            if _asked(store.check, [self._key("failed")]):
                raise CheckpointError(_asked(store.get, self._key("failed")).decode())
            if self.in_front:
                self.ranks.check()
            if why := self.ranks.ended():
                raise PeerError(f"the training has ended: {why}")
            time.sleep(INTERVAL)
        return str(_asked(store.get, self._key(note)).decode())

    def fail(self, text: str) -> str:
        """Let all others give up, too; only the first one's text counts, which is returned: later failures may follow
        from it."""
        if self.ranks.size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever would read this
                return str(self.ranks.store.compare_set(self._key("failed"), "", text).decode())
        return text

    def first(self, note: str, act: Callable[[], str]) -> str:
        """Act on rank 0, and wait for it on all others; returns its text there, too."""
        if self.ranks.rank > 0:
            return self.hear(note)
        text = act()
        self.leave(note, text)
        return text

    def part(self, seconds: float = 5.0) -> None:
        """Let all read the last note: without torchrun the store ends with rank 0."""
        if self.ranks.rank > 0:
            self.leave(f"read/{self.ranks.rank}")
            return
        keys = [self._key(f"read/{rank}") for rank in range(1, self.ranks.size)]
        stop = time.monotonic() + seconds
        while keys and not _asked(self.ranks.store.check, keys) and not self.ranks.ended() and time.monotonic() < stop:
            time.sleep(INTERVAL)

    def _key(self, note: str) -> str:
        return f"save/{self.number}/{note}"


def _asked(question: Callable[[Any], Any], what: Any) -> Any:
    try:
        return question(what)
    except RuntimeError as error:
        raise PeerError("the connection to the store is lost: a process is gone") from error
