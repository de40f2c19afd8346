"""Cut anew in the middle of a run, by what its stages have taken so far."""

from __future__ import annotations

import dataclasses
import warnings

from autodecouple import states
from autodecouple.devices import Device
from autodecouple.errors import InputError
from autodecouple.options import Wish
from autodecouple.passes.candidates import keep_whole
from autodecouple.passes.charge import with_seconds
from autodecouple.passes.measuring.charges import Charge
from autodecouple.passes.measuring.observed import charge_observed, seconds_per_batch
from autodecouple.passes.partition import check_n_stages
from autodecouple.pipeline import Pipeline, arrange, build, lanes_of
from autodecouple.plans import Plan
from autodecouple.schedules import placed


def replan(pipeline: Pipeline, n_stages: int | None, min_gain: float) -> Pipeline | None:
    """A pipeline with other cuts that goes on where this one stands; None where nothing better was found.

    min_gain: how much faster the slowest lane has to become, as a share of what it takes; another number of stages is
              taken anyway
    Raises InputError where no batch was trained, or under torchrun; nothing has changed then. The old pipeline must be
    at rest, and must not be used afterwards.
    """
    if pipeline.options.executor == "distributed":
        raise InputError(
            "replan() sees the times of one process only: save, and compile again with plan=, on every process"
        )
    asked = _wish(pipeline, n_stages)
    wish = asked.placed(pipeline.graph)
    observed = seconds_per_batch(pipeline.executor.timeline)
    if not observed:
        raise InputError(
            "replan() goes by the time that stages have taken, and none was trained with this plan: train some"
        )
    charge = charge_observed(pipeline.graph, pipeline.plan, observed)
    charges = [dataclasses.replace(charge, speed=lane.speed, memory_limit=lane.memory_limit) for lane in lanes_of(wish)]
    candidates = keep_whole(pipeline.graph, pipeline.candidates, wish.no_split)
    found = with_seconds(arrange(pipeline.graph, candidates, wish, charges), charges, wish.objectives)
    found = placed(found, pipeline.options.schedule)
    if n_stages is None and not _is_better(found, pipeline, charge, min_gain):
        return None
    plan = dataclasses.replace(found, links=pipeline.plan.links if len(found.lanes) == len(pipeline.plan.lanes) else ())
    return _rebuilt(pipeline, dataclasses.replace(asked, plan=plan, n_stages=len(plan.stages)))


def _wish(pipeline: Pipeline, n_stages: int | None) -> Wish:
    """What was wished for, cuts and plan left open."""
    wish = pipeline.options.wish
    hidden = len(pipeline.plan.cuts)
    extra = bool(wish.detach_classifier)  # one more stage, on the lane before
    count = hidden + 1 - extra if n_stages is None else n_stages
    check_n_stages(count)
    objectives = wish.objectives
    if count - 1 + extra != hidden:
        if any(objective != objectives[0] for objective in objectives[1:]) or not objectives:
            raise InputError(
                f"n_stages={count} needs another list of objectives than loss= gave: compile again with one, and go on"
                " from state_dict()"
            )
        objectives = (objectives[0],) * (count - 1 + extra)
    return dataclasses.replace(
        wish,
        n_stages=count,
        objectives=objectives,
        devices=_devices(pipeline.plan, wish),
        cut_at=(),
        plan=None,
        cost="flops",
    )


def _devices(plan: Plan, wish: Wish) -> tuple[Device, ...]:
    """The lanes that were asked for, or those of the plan where the stages were placed or moved elsewhere."""
    used = [plan.stages[lane[0]] for lane in plan.lanes]
    if [stage.device for stage in used] == [device.name for device in wish.devices[: len(used)]]:
        return wish.devices
    return tuple(Device(stage.device, stage.speed) for stage in used)


def _is_better(found: Plan, pipeline: Pipeline, charge: Charge, min_gain: float) -> bool:
    """Whether the slowest lane gains enough; both plans at the same charges."""
    plan = pipeline.plan
    charges = [dataclasses.replace(charge, speed=plan.stages[lane[0]].speed) for lane in plan.lanes]
    now = with_seconds(plan, charges, pipeline.options.wish.placed(pipeline.graph).objectives)
    return _slowest_lane(found) < (1 - min_gain) * _slowest_lane(now)


def _slowest_lane(plan: Plan) -> float:
    return max(sum(plan.costs[index] for index in lane) for lane in plan.lanes)


def _rebuilt(pipeline: Pipeline, wish: Wish) -> Pipeline:
    """The pipeline of a plan, in the state of this one; if that fails, this one stays as it is."""
    options = dataclasses.replace(pipeline.options, wish=wish)
    new = build(pipeline.graph, None, None, options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", states.OtherCutsWarning)  # which is what was asked for
            states.restore(new, states.collect(pipeline, 0))
    except BaseException:
        new.executor.close(abort=True)
        raise
    pipeline.executor.close()
    return new
