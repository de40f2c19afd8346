"""The drawing of a plan: who costs what, what crosses, and where the gradient stops.

|== stage 0 ==|===== stage 1 =====|= stage 2 =|     widths are shares of the cost
 \\           / \\                /  \\         /
+-----------+   +-----------+   +-----------+
|  stage 0  |-->|  stage 1  |-->|  stage 2  |       a card each, of one width, so that all can be read
+-----------+ ¦ +-----------+ ¦ +-----------+
      v       ¦       v       ¦       v             a wall where the gradient stops
    head      ¦     head      ¦   criterion
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from autodecouple.plans import Cut, Plan, StageSpec
from autodecouple.view import units
from autodecouple.view.canvas import Canvas, mix, stage_color
from autodecouple.view.summary import amount, crossing, parts, plan_notes, plan_title, predicted_speedup, shares

_PAD, _GAP, _MIN_CARD, _MIN_WIDTH = 24.0, 44.0, 220.0, 720.0
_STRIP, _STRIP_HEIGHT, _TOP = 84.0, 26.0, 146.0  # where the strip and the cards begin
_BLOCK, _MAX_BLOCKS = 20.0, 6
_SHADES = (("forward", 0.25), ("backward", 0.0), ("head", 0.6))  # a stage's colour with that much white in it


@dataclass(frozen=True)
class _Card:
    stage: StageSpec
    x: float
    width: float
    bottom: float

    @property
    def color(self) -> str:
        return stage_color(self.stage.index)

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def plan_svg(plan: Plan) -> str:
    """A self-contained SVG of the plan: stages from left to right, what crosses every cut, and the heads below."""
    cards = _layout(plan)
    width, height = cards[-1].x + cards[-1].width + _PAD, cards[-1].bottom + 140
    canvas = Canvas(width, height, plan_title(plan), " ".join((*plan_notes(plan), *plan.warnings)))
    _title(canvas, plan, width)
    left = _PAD
    for card, share in zip(cards, shares(plan), strict=True):
        right = left + share * (width - 2 * _PAD)
        _strip(canvas, card, share, left, right)
        _card(canvas, card, share, slowest=card.stage is plan.bottleneck)
        _head(canvas, card)
        left = right
    for card, cut in zip(cards[:-1], plan.cuts, strict=True):
        _cut(canvas, cut, card)
    return canvas.finish()


def _layout(plan: Plan) -> list[_Card]:
    count = len(plan.stages)
    width = max(_MIN_CARD, (_MIN_WIDTH - 2 * _PAD - (count - 1) * _GAP) / count)
    bottom = _TOP + 92 + _BLOCK * max(len(_blocks(stage)) for stage in plan.stages)
    return [_Card(stage, _PAD + k * (width + _GAP), width, bottom) for k, stage in enumerate(plan.stages)]


def _title(canvas: Canvas, plan: Plan, width: float) -> None:
    canvas.text(_PAD, 36, plan_title(plan), size=16, bold=True, width=width - 2 * _PAD)
    facts = [f"balance {plan.balance:.2f}", predicted_speedup(plan)]
    if plan.warnings:
        facts.append(units.count(len(plan.warnings), "warning"))
    canvas.text(_PAD, 60, " · ".join(facts), fill="dim")
    x = width - _PAD - 232
    canvas.text(x - 8, 60, "cost:", size=11, fill="dim", anchor="end")
    for name, white in _SHADES:
        canvas.rect(x, 50, 12, 12, fill=mix("#6b7480", "#ffffff", white), radius=2)
        canvas.text(x + 18, 60, name, size=11, fill="dim")
        x += 84


def _strip(canvas: Canvas, card: _Card, share: float, left: float, right: float) -> None:
    """The stage's box, as wide as its share, in it forward, backward and head; below it the way to its card."""
    stage, width, bottom = card.stage, right - left, _STRIP + _STRIP_HEIGHT
    canvas.polygon(
        [(left, bottom), (right, bottom), (card.x + card.width, _TOP), (card.x, _TOP)], fill=card.color, opacity=0.12
    )
    tip = f"stage {stage.index}: {amount(stage)}"
    canvas.rect(left, _STRIP, width, _STRIP_HEIGHT, fill=card.color, tip=tip, data_stage=stage.index)
    x = left
    costs = parts(stage)
    for (name, white), cost in zip(_SHADES, costs, strict=True):
        part = width * cost / sum(costs) if sum(costs) > 0 else 0.0
        if part > 0:
            tip = f"stage {stage.index} {name}: {amount(stage, cost)}"
            canvas.rect(x, _STRIP, part, _STRIP_HEIGHT, fill=mix(card.color, "#ffffff", white), tip=tip)
        x += part
    canvas.line(right, _STRIP, right, bottom, stroke="paper", stroke_width=2)
    if width > 40:
        canvas.text((left + right) / 2, bottom + 16, units.percent(share), anchor="middle", bold=True)


