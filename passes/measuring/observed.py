"""What a run has shown of its stages, as costs of their nodes and heads."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from autodecouple.graph import Graph, Measure
from autodecouple.objectives.objective import Objective, Signal
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.passes.measuring.charges import Amount, Charge, charged
from autodecouple.passes.measuring.prices import Prices
from autodecouple.passes.measuring.updates import charge_updates
from autodecouple.plans import Plan, StageSpec, TensorSpec
from autodecouple.schedules.actions import Op
from autodecouple.timeline import Timeline

Seconds = Mapping[tuple[int, Op], float]


def seconds_per_batch(timeline: Timeline) -> Seconds:
    """Median seconds that a batch takes of each stage's forward, loss, backward and update, micro-batches together.

    A backward that was split in two counts as one.
    """
    sums: defaultdict[tuple[int, Op], defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in timeline.spans:
        op = Op.BACKWARD if span.action.op is Op.WEIGHT else span.action.op
        sums[span.action.stage, op][span.batch] += span.seconds
    return {key: statistics.median(batches.values()) for key, batches in sums.items()}


def charge_observed(graph: Graph, plan: Plan, seconds: Seconds) -> Charge:
    """Nanoseconds of every node and head at speed 1: the FLOPs, scaled to what their stage has taken.

    A stage's forward and backward have a scale each, heads one for all of them. A second forward, which its backward
    has been seen with, is taken to be like the first. What the optimizer takes goes to the nodes that use a parameter
    first, and to heads, by the bytes of the parameters.
    """
    updates = _updates(graph, plan, seconds)
    seconds = _without_recomputing(seconds) if plan.recompute else seconds
    amounts: dict[str, Amount] = {}
    prices, ties = Prices.of(Charge(graph)), ["detached", *(cut.tie for cut in plan.cuts), "detached"]
    for stage in plan.stages:
        start = graph.measures[stage.nodes[0]].position
        spent = prices.stage(start, start + len(stage.nodes), ties[stage.index], ties[stage.index + 1])
        amounts |= _amounts(graph.measures, stage, seconds, updates, int(spent.backward.sum()))
    per_flop, per_byte = _scales_of_heads(plan, seconds)

    def head(objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> HeadCost:
        counted = head_cost(objective, features, signal)
        return dataclasses.replace(counted, flops=round(counted.flops * per_flop + counted.parameter_bytes * per_byte))

    criterion = round(_nanoseconds(plan.stages[-1], seconds, Op.LOSS))
    return Charge(charged(graph, amounts), head, criterion, updates=updates, recompute=plan.recompute)


def _without_recomputing(seconds: Seconds) -> Seconds:
    def alone(stage: int, op: Op) -> float:
        again = seconds.get((stage, Op.FORWARD), 0.0) if op is Op.BACKWARD else 0.0
        return max(0.0, seconds[stage, op] - again)

    return {key: alone(*key) for key in seconds}


def _nanoseconds(stage: StageSpec, seconds: Seconds, op: Op) -> float:
    """What a stage took, as it would on a lane of speed 1."""
    return seconds.get((stage.index, op), 0.0) * 1e9 * stage.speed


def _amounts(
    measures: Mapping[str, Measure], stage: StageSpec, seconds: Seconds, updates: Mapping[str, int], backward: int
) -> dict[str, Amount]:
    found = {name: measures[name] for name in stage.nodes}
    forward = sum(measure.forward_flops for measure in found.values())
    # a stage without FLOPs has nothing to share by: every node is alike
    per_forward = _nanoseconds(stage, seconds, Op.FORWARD) / (forward or len(found))
    per_backward = _nanoseconds(stage, seconds, Op.BACKWARD) / (backward or 1)
    return {
        name: (
            round((measure.forward_flops if forward else 1) * per_forward) + updates.get(name, 0),
            tuple((at, round(flops * per_backward)) for at, flops in measure.backward_flops),
        )
        for name, measure in found.items()
    }


def _updates(graph: Graph, plan: Plan, seconds: Seconds) -> dict[str, int]:
    """Nanoseconds of the optimizer, by the node that uses a parameter first."""
    rates = {name: _per_byte([stage], seconds) for stage in plan.stages for name in stage.nodes}
    return charge_updates(graph, lambda node, x: rates[node] * x.numel() * x.element_size())


def _per_byte(stages: Sequence[StageSpec], seconds: Seconds) -> float:
    """Nanoseconds of the optimizer per byte of parameters, heads included."""
    took = sum(_nanoseconds(stage, seconds, Op.UPDATE) for stage in stages)
    return took / max(1, sum(stage.parameter_bytes + stage.head_parameter_bytes for stage in stages))


def _scales_of_heads(plan: Plan, seconds: Seconds) -> tuple[float, float]:
    """Nanoseconds per FLOP of the hidden stages' heads, and per byte of their parameters, all together."""
    hidden = [stage for stage in plan.stages[:-1] if stage.head_flops > 0]
    took = sum(_nanoseconds(stage, seconds, Op.LOSS) for stage in hidden)
    return took / max(1, sum(stage.head_flops for stage in hidden)), _per_byte(hidden, seconds)
