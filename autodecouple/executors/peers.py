"""How ranks learn of each other's failures: a note in the store, left by whoever fails first.

rank 2   raises; leaves its note; ends its connections          the failing rank may live on: the note is enough
rank 1   loses its link to 2 --> reads the note --> PeerError   a rank that was killed leaves none: 1 says so for it
rank 0   looks for a note four times a second --> PeerError
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from autodecouple.errors import PeerError
from autodecouple.executors.world import World
from autodecouple.schedules.program import Program

NOTE = "failure"
INTERVAL = 0.25
PATIENCE = 3.0
"""Seconds that a rank that lost a link waits for somebody's note before it calls the other side gone."""


class Peers:
    """The other ranks, as far as their failures go."""

    def __init__(self, world: World, program: Program, alarm: Callable[[], None]) -> None:
        self._world = world
        self._lanes = program.plan.lanes
        self._ended = threading.Event()
        self._watch = threading.Thread(
            target=_watch, args=(world.store.clone(), alarm, self._ended), name="autodecouple-watch", daemon=True
        )
        self._watch.start()

    def publish(self, error: BaseException) -> None:
        """Leave a note, unless somebody was first."""
        notes = getattr(error, "__notes__", [])
        where = f" ({notes[-1]})" if notes else ""
        self._leave(f"{self._name(self._world.rank)} failed: {type(error).__name__}: {error}{where}")

    def explain(self, lost: int | None) -> PeerError:
        """Why a link was lost, or why somebody raised the alarm."""
        stop = time.monotonic() + PATIENCE
        while (note := self._note()) is None and time.monotonic() < stop:
            time.sleep(0.05)
        if note is None and lost is not None:
            self._leave(f"{self._name(lost)} is gone: its process was killed, or has ended without close()")
            note = self._note() or f"{self._name(lost)} is gone"
        return PeerError(note or "the connection to another rank, or to the store, is lost: a process is gone")

    def end(self) -> None:
        self._ended.set()
        self._watch.join(5.0)

    def _name(self, rank: int) -> str:
        stages = self._lanes[rank]
        return f"rank {rank} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"

    def _leave(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the store may be gone, too
            self._world.store.compare_set(NOTE, "", text)

    def _note(self) -> str | None:
        with contextlib.suppress(Exception):
            if self._world.store.check([NOTE]):
                return str(self._world.store.get(NOTE).decode())
        return None


def _watch(store: Any, alarm: Callable[[], None], ended: threading.Event) -> None:
    """Look for a note on a connection of its own: one that is busy makes the others wait."""
    with contextlib.suppress(Exception):  # without the store, the links alone tell
        while not ended.wait(INTERVAL):
            if store.check([NOTE]):
                break
    if not ended.is_set():
        alarm()
