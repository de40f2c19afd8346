"""Timelines as trace events, which Perfetto, chrome://tracing and Speedscope open."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from autodecouple.timeline import Span, Timeline


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """The trace-event object: names of the lanes, then a complete event ("X", microseconds) per span by its start."""
    names = [_name("process_name", 0, timeline.title or "autodecouple")]
    names += [_name("thread_name", lane, f"lane {lane}") for lane in range(timeline.num_lanes)]
    spans = sorted(timeline.spans, key=lambda span: (span.start, span.lane))
    return {"traceEvents": [*names, *(_event(span, timeline.start) for span in spans)], "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: str | PathLike[str]) -> None:
    """Write `trace_events` as JSON."""
    Path(path).write_text(json.dumps(trace_events(timeline)), encoding="utf-8")


def _name(kind: str, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": lane, "args": {"name": name}}


def _event(span: Span, start: float) -> dict[str, Any]:
    action = span.action
    return {
        "ph": "X",
        "name": str(action),
        "cat": action.op.name.lower(),
        "pid": 0,
        "tid": span.lane,
        "ts": (span.start - start) * 1e6,
        "dur": span.seconds * 1e6,
        "args": {
            "stage": action.stage,
            "op": action.op.name.lower(),
            "batch": span.batch,
            "micro_batch": action.micro_batch,
        },
    }
