"""Nanoseconds on a device: the processor's own clock, and the events of a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FEWEST, MOST = 3, 20
"""Samples of one measurement: fewer where each takes long."""
ENOUGH = 30_000_000
"""Nanoseconds of samples, after which no more are taken."""


@dataclass(frozen=True)
class Clock:
    """Marks moments in the work that a device has been given."""

    device: torch.device

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, stop: Any) -> int:
        """Nanoseconds from one mark to the other."""
        if self.device.type != "cuda":
            return int(stop - start)
        stop.synchronize()
        return round(float(start.elapsed_time(stop)) * 1e6)


def medians(sample: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """The median of each number that `sample` returns, over a few calls; the first one only warms up."""
    sample()
    start = time.perf_counter_ns()
    found: list[tuple[int, ...]] = []
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter_ns() - start < ENOUGH):
        found.append(sample())
    return tuple(round(statistics.median(column)) for column in zip(*found, strict=True))
