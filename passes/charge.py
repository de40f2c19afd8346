"""What every lane charges for a stage: FLOPs over its speed, or nanoseconds as they are measured on its device."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from autodecouple.devices import Device
from autodecouple.graph import Graph
from autodecouple.objectives.objective import Objective, at_cut, read_at, signal_of, tie_of
from autodecouple.passes.candidates import Candidate
from autodecouple.passes.measuring.charges import Charge, average, charged, slowness, with_updates
from autodecouple.passes.measuring.links import time_link
from autodecouple.passes.measuring.prices import Prices
from autodecouple.passes.measuring.timing import Bench, HeadTimes, time_criterion, time_nodes
from autodecouple.passes.measuring.updates import MakeOptimizer, UpdateTimes, charge_updates, time_updates
from autodecouple.passes.partitioning.runs import FORBIDDEN
from autodecouple.plans import Cut, Link, Plan, StageSpec


def charge_flops(graph: Graph, devices: Sequence[Device], recompute: bool = False) -> tuple[Charge, ...]:
    """One charge per lane."""
    charge = Charge(graph, recompute=recompute)
    return tuple(dataclasses.replace(charge, speed=lane.speed, memory_limit=lane.memory_limit) for lane in devices)


def charge_nanoseconds(
    graph: Graph,
    candidates: Sequence[Candidate],
    devices: Sequence[Device],
    example: Sequence[Any] = (),
    recompute: bool = False,
    optimizer: MakeOptimizer | None = None,
) -> tuple[Charge, ...]:
    """One charge per lane: every block between legal cuts is run on every device that is among them.

    example: flat inputs of the model where they are at hand; optimizer: None leaves out what it takes. CPU lanes share
    the threads that torch may use.
    """
    ends = [candidate.position for candidate in candidates if candidate.cut is not None]
    timed: dict[str, Charge] = {}
    for name in dict.fromkeys(device.name for device in devices):
        bench = bench_of(name, len(devices))
        times = UpdateTimes() if optimizer is None else time_updates(optimizer, bench)
        updates = charge_updates(graph, times)
        amounts = with_updates(time_nodes(graph, ends, bench, example), updates)
        head, criterion = HeadTimes(bench, times.per_byte), time_criterion(graph, bench)
        timed[name] = Charge(charged(graph, amounts), head, criterion, updates=updates, recompute=recompute)
    return tuple(
        dataclasses.replace(timed[device.name], speed=device.speed, memory_limit=device.memory_limit)
        for device in devices
    )


def bench_of(name: str, num_lanes: int) -> Bench:
    return Bench(torch.device(name), max(1, torch.get_num_threads() // num_lanes))


def time_links(devices: Sequence[Device]) -> tuple[Link, ...]:
    """From each lane to the next; links between devices of the same names once."""
    known: dict[tuple[str, str], Link] = {}
    pairs = [(source.name, target.name) for source, target in itertools.pairwise(devices)]
    for source, target in pairs:
        if (source, target) not in known:
            with bench_of(source, len(devices)).entered():
                known[source, target] = time_link(torch.device(source), torch.device(target))
    return tuple(known[pair] for pair in pairs)


def per_stage(charges: Sequence[Charge], n_stages: int, count: int) -> tuple[Charge, ...]:
    """The charge of each stage before lanes are assigned: its own lane's where every stage has one.

    n_stages counts without the stage of a detached classifier, which is on the lane before it; count counts with it.
    """
    if len(charges) < n_stages:
        return (average(charges),) * count
    return tuple(charges[min(stage, n_stages - 1)] for stage in range(count))


StageCost = tuple[int, int, int, int]
"""Forward, backward, head, update."""


def stage_costs(plan: Plan, charge: Charge, objectives: Sequence[Objective]) -> list[StageCost]:
    """Of every stage of the plan, at speed 1."""
    prices, found, stop = Prices.of(charge), [], 0
    ties = ["detached", *map(tie_of, objectives), "detached"]
    for index, stage in enumerate(plan.stages):
        start, stop = stop, stop + len(stage.nodes)
        spent = prices.stage(start, stop, ties[index], ties[index + 1])
        forward, backward = int(spent.forward.sum()), int(spent.backward.sum())
        update = sum(charge.updates.get(name, 0) for name in stage.nodes) if charge.updates else 0
        last = index == len(plan.cuts)
        head = charge.criterion if last else _head_cost(charge, plan.cuts[index], index, objectives)
        found.append((forward - update, backward, head, update))
    return found


def _head_cost(charge: Charge, cut: Cut, index: int, objectives: Sequence[Objective]) -> int:
    if not cut.detached:
        return 0
    placed, cut = at_cut(objectives[index], cut)
    return charge.head(placed, read_at(cut), signal_of(index, objectives, charge.graph.signal)).flops


def lane_costs(plan: Plan, charges: Sequence[Charge], objectives: Sequence[Objective]) -> list[list[int]]:
    """By lane: the cost of every stage there, as slow as the lane is."""
    known: dict[Any, list[int]] = {}  # lanes of equal devices share theirs
    for charge in charges:
        if charge.prices not in known:
            known[charge.prices] = [sum(parts) for parts in stage_costs(plan, charge, objectives)]
    dearest = max(1, *map(sum, known.values()))
    factors = slowness([charge.speed for charge in charges], (FORBIDDEN - 1) // dearest)
    return [[factor * cost for cost in known[c.prices]] for factor, c in zip(factors, charges, strict=True)]


def with_seconds(plan: Plan, charges: Sequence[Charge], objectives: Sequence[Objective]) -> Plan:
    """The plan with the seconds that each stage takes on its lane; the charges are in nanoseconds."""
    known = {charge.prices: stage_costs(plan, charge, objectives) for charge in charges}

    def timed(stage: StageSpec) -> StageSpec:
        charge = charges[stage.lane]
        forward, backward, head, update = (cost / 1e9 / charge.speed for cost in known[charge.prices][stage.index])
        return dataclasses.replace(
            stage, forward_seconds=forward, backward_seconds=backward, head_seconds=head, update_seconds=update
        )

    return dataclasses.replace(plan, stages=tuple(map(timed, plan.stages)))
