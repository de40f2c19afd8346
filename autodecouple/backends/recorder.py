"""Recording what is queued on a stream as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from autodecouple.stage import Stage

_one_at_a_time = threading.Lock()
"""A process may have one capture under way."""


class Graph(Protocol):
    def replay(self) -> None:
        """Queue all that was recorded, on the same memory."""
        ...


class Recorder(Protocol):
    def record(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        """Record what the function queues, without running it; returns that and what the function returned."""
        ...


class CudaRecorder:
    """Records on the current stream; all graphs of a recorder share their memory.

    They may, since one lane replays them one after the other: what a stage saves for its backward is dead when the next
    stage begins, and its memory is used again. So a lane takes the memory of its largest stage. What outlives a replay
    (losses, what is sent) is referenced, and so has memory of its own.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with (
            _one_at_a_time,  # other lanes go on: what they do is no part of this, and no error
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            found = work()
        return graph, found


class Recorders:
    """The recorder of each lane on a GPU."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], Recorder] = {}

    def of(self, stage: Stage) -> Recorder | None:
        """None on a device that has no graphs."""
        if stage.device.type != "cuda":
            return None
        place = stage.plan.stages[stage.index].lane, stage.device
        return self._made.setdefault(place, CudaRecorder())
