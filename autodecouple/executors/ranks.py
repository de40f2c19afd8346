"""The processes that save together: which of them writes what, and the notes by which they agree.

rank 0   first: acts, leaves what came of it ---------+
rank r   first: waits for that, or for a failure <----+        whoever fails says so, and all give up
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autodecouple.errors import CheckpointError, PeerError

INTERVAL = 0.01


def _never() -> bool:
    return False


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Ranks:
    """This process among those that save together.

    writers:   the rank that writes each stage; empty where one process writes everything
    store:     where notes are left, over a connection that nobody else uses
    check:     raises what has ended the training; for the thread that trains
    has_ended: whether anything has; for any thread
    """

    rank: int = 0
    size: int = 1
    writers: tuple[int, ...] = ()
    store: Any = None
    check: Callable[[], None] = _nothing
    has_ended: Callable[[], bool] = _never

    def writer(self, stage: int) -> int:
        return self.writers[stage] if self.writers else 0


ALONE = Ranks()
"""One process that holds everything."""


@dataclass(frozen=True)
class Notes:
    """What the ranks tell each other about one save; `number` counts the saves, alike on every rank."""

    ranks: Ranks
    number: int

    def leave(self, note: str, text: str = "") -> None:
        if self.ranks.size > 1:
            self.ranks.store.set(self._key(note), text)

    def hear(self, note: str) -> str:
        """Wait for a note. Raises CheckpointError for another rank's failure, PeerError once training has ended."""
        store = self.ranks.store
        try:
            while not store.check([self._key(note)]):
                if store.check([self._key("failed")]):
                    raise CheckpointError(store.get(self._key("failed")).decode())
                if self.ranks.has_ended():
                    raise PeerError("the training has ended: another rank failed, or is gone")
                time.sleep(INTERVAL)
            return str(store.get(self._key(note)).decode())
        except RuntimeError as error:
            if isinstance(error, PeerError):
                raise
            raise PeerError("the connection to the store is lost: a process is gone") from error

    def fail(self, text: str) -> None:
        """Let all others give up, too; only the first one's text counts."""
        if self.ranks.size > 1:
            self.ranks.store.compare_set(self._key("failed"), "", text)

    def first(self, note: str, act: Callable[[], str]) -> str:
        """Act on rank 0, and wait for it on all others; returns its text there, too."""
        if self.ranks.rank > 0:
            return self.hear(note)
        text = act()
        self.leave(note, text)
        return text

    def _key(self, note: str) -> str:
        return f"save/{self.number}/{note}"
