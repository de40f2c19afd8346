"""When every action ran, predicted or measured: one type, so that one drawing compares them."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autodecouple.schedules.actions import Action, Op


@dataclass(frozen=True, slots=True)
class Span:
    """One action of one batch on one lane, from `start` to `stop` seconds."""

    lane: int
    action: Action
    batch: int
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True)
class Timeline:
    """Spans in the order of their start."""

    spans: tuple[Span, ...]
    num_lanes: int
    title: str = ""

    @property
    def start(self) -> float:
        return min((span.start for span in self.spans), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop."""
        return max((span.stop for span in self.spans), default=0.0) - self.start

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of work per lane."""
        seconds = [0.0] * self.num_lanes
        for span in self.spans:
            seconds[span.lane] += span.seconds
        return tuple(seconds)

    @property
    def bubble(self) -> float:
        """Idle share of lane time: 0 when every lane works from the first start to the last stop."""
        total = self.makespan * self.num_lanes
        return 1.0 - sum(self.busy) / total if total > 0 else 0.0

    def seconds(self) -> Mapping[tuple[int, Op], float]:
        """Median seconds of each stage's forward, loss, backward and update."""
        found: defaultdict[tuple[int, Op], list[float]] = defaultdict(list)
        for span in self.spans:
            found[span.action.stage, span.action.op].append(span.seconds)
        return {key: statistics.median(values) for key, values in found.items()}

    @property
    def staleness(self) -> Mapping[int, int]:
        """By stage, the most updates with earlier batches that a forward did not wait for: 0 but for PipeDream."""
        begun: defaultdict[int, dict[int, float]] = defaultdict(dict)
        updated: defaultdict[int, list[float]] = defaultdict(list)
        for span in self.spans:
            if span.action.op is Op.FORWARD:
                begun[span.action.stage].setdefault(span.batch, span.start)
            elif span.action.op is Op.UPDATE and span.batch in begun[span.action.stage]:
                updated[span.action.stage].append(span.stop)
        return {
            stage: max(
                count - bisect.bisect(updated[stage], start) for count, start in enumerate(begun[stage].values())
            )
            for stage in sorted(begun)
            if begun[stage]
        }

    def __str__(self) -> str:
        from autodecouple.view import text

        return text.timeline_table(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from autodecouple.view import html

        return html.mimebundle(self)
