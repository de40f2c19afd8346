"""A name for this attempt at a training: the store of torchrun outlives the processes that it starts again.

What ranks that were killed have left there, the note of their failure or where they listened, is not for these:

    rank r   hello/r = its own new word ----------+                what rank 0 reads may be of those before:
    rank 0   reads all words; attempt = name, words --+            it reads and writes again until all have answered
    rank r   its own word is among them: answers name/r
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from autodecouple.errors import PeerError

INTERVAL = 0.02


def attempt(store: Any, rank: int, size: int, patience: timedelta) -> str:
    """The same name on every rank, and another one each time; raises PeerError where not all come."""
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    return _lead(store, size, word, patience) if rank == 0 else _follow(store, rank, word, patience)


def _lead(store: Any, size: int, name: str, patience: timedelta) -> str:
    others = range(1, size)

    def answered(rank: int) -> bool:
        return bool(store.check([f"{name}/{rank}"]))

    def all_answered() -> bool:
        words = {rank: store.get(f"hello/{rank}").decode() for rank in others if store.check([f"hello/{rank}"])}
        store.set("attempt", json.dumps([name, words]))
        return all(map(answered, others))

    _wait(all_answered, patience, lambda: [rank for rank in others if not answered(rank)])
    return name


def _follow(store: Any, rank: int, word: str, patience: timedelta) -> str:
    name = ""

    def found() -> bool:
        nonlocal name
        name, words = json.loads(store.get("attempt")) if store.check(["attempt"]) else ("", {})
        return bool(words.get(str(rank)) == word)

    _wait(found, patience, lambda: [0])
    store.set(f"{name}/{rank}", "")
    return name


def _wait(ready: Callable[[], bool], patience: timedelta, late: Callable[[], list[int]]) -> None:
    stop = time.monotonic() + patience.total_seconds()
    while not ready():
        if time.monotonic() > stop:
            raise PeerError(f"ranks {late()} have not compiled the model within {patience}: every rank must")
        time.sleep(INTERVAL)
