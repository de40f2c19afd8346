"""What there is to say about a plan or a timeline, as cells of text; terminal, notebook and page show the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autodecouple.plans import Cut, Plan, StageSpec, TensorSpec
from autodecouple.schedules.actions import Op
from autodecouple.timeline import Timeline
from autodecouple.view import units
from autodecouple.waits import periods


@dataclass(frozen=True)
class Column:
    """A column's head; `number` columns are aligned to the right and never wrapped."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Summary:
    """Tables, the sentences below them, and what the reader should beware of."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Place(Protocol):
    """A place between two nodes, as the search for cuts reports it."""

    @property
    def node(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def cut(self) -> Cut | None: ...
    @property
    def reason(self) -> str: ...


def summarize(value: Plan | Timeline) -> Summary:
    """A plan as a table of its stages; a timeline as one of its lanes and one of its stages."""
    if isinstance(value, Plan):
        return Summary((_stages(value),), plan_notes(value), value.warnings)
    return Summary((_lanes(value), _medians(value)), (timeline_note(value), _speedup(value)))


def plan_title(plan: Plan) -> str:
    inputs = ", ".join(map(str, plan.inputs))
    return f"{plan.model or 'model'}{f', input {inputs}' if inputs else ''}: {units.count(len(plan.stages), 'stage')}"


def timeline_title(timeline: Timeline) -> str:
    return timeline.title or "timeline"


def shares(plan: Plan) -> tuple[float, ...]:
    """Each stage's share of the cost; equal where nothing was measured."""
    total = sum(plan.costs)
    return tuple(cost / total if total > 0 else 1 / len(plan.stages) for cost in plan.costs)


def parts(stage: StageSpec) -> tuple[float, float, float]:
    """Forward, backward and head: seconds where the stage was timed, else FLOPs."""
    if stage.seconds is None:
        return stage.forward_flops, stage.backward_flops, stage.head_flops
    return stage.forward_seconds or 0.0, stage.backward_seconds or 0.0, stage.head_seconds or 0.0


def amount(stage: StageSpec, part: float | None = None) -> str:
    """The cost of a stage, or a part of it, as people read it."""
    if stage.seconds is None:
        return units.flops(stage.flops if part is None else part)
    return units.duration(stage.seconds if part is None else part)


def plan_notes(plan: Plan) -> tuple[str, ...]:
    """Balance, predicted speedup and where the time goes."""
    lane_costs = [sum(plan.costs[k] for k in lane) for lane in plan.lanes]
    on_lanes = sum(lane_costs) / max(lane_costs) if max(lane_costs) > 0 else 1.0
    speedup = f"{predicted_speedup(plan)} with a lane per stage"
    if len(plan.lanes) < len(plan.stages):
        limit = "at most " if any(cut.attached for cut in plan.cuts) else ""
        speedup += f", {limit}{on_lanes:.2f}x on the {units.count(len(plan.lanes), 'lane')} of this plan"
    balance = f"balance {plan.balance:.2f} (mean stage / slowest stage; 1.00 is perfect)"
    again = ("every stage runs its forward again, as a part of its backward",) if plan.recompute else ()
    return (balance, speedup, _bottleneck(plan), *_waits(plan), *again)


def timeline_note(timeline: Timeline) -> str:
    batches = units.count(len({span.batch for span in timeline.spans}), "batch")
    return f"makespan {units.duration(timeline.makespan)} for {batches}, bubble {units.percent(timeline.bubble)}"


def _speedup(timeline: Timeline) -> str:
    factor = sum(timeline.busy) / timeline.makespan if timeline.makespan > 0 else 1.0
    return f"{factor:.2f}x as fast as the same actions one after the other"


def idle(timeline: Timeline, lane: int) -> float:
    """The idle share of one lane."""
    return 1 - timeline.busy[lane] / timeline.makespan if timeline.makespan > 0 else 0.0


def predicted_speedup(plan: Plan) -> str:
    return f"predicted speedup {_limit(plan)}{plan.speedup:.2f}x"


def _limit(plan: Plan) -> str:
    """Coupled stages wait for each other, so that theirs is only a limit; where cuts overlap the waits are counted."""
    return "" if all(cut.detached for cut in plan.cuts) or _overlaps(plan) else "at most "


def _overlaps(plan: Plan) -> bool:
    return any(cut.overlaps for cut in plan.cuts)


def _waits(plan: Plan) -> tuple[str, ...]:
    """What overlapping costs, in words."""
    if not _overlaps(plan):
        return ()
    found = periods(plan)
    last = max(range(len(found)), key=found.__getitem__)
    waiting = 1 - plan.costs[last] / found[last] if found[last] > 0 else 0.0
    alone = sum(plan.costs) / max(plan.costs) if max(plan.costs) > 0 else 1.0
    return (
        "overlapping stages: each but the last is updated when the next one's loss has sent its gradient one stage"
        f" back; stage {last} waits {units.percent(waiting)} of its time, and without waits the speedup would be"
        f" {alone:.2f}x",
    )


