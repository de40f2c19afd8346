"""Ranks as forked processes: they take the captured models of this process along, and torchrun's environment is set."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

LIMIT = 60.0
"""Seconds after which ranks are ended, and the test fails."""


@dataclass(frozen=True)
class Outcome:
    """What became of a rank: its value, or its error as type, message and notes; the seconds it took; the exit code."""

    value: Any = None
    error: str | None = None
    message: str = ""
    seconds: float = 0.0
    exit_code: int | None = None


def run_ranks(size: int, function: Callable[[int], Any]) -> list[Outcome]:
    """Call the function on every rank, in a process each."""
    with forked_ranks(size, function) as ranks:
        return [rank.outcome() for rank in ranks]


@dataclass(frozen=True)
class Rank:
    process: Any
    connection: Connection

    def outcome(self) -> Outcome:
        try:
            if not self.connection.poll(LIMIT):
                self.process.kill()
                raise AssertionError(f"{self.process.name} hangs")
            found: Outcome = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            found = Outcome(error="killed")
        self.process.join(LIMIT)
        return Outcome(found.value, found.error, found.message, found.seconds, self.process.exitcode)


@contextlib.contextmanager
def forked_ranks(size: int, function: Callable[[int], Any]) -> Iterator[list[Rank]]:
    context = multiprocessing.get_context("fork")
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for number in range(size):
        ours, theirs = context.Pipe()
        variables = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
        process = context.Process(
            target=_live, args=(variables, function, number, ours, theirs), name=f"rank-{number}", daemon=True
        )
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours))
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.process.is_alive():
                rank.process.kill()
            rank.process.join()
            rank.connection.close()


def _live(
    environment: dict[str, str], function: Callable[[int], Any], number: int, ours: Connection, mine: Connection
) -> None:
    ours.close()
    os.environ.update(environment)
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        outcome = Outcome(function(number))
    except BaseException as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        if os.environ.get("SHOW"):
            traceback.print_exc()
        outcome = Outcome(error=type(error).__name__, message=text)
    outcome = Outcome(outcome.value, outcome.error, outcome.message, time.monotonic() - start)
    mine.send_bytes(pickle.dumps(outcome))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
