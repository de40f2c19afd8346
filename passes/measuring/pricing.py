"""What the partition balances: FLOPs, unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective
from autodecouple.passes.measure import head_cost
from autodecouple.plans import TensorSpec

NodePrice = tuple[int, tuple[tuple[int, int], ...]]
"""(forward, backward): whole numbers from 0 on; backward by thresholds, as in `Measure.backward_flops`."""


@dataclass(frozen=True)
class Pricing:
    """What a stage costs where it will run, in whole numbers of one unit: FLOPs, nanoseconds.

    node:         price of an operation
    head:         price of a training step of an objective's head that reads these features
    criterion:    price of the loss of the last stage
    slowness:     what all of it is multiplied with (and rounded down), beside stages that run elsewhere
    memory_limit: bytes that a stage may take there
    """

    node: Callable[[fx.Node], NodePrice]
    head: Callable[[Objective, Sequence[TensorSpec]], int]
    criterion: int = 0
    slowness: float = 1.0
    memory_limit: int | None = None


def by_flops(graph: Graph) -> Pricing:
    """FLOPs of a training step at the example batch."""

    def node(node: fx.Node) -> NodePrice:
        measure = graph.measures[node.name]
        return measure.forward_flops, measure.backward_flops

    def head(objective: Objective, features: Sequence[TensorSpec]) -> int:
        return head_cost(objective, features, graph.signal).flops

    return Pricing(node, head)
