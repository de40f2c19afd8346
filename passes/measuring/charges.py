"""What the stages of a lane are charged for: FLOPs, or nanoseconds as they were measured there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective, Signal
from autodecouple.passes.measure import HeadCost, head_cost
from autodecouple.plans import TensorSpec

Amount = tuple[int, tuple[tuple[int, int], ...]]
"""Of a node: what its forward costs, and (threshold, amount) pairs of its backward, as in `Measure`."""


class HeadPrice(Protocol):
    """A head's cost, whatever it is counted in, in the place of its FLOPs."""

    def __call__(self, objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> HeadCost: ...


@dataclass(frozen=True, eq=False)
class Charge:
    """What a stage costs on one lane, in whole numbers, so that the optimum is exact.

    graph:        its measures hold costs in the place of FLOPs
    head:         the same of heads; criterion: of the loss on the last stage
    speed:        of the lane, relative to the others
    memory_limit: bytes that a stage there may take
    updates:      part of the forward of some nodes, by their names: what the optimizer takes
    recompute:    stages run their forward again for their backward instead of keeping their activations
    reserved_bytes: part of the limit that is taken by something else
    """

    graph: Graph
    head: HeadPrice = head_cost
    criterion: int = 0
    speed: float = 1.0
    memory_limit: int | None = None
    updates: Mapping[str, int] = field(default_factory=dict)
    recompute: bool = False
    reserved_bytes: int = 0

    @property
    def prices(self) -> tuple[int, int, int]:
        """Equal for lanes that charge the same but for their speeds."""
        return id(self.graph), id(self.head), self.criterion

    def amount(self, name: str) -> Amount:
        """Of a node, by its name; a second forward is a part of the backward, wherever the stage begins."""
        measure = self.graph.measures[name]
        forward, backward = measure.forward_flops, measure.backward_flops
        if self.recompute:
            backward += ((measure.position, forward - self.updates.get(name, 0)),)
        return forward, backward

    def limit(self, other: int | None) -> int | None:
        """The tighter of the lane's limit and another one, less what is reserved of it."""
        known = [limit for limit in (self.memory_limit, other) if limit is not None]
        return min(known) - self.reserved_bytes if known else None


def charged(graph: Graph, amounts: Mapping[str, Amount]) -> Graph:
    """The graph with other costs than FLOPs; nodes that `amounts` leaves out cost nothing."""
    nothing: Amount = (0, ())
    measures = {}
    for name, measure in graph.measures.items():
        forward, backward = amounts.get(name, nothing)
        measures[name] = dataclasses.replace(measure, forward_flops=forward, backward_flops=backward)
    return dataclasses.replace(graph, measures=measures)


def with_updates(amounts: Mapping[str, Amount], updates: Mapping[str, int]) -> dict[str, Amount]:
    """Amounts whose forward holds what the optimizer takes, too."""
    found = dict(amounts)
    for name, update in updates.items():
        forward, backward = found.get(name, (0, ()))
        found[name] = forward + update, backward
    return found


def slowness(speeds: Sequence[float], most: int) -> tuple[int, ...]:
    """What costs are multiplied with on each lane: whole numbers, so that they stay exact, in the ratio of the speeds.

    most: the largest that there is room for. Ratios of small numbers are exact; others are rounded to a common unit
    """
    ratios = [(Fraction(max(speeds)) / Fraction(speed)).limit_denominator(10**6) for speed in speeds]
    unit = math.lcm(*(ratio.denominator for ratio in ratios))
    if unit * max(ratios) > most:
        unit = max(1, int(most / max(ratios)))
    return tuple(min(most, round(unit * ratio)) for ratio in ratios)


def average(charges: Sequence[Charge]) -> Charge:
    """For a stage whose lane is still open: the sum over all lanes, each at its speed, and the loosest limit."""
    if len({(charge.prices, charge.speed, charge.memory_limit) for charge in charges}) == 1:
        return charges[0]
    fastest = max(charge.speed for charge in charges)
    weights = [fastest / charge.speed for charge in charges]

    def total(parts: Sequence[int]) -> int:
        return sum(int(part * weight) for part, weight in zip(parts, weights, strict=True))

    def head(objective: Objective, features: Sequence[TensorSpec], signal: Signal) -> HeadCost:
        costs = [charge.head(objective, features, signal) for charge in charges]
        return dataclasses.replace(costs[0], flops=total([cost.flops for cost in costs]))

    amounts = {}
    for name in charges[0].graph.measures:
        measures = [charge.graph.measures[name] for charge in charges]
        pairs = [(threshold, int(cost * w)) for m, w in zip(measures, weights, strict=True)
                 for threshold, cost in m.backward_flops]  # fmt: skip
        amounts[name] = total([m.forward_flops for m in measures]), tuple(pairs)
    limits = [charge.memory_limit for charge in charges]
    loosest = None if None in limits else max(limit for limit in limits if limit is not None)
    criterion = total([charge.criterion for charge in charges])
    graph, recompute = charged(charges[0].graph, amounts), charges[0].recompute
    return Charge(graph, head, criterion, memory_limit=loosest, recompute=recompute)
