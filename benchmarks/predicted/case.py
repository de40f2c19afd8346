"""One network in K stages: how long its actions take here, and what K devices would make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import autodecouple
from autodecouple.cost import TableCost, measured
from autodecouple.graph import Graph
from autodecouple.schedules import GPipe, OneFOneB, Op, PipeDream, Schedule, Streaming
from autodecouple.timeline import Timeline
from tools import networks, steps
from tools.networks import Batch

STREAM = 100
"""Batches of a predicted stream, in which the pipeline is filled and drained once."""
WARM_UP = 1


@dataclass(frozen=True)
class Case:
    """K stages with local losses, and K coupled stages for each number of micro-batches and for whole batches under way
    at once; one thread runs them all.

    backprop: a step of the whole network
    batches:  of a measurement, behind those of the warm-up
    """

    backprop: steps.Step
    local: autodecouple.Decoupled
    coupled: Mapping[int, autodecouple.Decoupled]
    whole: autodecouple.Decoupled
    data: Sequence[Batch]
    batches: int

    @staticmethod
    def make(
        graph: Graph, n_stages: int, data: Sequence[Batch], batches: int, micro_batches: Sequence[int], cost: str
    ) -> Case:
        """Raises PartitionError where the legal cuts do not allow so many stages."""
        lanes = ["cpu"] * n_stages
        cut = partial(
            autodecouple.compile, graph, n_stages, devices=lanes, optimizer=networks.sgd, executor="inline", cost=cost
        )
        coupled = {count: cut("bp", schedule=OneFOneB(count)) for count in micro_batches}
        whole = cut("bp", schedule=PipeDream())
        return Case(steps.backprop(graph.model, data), cut(), coupled, whole, data, batches)

    @property
    def pipelines(self) -> Sequence[autodecouple.Decoupled]:
        return (self.local, self.whole, *self.coupled.values())

    def round(self) -> dict[str, float]:
        """Seconds per batch: of one device as measured, of K devices as predicted from the measured stage times."""
        found = {"backprop": steps.seconds_per_batch(self.backprop, WARM_UP, self.batches)}
        cost = self.measure(self.local)
        for name, schedule in {"barrier": Streaming(barrier=True), "streaming": Streaming()}.items():
            found[name] = predict(self.local, schedule, cost)
        for count, pipeline in self.coupled.items():
            cost = self.measure(pipeline)
            found[f"gpipe {count}"] = predict(pipeline, GPipe(count), joined_loss(cost, count))
            found[f"1f1b {count}"] = predict(pipeline, OneFOneB(count), cost)
        found["pipedream"] = predict(self.whole, PipeDream(), self.measure(self.whole))
        return found

    def measure(self, pipeline: autodecouple.Decoupled) -> TableCost:
        return measured(record(pipeline, self.data, self.batches))


def record(pipeline: autodecouple.Decoupled, data: Sequence[Batch], batches: int) -> Timeline:
    """The timeline of so many batches that begin and end with an empty pipeline."""
    steps.train(pipeline, data, WARM_UP)
    first = steps.train(pipeline, data, batches)
    timeline = pipeline.timeline
    return replace(timeline, spans=tuple(span for span in timeline.spans if span.batch >= first))


def joined_loss(cost: TableCost, count: int) -> TableCost:
    """The costs of micro-batches with one loss for all: 1F1B takes the loss of each, GPipe that of the batch."""
    return replace(cost, table={key: s * count if key[1] is Op.LOSS else s for key, s in cost.table.items()})


def predict(pipeline: autodecouple.Decoupled, schedule: Schedule, cost: TableCost) -> float:
    """Seconds per batch with a device for each stage, links that take no time, the pipeline's filling included."""
    return autodecouple.simulate(pipeline.plan, schedule, STREAM, cost).makespan / STREAM
