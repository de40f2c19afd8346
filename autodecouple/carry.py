"""From one pipeline to another over the same model: all that training goes on from, matched by parameter.

The model's parameters and buffers are the same objects in both. What has to be carried is what belongs to stages: heads
whose cut stays, the optimizer's state of each parameter, the values of its group, the scheduler, the batches that wait
for their update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from autodecouple.errors import InputError
from autodecouple.pipeline import Pipeline
from autodecouple.stage import Stage

Sources = Mapping[torch.nn.Parameter, tuple[Stage, torch.nn.Parameter]]
"""By parameter of the new pipeline: the stage that trained it, and the parameter there."""


def carry_over(old: Pipeline, new: Pipeline) -> None:
    """Let the new pipeline go on where the old one stands.

    Raises InputError, before anything changes, where stages that now share an optimizer's group, or an update, stood at
    different places.
    """
    sources = _sources(old, new)
    for stage in new.stages:
        _check(stage, sources)
    for before, after in _kept_heads(old, new):
        assert before.code.head is not None and after.code.head is not None
        after.code.head.load_state_dict(before.code.head.state_dict())
    for stage in new.stages:
        _carry_stage(stage, sources)


def _kept_heads(old: Pipeline, new: Pipeline) -> list[tuple[Stage, Stage]]:
    """Stages, before and after, whose heads read the same at the same cut for the same objective."""
    objectives = [pipeline.options.wish.objectives for pipeline in (old, new)]
    before = {cut.after: index for index, cut in enumerate(old.plan.cuts) if cut.detached}
    return [
        (old.stages[was], new.stages[now])
        for now, cut in enumerate(new.plan.cuts)
        if cut.detached
        and (was := before.get(cut.after)) is not None
        and old.plan.cuts[was].features == cut.features
        and objectives[0][was] == objectives[1][now]
    ]


def _sources(old: Pipeline, new: Pipeline) -> Sources:
    owners = {parameter: stage for stage in old.stages for parameter in stage.parameters}
    sources = {p: (owners[p], p) for stage in new.stages for p in stage.parameters if p in owners}
    for before, after in _kept_heads(old, new):
        assert before.code.head is not None and after.code.head is not None
        pairs = zip(before.code.head.parameters(), after.code.head.parameters(), strict=True)
        sources |= {now: (before, was) for was, now in pairs}
    return sources


def _group(source: Stage, parameter: torch.nn.Parameter) -> int | None:
    """The number of the optimizer's group that holds a parameter."""
    groups = source.optimizer.param_groups if source.optimizer is not None else []
    return next((i for i, group in enumerate(groups) if any(p is parameter for p in group["params"])), None)


def _known(parameters: Iterable[torch.nn.Parameter], sources: Sources) -> list[tuple[Stage, int]]:
    """The stages and their groups that parameters come from, those left out that are new."""
    found = [(sources[p][0], _group(*sources[p])) for p in parameters if p in sources]
    return [(source, number) for source, number in found if number is not None]


def _values(source: Stage, number: int) -> dict[str, Any]:
    """What a group says: its learning rate, and whatever else."""
    assert source.optimizer is not None
    return {name: value for name, value in source.optimizer.param_groups[number].items() if name != "params"}


def _check(stage: Stage, sources: Sources) -> None:
    found = [sources[parameter][0] for parameter in stage.parameters if parameter in sources]
    if len({source.pending for source in found}) > 1:
        raise InputError(
            f"stages that stage {stage.index} would be made of have gathered gradients of different numbers of batches,"
            " since one left a batch out: replan after the next update"
        )
    for group in stage.optimizer.param_groups if stage.optimizer is not None else ():
        values = [_values(*origin) for origin in dict.fromkeys(_known(group["params"], sources))]
        for other in values[1:]:
            if different := [name for name in values[0] if not _equal(values[0][name], other.get(name))]:
                name = different[0]
                raise InputError(
                    f"parameters that would share a group of stage {stage.index}'s optimizer have had different values"
                    f" of {name!r}, {values[0][name]} and {other.get(name)}: give them equal ones before, or groups of"
                    " their own in optimizer="
                )


def _carry_stage(stage: Stage, sources: Sources) -> None:
    found = [sources[parameter] for parameter in stage.parameters if parameter in sources]
    stage.pending = next((source.pending for source, _ in found), 0)
    stage.skipped = max((source.skipped for source, _ in found), default=0)
    for parameter in stage.parameters:
        if parameter in sources and (gradient := sources[parameter][1].grad) is not None:
            parameter.grad = gradient.to(parameter.device)
    if stage.optimizer is None:
        return
    if found and stage.scheduler is not None and found[0][0].scheduler is not None:
        stage.scheduler.load_state_dict(_regrouped(found[0][0], stage, sources))
    for group in stage.optimizer.param_groups:  # behind the scheduler, which has set them as for a first step
        for origin in _known(group["params"], sources)[:1]:
            group.update(copy.deepcopy(_values(*origin)))
        for parameter in group["params"]:
            if parameter in sources:
                _carry_state(stage, parameter, *sources[parameter])


def _carry_state(stage: Stage, parameter: torch.nn.Parameter, source: Stage, before: torch.nn.Parameter) -> None:
    """The optimizer's state of one parameter; what is as large as the parameter lies where it does."""
    assert stage.optimizer is not None and source.optimizer is not None
    state = source.optimizer.state.get(before, {})
    if state:
        stage.optimizer.state[parameter] = {
            name: value.to(parameter.device) if _shaped_like(value, before) else value for name, value in state.items()
        }


def _regrouped(source: Stage, stage: Stage, sources: Sources) -> dict[str, Any]:
    """A scheduler's state, its lists with one entry per group of the optimizer in the order of the new groups."""
    assert stage.optimizer is not None and source.optimizer is not None and source.scheduler is not None
    state, count = source.scheduler.state_dict(), len(source.optimizer.param_groups)
    origins = [next((n for _, n in _known(g["params"], sources)), 0) for g in stage.optimizer.param_groups]
    listed = {name: value for name, value in state.items() if isinstance(value, list) and len(value) == count}
    return copy.deepcopy(state | {name: [value[n] for n in origins] for name, value in listed.items()})


def _shaped_like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return bool(a == b)
