"""How fast values go from one lane to the next."""

from __future__ import annotations

import torch

from autodecouple.passes.measuring.clock import Clock, medians
from autodecouple.plans import Link

LARGE = 2**25
"""Bytes of the copy that shows the bandwidth; that of one byte shows the latency."""


def time_link(source: torch.device, target: torch.device, num_bytes: int = LARGE) -> Link:
    """Bandwidth and latency of a copy; between two lanes on the CPU one within its memory."""
    small, large = (_copy(source, target, size) for size in (1, num_bytes))
    return Link(num_bytes / max(large - small, 1) * 1e9, small / 1e9)


def _copy(source: torch.device, target: torch.device, num_bytes: int) -> int:
    """Nanoseconds of one copy, by the clock of the GPU where there is one: the sender's, which does the work."""
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for device in (source, target))
    clock = Clock(source if source.type == "cuda" else target)

    def sample() -> tuple[int, ...]:
        start = clock.mark()
        received.copy_(sent)
        return (clock.between(start, clock.mark()),)

    return medians(sample)[0]