def crossing(cut: Cut) -> tuple[TensorSpec, ...]:
    """What travels over a cut, the features first."""
    return tuple(sorted(cut.crossing, key=lambda spec: spec.name not in cut.features))


def place(stage: StageSpec) -> str:
    speed = "" if stage.speed == 1 else f" x {stage.speed:g}"
    return f"{stage.lane}: {stage.device}{speed}"


def _bottleneck(plan: Plan) -> str:
    slowest = plan.bottleneck
    text = f"slowest: stage {slowest.index}, {amount(slowest)} a step"
    if not slowest.costliest_node:
        return text
    share = f", {units.percent(slowest.costliest_flops / slowest.flops)} of the stage" if slowest.flops > 0 else ""
    return f"{text}; its costliest node is {slowest.costliest_node} ({units.flops(slowest.costliest_flops)}{share})"


def _stages(plan: Plan) -> Table:
    factor = 1e9 if plan.is_timed else 1
    scale = units.Scale.of(factor * max(max(parts(stage)) for stage in plan.stages))
    unit = scale.of_seconds if plan.is_timed else f"{scale.prefix}FLOP"
    columns = (
        Column("stage", True), Column("nodes"), Column(f"forward\n{unit}", True), Column("backward", True),
        Column("head", True), Column("share", True), Column("params", True), Column("memory", True),
        Column("objective"), Column("lane"), Column("crosses to the next stage"),
    )  # fmt: skip
    cuts = (*plan.cuts, None)
    rows = tuple(
        (
            str(stage.index),
            _nodes(stage, cut),
            *(scale(factor * part) for part in parts(stage)),
            units.percent(share),
            units.amount(stage.num_parameters),
            units.size(stage.memory_bytes),
            stage.objective,
            place(stage),
            _border(cut) if cut else "",
        )
        for stage, cut, share in zip(plan.stages, cuts, shares(plan), strict=True)
    )
    return Table(plan_title(plan), columns, rows)


def _nodes(stage: StageSpec, cut: Cut | None) -> str:
    ends = (stage.nodes[0], stage.nodes[-1]) if len(stage.nodes) > 1 else stage.nodes
    text = f"{' … '.join(ends)}\n{units.count(len(stage.nodes), 'node')}"
    return f"{text}, to {cut.module}" if cut and cut.module else text


def _border(cut: Cut) -> str:
    """The values one below the other, then their size and what else is unusual about the cut."""
    marks = [units.size(cut.num_bytes)]
    if not cut.detached:
        marks.append("coupled: the gradient comes back")
    if cut.overlaps:
        marks.append("overlaps: the gradient of the next stage's own loss comes back")
    if cut.copied:
        marks.append(f"copied: {', '.join(cut.copied)}")
    if cut.recomputed:
        marks.append(f"recomputed: {', '.join(cut.recomputed)}")
    return "\n+ ".join(map(str, crossing(cut))) + f"\n{'; '.join(marks)}"


def _lanes(timeline: Timeline) -> Table:
    columns = (Column("lane", True), Column("busy", True), Column("bubble", True), Column("spans", True))
    spans = Counter(span.lane for span in timeline.spans)
    rows = tuple(
        (str(lane), units.duration(busy), units.percent(idle(timeline, lane)), f"{spans[lane]:,}")
        for lane, busy in enumerate(timeline.busy)
    )
    return Table(timeline_title(timeline), columns, rows)


def _medians(timeline: Timeline) -> Table:
    seconds = timeline.seconds()
    ops = [op for op in Op if op is not Op.WEIGHT or any(key[1] is op for key in seconds)]
    columns = (Column("stage", True), *(Column(op.name.lower(), True) for op in ops))
    rows = tuple(
        (str(stage), *(units.duration(seconds[stage, op]) if (stage, op) in seconds else "" for op in ops))
        for stage in sorted({stage for stage, _ in seconds})
    )
    return Table("median time of each stage's actions", columns, rows)


def summarize_cuts(places: Sequence[Place]) -> Summary:
    """Every place between two nodes: what would cross, or why there is no cut."""
    columns = (Column(""), Column("after node"), Column("end of module"), Column("crosses, or why not"))
    rows = tuple(
        ("cut" if place.cut else "", place.node, place.module, _border(place.cut) if place.cut else place.reason)
        for place in places
    )
    legal = sum(place.cut is not None for place in places)
    note = f"{units.count(legal, 'legal cut')} of {units.count(len(places), 'place')}"
    return Summary((Table("cuts", columns, rows),), (note,))
