"""torchrun's own agent in a forked process: its ranks, forked in turn, have all imported and captured already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

LIMIT = 100.0
"""Seconds after which all is ended, and the test fails."""


def launch(size: int, function: Callable[[], Any], folder: Path, max_restarts: int = 0) -> dict[int, Any] | None:
    """What the function returns on every rank; None where a rank failed more often than they may be started again."""

    def agent() -> dict[int, Any] | None:
        logging.disable(logging.CRITICAL)
        config = LaunchConfig(
            1, 1, size, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", max_restarts=max_restarts,
            start_method="fork", monitor_interval=0.05, logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        )  # fmt: skip
        try:
            found: dict[int, bytes] = elastic_launch(config, _as_a_script(function))()
            return {rank: pickle.loads(value) for rank, value in found.items()}
        except ChildFailedError:
            return None

    return run_apart(agent)


def run_apart(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process; "killed" where that is; fails where it, or what it forks, hangs."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_live, args=(function, ours, theirs))
    process.start()
    theirs.close()
    try:
        # The pipe ends when all that were forked have ended.
        assert ours.poll(LIMIT), "a process hangs"
        value = pickle.loads(ours.recv_bytes())
        assert ours.poll(LIMIT), "a process is left behind"
        return value
    except EOFError:
        return "killed"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        ours.close()


def _live(function: Callable[[], Any], ours: Any, theirs: Any) -> None:
    os.setsid()
    ours.close()
    theirs.send_bytes(pickle.dumps(function()))


def _as_a_script(function: Callable[[], Any]) -> Callable[[], bytes]:
    def rank() -> bytes:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's own handler came along
        torch.set_num_threads(1)
        return pickle.dumps(function())

    return rank
