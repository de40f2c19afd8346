"""Stages to lanes: each lane holds a contiguous run of stages, and the slowest lane is as fast as can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from autodecouple.errors import InputError
from autodecouple.passes.partitioning.runs import StageRuns, minimise_slowest
from autodecouple.passes.partitioning.sums import RunSums
from autodecouple.plans import Plan


def assign_lanes(plan: Plan, devices: Sequence[str] | None = None, *, glued: Sequence[int] = ()) -> Plan:
    """The plan with a lane and a device for every stage.

    devices: the lanes, one entry each ("cuda:0" twice is two streams of one GPU); None is every visible GPU, or else
             one CPU lane per thread that torch may use
    glued:   stages that share the lane of the stage before them
    More lanes than stages leave the last ones out.
    """
    names = default_devices() if devices is None else [check_device(device) for device in devices]
    if not names:
        raise InputError('devices is empty; name at least one lane, like devices=["cpu"]')
    loose = [index for index in range(len(plan.stages)) if index == 0 or index not in glued]
    ends = [following - 1 for following in loose[1:]] + [len(plan.stages) - 1]
    groups = [plan.stages[begin : end + 1] for begin, end in zip(loose, ends, strict=True)]
    lane_of = _lanes([sum(stage.flops for stage in group) for group in groups], min(len(names), len(groups)))
    stages = [
        dataclasses.replace(stage, lane=lane, device=names[lane])
        for group, lane in zip(groups, lane_of, strict=True)
        for stage in group
    ]
    return dataclasses.replace(plan, stages=tuple(stages))


def _lanes(costs: Sequence[int], num_lanes: int) -> list[int]:
    """Lane of each group: contiguous runs with the smallest largest sum, by the dynamic programme of the cuts."""
    groups, nothing = torch.arange(len(costs)), torch.zeros(len(costs), dtype=torch.int64)
    sums = RunSums(torch.tensor(costs, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
    found = minimise_slowest([StageRuns(sums, groups, nothing, groups, nothing)] * num_lanes, [0] * (len(costs) - 1))
    assert found is not None
    return [sum(cut < group for cut in found[1]) for group in range(len(costs))]


def default_devices() -> list[str]:
    """Every visible GPU, or else one CPU lane per core that torch may use."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return gpus or ["cpu"] * torch.get_num_threads()


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
