"""How far the simulator is off on this machine: two stages on two threads, measured and predicted."""

from __future__ import annotations

from collections.abc import Sequence

import autodecouple
from autodecouple.graph import Graph
from case import record
from tools import networks
from tools.networks import Batch


def compare(graph: Graph, data: Sequence[Batch], batches: int, rounds: int, cost: str) -> list[dict[str, float]]:
    """Seconds of each round's makespan: measured, and predicted from the stage times.

    "predicted":   with the times of the same run, so that only waiting is predicted
    "from inline": with the times of one thread, so that what two threads cost each other is missing
    """
    cut = {"devices": ["cpu", "cpu"], "optimizer": networks.sgd, "cost": cost}
    found = []
    with (
        autodecouple.compile(graph, 2, executor="streams", **cut) as streams,
        autodecouple.compile(graph, 2, executor="inline", **cut) as inline,
    ):
        for _ in range(rounds):
            alone, together = record(inline, data, batches), record(streams, data, batches)
            sources = {"predicted": together, "from inline": alone}
            predicted = {
                name: autodecouple.simulate(streams.plan, batches=batches, cost=source).makespan
                for name, source in sources.items()
            }
            found.append({"measured": together.makespan, **predicted})
    return found
