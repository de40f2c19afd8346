"""Stages to lanes: each lane holds a contiguous run of stages, and the slowest lane is as fast as can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from autodecouple.devices import Device
from autodecouple.errors import InputError, PartitionError
from autodecouple.passes.partitioning.runs import StageRuns, minimise_slowest
from autodecouple.passes.partitioning.sums import RunSums
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
    runs = [_runs(row, memory, limit) for row, limit in zip(costs, limits, strict=True)]
    found = minimise_slowest(runs, [0] * (len(memory) - 1))
    if found is None:
        raise PartitionError(
            f"no run of stages fits the lanes' memory limits {list(limits)}: the stages take {list(memory)} bytes;"
            " raise a limit, reorder the devices, or take more stages or a smaller batch"
        )
    return [sum(cut < group for cut in found[1]) for group in range(len(memory))]


def _runs(costs: Sequence[int], memory: Sequence[int], limit: int | None) -> StageRuns:
    """What a lane may hold: to each group, the runs from the first start whose memory is not too much."""
    groups, nothing = torch.arange(len(costs)), torch.zeros(len(costs), dtype=torch.int64)
    sums = RunSums(torch.tensor(costs, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
    taken = torch.tensor([0, *memory], dtype=torch.int64).cumsum(0)
    first = nothing if limit is None else torch.searchsorted(taken, taken[1:] - limit)
    runs = StageRuns(sums, groups, first, groups, nothing)
    return runs.where(first <= groups)


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
