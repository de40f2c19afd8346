"""The drawing of a timeline: one row per lane, a box per action, idle time left empty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autodecouple.schedules.actions import Op
from autodecouple.timeline import Span, Timeline
from autodecouple.view import units
from autodecouple.view.canvas import Canvas, mix, stage_color
from autodecouple.view.summary import idle, timeline_note, timeline_title

MAX_SPANS = 1500
"""More are not drawn: boxes would be thinner than two pixels, and a notebook would carry megabytes."""

_LEFT, _RIGHT, _TOP, _PLOT = 84.0, 92.0, 108.0, 944.0  # margins around the plot, and its width
_ROW, _BAR = 34.0, 24.0
# The stage's colour with so much of another in it, and the colour of a label on it. Loss is not a mere tint: a thin
# pale box would pass for idle time.
_SHADES = {
    Op.FORWARD: ("#ffffff", 0.45, "#1f2328"),
    Op.LOSS: ("#ffc83d", 0.85, "#1f2328"),
    Op.BACKWARD: ("#ffffff", 0.0, "#ffffff"),
    Op.WEIGHT: ("#000000", 0.2, "#ffffff"),
    Op.UPDATE: ("#000000", 0.45, "#ffffff"),
}


def timeline_svg(timeline: Timeline) -> str:
    """A self-contained SVG: lanes from top to bottom, time from left to right, colour is stage and shade is operation.

    Of a timeline of more than `MAX_SPANS` spans the beginning is drawn, and the figure says so.
    """
    drawn, until = _window(timeline)
    scale = _PLOT / until if until > 0 else 0.0
    bottom = _TOP + timeline.num_lanes * _ROW
    canvas = Canvas(_LEFT + _PLOT + _RIGHT, bottom + 50, timeline_title(timeline), timeline_note(timeline))
    _title(canvas, timeline, len(drawn))
    _axis(canvas, until, scale, bottom)
    for lane in range(timeline.num_lanes):
        y = _TOP + lane * _ROW + _ROW / 2 + 4
        canvas.text(_LEFT - 12, y, f"lane {lane}", anchor="end")
        canvas.text(_LEFT + _PLOT + 12, y, f"{units.percent(idle(timeline, lane))} idle", fill="dim", size=11)
    for span in drawn:
        _box(canvas, span, timeline.start, scale)
    return canvas.finish()


def _window(timeline: Timeline) -> tuple[Sequence[Span], float]:
    """The spans to draw, those that take no time left out, and the seconds that the figure covers."""
    spans = sorted((span for span in timeline.spans if span.seconds > 0), key=lambda span: span.start)
    if len(spans) <= MAX_SPANS:
        return spans, timeline.makespan
    shown = spans[:MAX_SPANS]
    return shown, max(span.stop for span in shown) - timeline.start


def _title(canvas: Canvas, timeline: Timeline, num_drawn: int) -> None:
    canvas.text(24, 36, timeline_title(timeline), size=16, bold=True, width=_LEFT + _PLOT)
    total = sum(span.seconds > 0 for span in timeline.spans)
    cap = f" · the first {num_drawn:,} of {total:,} spans are drawn" if num_drawn < total else ""
    canvas.text(24, 58, timeline_note(timeline) + cap + " · numbers count batches", fill="dim")
    x = 24.0
    for stage in sorted({span.action.stage for span in timeline.spans})[:8]:
        x = _legend(canvas, x, stage_color(stage), f"stage {stage}")
    x = max(x + 16, _LEFT + _PLOT - 300)
    for op, (other, share, _) in _SHADES.items():
        if op is not Op.WEIGHT or any(span.action.op is op for span in timeline.spans):
            x = _legend(canvas, x, mix("#6b7480", other, share), op.name.lower())


def _legend(canvas: Canvas, x: float, color: str, label: str) -> float:
    canvas.rect(x, 74, 12, 12, fill=color, radius=2)
    canvas.text(x + 18, 84, label, size=11, fill="dim")
    return x + 34 + 6.2 * len(label)


def _axis(canvas: Canvas, until: float, scale: float, bottom: float) -> None:
    step = _step(until)
    ticks = [i * step for i in range(int(until / step + 1e-9) + 1)] if step > 0 else [0.0]
    for seconds in ticks:
        x = _LEFT + seconds * scale
        canvas.line(x, _TOP - 4, x, bottom + 6, stroke="line")
        canvas.text(x, bottom + 24, units.duration(seconds) if seconds else "0", size=11, fill="dim", anchor="middle")


def _step(until: float) -> float:
    """1, 2 or 5 times a power of ten, so that about eight ticks fit."""
    if until <= 0:
        return 0.0
    power: float = 10.0 ** math.floor(math.log10(until / 8))
    return next(power * factor for factor in (1, 2, 5, 10) if until / (power * factor) <= 10)


def _box(canvas: Canvas, span: Span, start: float, scale: float) -> None:
    x, width = _LEFT + (span.start - start) * scale, span.seconds * scale
    y = _TOP + span.lane * _ROW + (_ROW - _BAR) / 2
    other, share, ink = _SHADES[span.action.op]
    color = mix(stage_color(span.action.stage), other, share)
    canvas.rect(x, y, width, _BAR, fill=color, stroke="paper", stroke_width=min(1.0, width / 6), tip=_tip(span, start))
    label = str(span.batch)
    if width > 4 + 6.5 * len(label):
        canvas.text(x + width / 2, y + 16, label, size=10.5, fill=ink, anchor="middle")


def _tip(span: Span, start: float) -> str:
    part = "" if span.action.micro_batch is None else f".{span.action.micro_batch}"
    when = f"{units.duration(span.start - start)} + {units.duration(span.seconds)}"
    return f"stage {span.action.stage} {span.action.op.name.lower()}, batch {span.batch}{part}: {when}"
