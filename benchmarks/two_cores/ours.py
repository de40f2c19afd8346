"""autodecouple: two stages with SupCon, cut where the compiler cuts."""

from __future__ import annotations

import autodecouple
from autodecouple.executors import EXECUTORS
from autodecouple.schedules import Schedule
from entry import Entry, Unavailable
from tools import networks, steps

STAGES = 2


def train(entry: Entry, *, lanes: int, executor: str, schedule: Schedule) -> float:
    """Seconds per batch."""
    if executor not in EXECUTORS:
        raise Unavailable(f"this version has no executor {executor!r}; there are: {', '.join(EXECUTORS)}")
    batches = entry.network.batches()
    model = networks.in_a_row(entry.network.build())
    with autodecouple.compile(
        model,
        STAGES,
        example_inputs=batches[0][0],
        optimizer=networks.sgd,
        devices=["cpu"] * lanes,
        schedule=schedule,
        executor=executor,
        cost=entry.cost,
    ) as decoupled:
        return steps.seconds_per_batch(steps.decoupled(decoupled, batches), entry.warm_up, entry.batches)
