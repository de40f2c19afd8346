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
from autodecouple.executors.world import Grid, World
from autodecouple.schedules.program import Program

NOTE = "failure"
INTERVAL = 0.25
PATIENCE = 1.0
"""Seconds that a rank that lost a link looks for a note: one that fails leaves it before it ends its links."""
GONE = "is gone: its process was killed, or has ended without close()"
TOLD = "told"
"""Counts the ranks, beside 0, that have seen the note."""


class Peers:
    """The other ranks, as far as their failures go."""

    def __init__(self, world: World, grid: Grid, program: Program, alarm: Callable[[], None]) -> None:
        self._world = world
        self._grid = grid
        self._lanes = program.plan.lanes
        self._ended = threading.Event()
        self._watch = threading.Thread(
            target=_watch,
            args=(world.store.clone(), alarm, self._ended, world.rank > 0),
            name="autodecouple-watch",
            daemon=True,
        )
        self._watch.start()

    def publish(self, error: BaseException) -> None:
        """Leave a note, unless somebody was first."""
        notes = getattr(error, "__notes__", [])
        where = f" ({notes[-1]})" if notes else ""
        self._leave(f"{self._name(self._world.rank)} failed: {type(error).__name__}: {error}{where}")

    def explain(self, lost: int | None) -> PeerError:
        """Why the link to a rank was lost, or why somebody raised the alarm.

        Of several replicas it is not known which is lost; but its neighbours in the pipeline know, and say so.
        """
        stop = time.monotonic() + PATIENCE * (1 if lost is not None else 2)
        while (note := self._note()) is None and time.monotonic() < stop:
            time.sleep(0.05)
        if note is None and lost is not None:
            found = f"{self._name(lost)} {GONE}"
            self._leave(found)
            note = self._note() or found
        return PeerError(note or "the connection to another rank, or to the store, is lost: a process is gone")

    def settle(self) -> None:
        """Without torchrun the store lives in rank 0, which waits a little until the others know.

        All but the one that was killed, if it was that.
        """
        stop = time.monotonic() + 2 * PATIENCE
        while self._world.rank == 0 and time.monotonic() < stop and self._told() < self._num_listening():
            time.sleep(0.05)

    def _num_listening(self) -> int:
        return self._world.size - 1 - (GONE in (self._note() or ""))

    def _told(self) -> int:
        try:
            return int(self._world.store.add(TOLD, 0))
        except Exception:
            return self._world.size

    def end(self) -> None:
        self._ended.set()
        self._watch.join(5.0)

    def _name(self, rank: int) -> str:
        lane, replica = self._grid.place(rank)
        stages = self._lanes[lane]
        which = f", replica {replica}" if len(self._grid.ranks[lane]) > 1 else ""
        return f"rank {rank} (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}{which})"

    def _leave(self, text: str) -> None:
        with contextlib.suppress(Exception):  # the store may be gone, too
            self._world.store.compare_set(NOTE, "", text)

    def _note(self) -> str | None:
        with contextlib.suppress(Exception):
            if self._world.store.check([NOTE]):
                return str(self._world.store.get(NOTE).decode())
        return None


def _watch(store: Any, alarm: Callable[[], None], ended: threading.Event, is_told: bool) -> None:
    """Look for a note on a connection of its own: one that is busy makes the others wait."""
    with contextlib.suppress(Exception):  # without the store, the links alone tell
        while not ended.wait(INTERVAL) and not store.check([NOTE]):
            pass
        if is_told and store.check([NOTE]):
            store.add(TOLD, 1)
    if not ended.is_set():
        alarm()