def _card(canvas: Canvas, card: _Card, share: float, *, slowest: bool) -> None:
    stage, left, right, inner = card.stage, card.x + 14, card.x + card.width - 14, card.width - 28
    box = (card.x, _TOP, card.width, card.bottom - _TOP)
    canvas.rect(*box, fill="paper", radius=6)
    border = 2.5 if slowest else 1.0
    canvas.rect(*box, fill=card.color, fill_opacity=0.12, stroke=card.color, stroke_width=border, radius=6)
    canvas.text(left, _TOP + 26, f"stage {stage.index}", size=15, bold=True)
    if slowest:
        canvas.text(left + 68, _TOP + 26, "slowest", size=11, fill="alert", bold=True)
    lane = f"lane {stage.lane}, {stage.device}"
    canvas.text(right, _TOP + 26, lane, size=11, fill="dim", anchor="end", width=inner - 116)
    canvas.text(left, _TOP + 46, f"{amount(stage)} ({units.percent(share)})", width=inner)
    size = f"{units.amount(stage.num_parameters)} parameters, {units.size(stage.memory_bytes)}"
    canvas.text(left, _TOP + 64, size, fill="dim", width=inner)
    for row, block in enumerate(_blocks(stage)):
        y = _TOP + 80 + row * _BLOCK
        canvas.rect(left, y, inner, _BLOCK - 4, fill=card.color, fill_opacity=0.16, radius=3)
        canvas.text(left + 6, y + 12, block, size=10.5, mono=True, width=inner - 12)


def _head(canvas: Canvas, card: _Card) -> None:
    """The loss below its stage: filled for a head of ours, outlined for the user's own criterion, none when coupled."""
    stage, x, y = card.stage, card.middle, card.bottom + 26
    if stage.objective == "bp":
        canvas.text(x, y + 18, "no head: gradient from the next stage", size=11, fill="dim", anchor="middle")
        return
    own = stage.objective == "criterion"
    head = f"head: {amount(stage, parts(stage)[2])}, {units.size(stage.head_parameter_bytes)} of parameters"
    canvas.arrow(x, card.bottom, x, y)
    canvas.rect(
        x - 70, y, 140, 28, fill="paper" if own else card.color, stroke=card.color, radius=14,
        tip="the task loss" if own else head,
    )  # fmt: skip
    ink = "ink" if own else "#ffffff"
    canvas.text(x, y + 18, stage.objective, fill=ink, anchor="middle", bold=True, width=124)


def _cut(canvas: Canvas, cut: Cut, card: _Card) -> None:
    """Detached: a wall that only the forward arrow passes. Coupled: no wall, and the gradient's arrow comes back; where
    the cut overlaps it does so through the wall."""
    left, right, y = card.x + card.width + 4, card.x + card.width + _GAP - 4, _TOP + 40
    middle, bottom, width = (left + right) / 2, card.bottom, card.width + _GAP - 12
    if cut.detached:
        canvas.line(middle, _TOP - 4, middle, bottom + 72, stroke="alert", stroke_width=1.5, stroke_dasharray="5 4")
    if cut.attached:
        canvas.arrow(right, y + 18, left, y + 18, stroke="alert")
    canvas.arrow(left, y, right, y, stroke="ink")
    first, *others = map(str, crossing(cut))
    # Several side values are named only: their shapes stand in the table.
    names = [others[0]] if len(others) == 1 else [str(s.name) for s in crossing(cut)[1:]]
    lines = [first, f"+ {', '.join(names)}"] if others else [first]
    for row, line in enumerate(lines):
        canvas.text(middle, bottom + 90 + 16 * row, line, size=10.5, mono=True, anchor="middle", width=width)
    facts = [units.size(cut.num_bytes), f"after {cut.module or cut.after}", *([cut.tie] if cut.attached else [])]
    y = bottom + 90 + 16 * len(lines)
    canvas.text(middle, y, " · ".join(facts), size=11, fill="dim", anchor="middle", width=width)


def _blocks(stage: StageSpec) -> list[str]:
    """What the stage is made of: its modules in order, or else the kinds of its nodes, the most frequent first."""
    kinds = Counter(re.sub(r"_\d+$", "", node) for node in stage.nodes).most_common()
    rows = list(stage.modules) or [f"{kind} x {number}" if number > 1 else kind for kind, number in kinds]
    return rows if len(rows) <= _MAX_BLOCKS else [*rows[: _MAX_BLOCKS - 1], f"and {len(rows) - _MAX_BLOCKS + 1} more"]
