"""A lane's device with what sets it apart from the others: its speed and its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autodecouple.errors import InputError


@dataclass(frozen=True)
class Device:
    """One lane: a device by name, where `devices=` holds lanes that are not alike.

    name:         "cpu" or "cuda:0"; a device that is named twice has two lanes
    speed:        relative to the other lanes: a stage takes 1 / speed of the time. With cost="measured" each device is
                  timed anyway; a speed then multiplies what it showed
    memory_limit: bytes that the stages of this lane may take together; None for no limit
    Raises InputError for a speed or a limit that is not above 0.
    """

    name: str
    speed: float = 1.0
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.speed < math.inf:
            raise InputError(f"Device({self.name!r}, speed={self.speed!r}): give a number above 0")
        if self.memory_limit is not None and not self.memory_limit > 0:
            raise InputError(f"Device({self.name!r}, memory_limit={self.memory_limit!r}): give bytes above 0, or None")

    def __str__(self) -> str:
        return self.name
