"""Rounds in which everything that is compared takes its turn, so that whatever else the machine does meets all of it.

A round is {name: seconds}; ratios are taken within a round, medians over rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Round = Mapping[str, float]


@dataclass(frozen=True)
class Ratio:
    """How many times faster one is than another: the median round, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def median(rounds: Sequence[Round], name: str) -> float:
    """Seconds of the median round; rounds that lack the name do not count."""
    return statistics.median(found[name] for found in rounds if name in found)


def faster(rounds: Sequence[Round], name: str, base: str) -> Ratio:
    """The seconds of `base` over those of `name`, of rounds that have both."""
    ratios = [found[base] / found[name] for found in rounds if name in found and base in found]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown, the first column to the left and numbers to the right."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, marks, *rows))
