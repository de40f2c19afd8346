"""Stages to lanes: each lane holds a contiguous run of stages, and the slowest lane is as fast as can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from autodecouple.devices import Device
from autodecouple.errors import InputError, PartitionError
from autodecouple.passes.measuring.stage_costs import FORBIDDEN
from autodecouple.passes.partition import Problem, minimise_slowest
from autodecouple.plans import Plan


def assign_lanes(
    plan: Plan,
    devices: Sequence[str | Device] | None = None,
    *,
    glued: Sequence[int] = (),
    costs: Sequence[Sequence[int]] = (),
) -> Plan:
    """The plan with a lane and a device for every stage.

    devices: the lanes, one entry each ("cuda:0" twice is two streams of one GPU); None is every visible GPU, or else
             one CPU lane per thread that torch may use
    glued:   stages that share the lane of the stage before them
    costs:   of every stage on every lane, [lane][stage]; () is their FLOPs on all
    More lanes than stages leave the last ones out. Raises PartitionError where no run of stages fits the lanes' memory.
    """
    lanes = [check_lane(device) for device in (default_devices() if devices is None else devices)]
    if not lanes:
        raise InputError('devices is empty; name at least one lane, like devices=["cpu"]')
    loose = [index for index in range(len(plan.stages)) if index == 0 or index not in glued]
    lanes = lanes[: len(loose)]
    costs = [list(row) for row in costs] or [[stage.flops for stage in plan.stages]] * len(lanes)
    spans = list(zip(loose, [*loose[1:], len(plan.stages)], strict=True))  # stages that stay together
    sums = [[sum(row[begin:end]) for begin, end in spans] for row in costs[: len(lanes)]]
    memory = [sum(stage.memory_bytes for stage in plan.stages[begin:end]) for begin, end in spans]
    lane_of = _lanes(sums, memory, [lane.memory_limit for lane in lanes])
    stages = [
        dataclasses.replace(stage, lane=lane, device=lanes[lane].name, speed=lanes[lane].speed)
        for (begin, end), lane in zip(spans, lane_of, strict=True)
        for stage in plan.stages[begin:end]
    ]
    return dataclasses.replace(plan, stages=tuple(stages))


def _lanes(costs: Sequence[Sequence[int]], memory: Sequence[int], limits: Sequence[int | None]) -> list[int]:
    """Lane of each group: contiguous runs with the smallest largest sum, by the dynamic programme of the cuts.

    costs: [lane][group]; memory: bytes of each group; limits: of each lane
    """
    count = len(memory)
    bodies = [_runs(row) for row in costs]
    for body, limit in zip(bodies, limits, strict=True):
        if limit is not None:
            body[_runs(memory) > limit] = FORBIDDEN
    cuts = minimise_slowest(Problem(tuple(bodies), (0,) * (count - 1)))
    if cuts is None:
        raise PartitionError(
            f"no run of stages fits the lanes' memory limits {list(limits)}: the stages take {list(memory)} bytes;"
            " raise a limit, reorder the devices, or take more stages or a smaller batch"
        )
    return [sum(cut < group for cut in cuts) for group in range(count)]


def _runs(parts: Sequence[int]) -> torch.Tensor:
    """(ends, starts) sums of the parts from start to end; no run ends before it starts."""
    sums = torch.tensor([0, *parts], dtype=torch.int64).cumsum(0)
    body = sums[1:, None] - sums[None, :-1]
    body[torch.arange(len(parts))[:, None] < torch.arange(len(parts))[None, :]] = FORBIDDEN
    return body


def default_devices() -> list[str]:
    """Every visible GPU, or else one CPU lane per core that torch may use."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return gpus or ["cpu"] * torch.get_num_threads()


def check_lane(device: object) -> Device:
    """A lane, from a device or its name; raises InputError where that does not exist here."""
    if isinstance(device, Device):
        return dataclasses.replace(device, name=check_device(device.name))
    return Device(check_device(device))


def check_device(device: object) -> str:
    """The device's full name; raises InputError where it does not exist here."""
    try:
        found = torch.device(str(device))
    except RuntimeError as error:
        raise InputError(f"{device!r} is not a device; write 'cpu' or 'cuda:0'") from error
    if found.type == "cuda":
        index = found.index or 0
        if index >= torch.cuda.device_count():
            raise InputError(f"{device!r} was asked for, but {torch.cuda.device_count()} GPUs are visible")
        return f"cuda:{index}"
    return found.type if found.index is None else str(found)
