"""The state of the stages' optimizers and schedulers by parameter, so that it survives other cuts.

    saved:   stage 0 {a, b}, stage 1 {c, d}        every parameter has a home: the stage and group it was saved in
                     |  |            |  |
    here:    stage 0 {a}, stage 1 {b, c}, stage 2 {d}

A group whose parameters come home from groups with other values (two learning rates meet) is parted into several.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autodecouple.errors import CheckpointError
from autodecouple.stage import Stage

Keys = Mapping[int, str]
"""The key of each parameter, by its id."""
Home = tuple[int, int]
"""Saved stage and group."""
Parts = list[tuple[Home | None, list[nn.Parameter]]]
"""Groups to be, each with the home of its values; None where they stay as compiled."""

PER_GROUP = frozenset(("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas"))
"""What torch's schedulers keep as a list with one entry per group."""


def memories(stage: Stage, keys: Keys) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter: moments, step counts."""
    if stage.optimizer is None:
        return {}
    owners = [parameter for group in stage.optimizer.param_groups for parameter in group["params"]]
    state = stage.optimizer.state_dict()["state"]
    return {keys[id(owner)]: dict(state[index]) for index, owner in enumerate(owners) if state.get(index)}


def progress(stage: Stage, keys: Keys) -> dict[str, Any]:
    """Values per group, the scheduler, and the accumulation under way: plain data, parameters by their keys."""
    groups = stage.optimizer.param_groups if stage.optimizer is not None else []
    return {
        "optimizer": _kind(stage.optimizer),
        "groups": [{**group, "params": [keys[id(p)] for p in group["params"]]} for group in groups],
        "scheduler": _kind(stage.scheduler),
        "schedule": stage.scheduler.state_dict() if stage.scheduler is not None else None,
        "pending": stage.pending,
        "skipped": stage.skipped,
    }


def _kind(part: object) -> str | None:
    return None if part is None else type(part).__name__


@dataclass(frozen=True)
class Saved:
    """What was saved of the parameters that come back.

    stages: what `progress` gave of each; memories: of each parameter, by its key; homes: where each was
    """

    stages: Sequence[Mapping[str, Any]]
    memories: Mapping[str, Mapping[str, Any]]
    homes: Mapping[str, Home]

    @staticmethod
    def of(state: Mapping[str, Any], returns: Callable[[str], bool]) -> Saved:
        stages = state["stages"]
        groups = [((i, j), group) for i, stage in enumerate(stages) for j, group in enumerate(stage["groups"])]
        homes = {key: home for home, group in groups for key in group["params"] if returns(key)}
        return Saved(stages, {key: entry for key, entry in state["optim"].items() if returns(key)}, homes)

    def values(self, home: Home | None) -> dict[str, Any]:
        """The options of a saved group."""
        if home is None:
            return {}
        group = self.stages[home[0]]["groups"][home[1]]
        return {name: value for name, value in group.items() if name != "params"}

    def sources(self, stage: Stage, keys: Keys) -> list[int]:
        """Saved stages that a stage's parameters come from; the first that trains any where all of them are new."""
        found = [self.homes[keys[id(p)]][0] for p in stage.parameters if keys[id(p)] in self.homes]
        return list(dict.fromkeys(found)) or [next((i for i, s in enumerate(self.stages) if s["groups"]), 0)]


def check(stage: Stage, keys: Keys, saved: Saved) -> None:
    """Raises CheckpointError where another kind of optimizer or scheduler trained the stage's parameters."""
    if stage.optimizer is None:
        return
    for i in saved.sources(stage, keys):
        for what, mine in (("scheduler", stage.scheduler), ("optimizer", stage.optimizer)):
            if saved.stages[i][what] != _kind(mine):
                raise CheckpointError(
                    f"stage {i} was saved with {what} {saved.stages[i][what]}, but stage {stage.index} here has"
                    f" {_kind(mine)}: pass the same {what}="
                )


def put_back(stage: Stage, keys: Keys, saved: Saved) -> None:
    """Give the stage's optimizer and scheduler what was saved of its parameters.

    A scheduler goes on from that of the first stage that parameters come from.
    """
    sources = saved.sources(stage, keys)
    stage.pending = max(saved.stages[i]["pending"] for i in sources)
    stage.skipped = max(saved.stages[i]["skipped"] for i in sources)
    if stage.optimizer is None:
        return
    parts = _parts(stage, keys, saved)
    if len(parts) != len(stage.optimizer.param_groups):
        _regroup(stage, parts)
    stage.optimizer.load_state_dict(_optimizer_state(stage, keys, saved, parts))
    schedule = _schedule([home for home, _ in parts], saved)
    if stage.scheduler is not None and schedule is not None:
        stage.scheduler.load_state_dict(copy.deepcopy(schedule))


def _parts(stage: Stage, keys: Keys, saved: Saved) -> Parts:
    """The stage's groups, parted where values differ.

    New parameters go with the first known one of their group, or, where there is none, with the group of that number
    in the stage that the others come from.
    """
    assert stage.optimizer is not None
    source = saved.sources(stage, keys)[0]
    alike = len(saved.stages[source]["groups"]) == len(stage.optimizer.param_groups)
    parts: Parts = []
    for index, group in enumerate(stage.optimizer.param_groups):
        homes = [saved.homes.get(keys[id(parameter)]) for parameter in group["params"]]
        other = (source, index) if alike else None
        default = next((home for home in homes if home is not None), other)
        parts += _part(group["params"], [home or default for home in homes], saved)
    return parts


def _part(params: list[nn.Parameter], homes: list[Home | None], saved: Saved) -> Parts:
    """One group, parted by the values at its parameters' homes."""
    same: dict[Home | None, Home | None] = {}
    parts: dict[Home | None, list[nn.Parameter]] = {}
    for parameter, home in zip(params, homes, strict=True):
        if home not in same:
            alike = (other for other in parts if _equal(saved.values(other), saved.values(home)))
            same[home] = next(alike, home)
        parts.setdefault(same[home], []).append(parameter)
    return list(parts.items())


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Of options, which may be tensors (a learning rate)."""
    return a.keys() == b.keys() and all(
        torch.equal(x, b[k]) if isinstance(x, torch.Tensor) and isinstance(b[k], torch.Tensor) else x == b[k]
        for k, x in a.items()
    )


def _regroup(stage: Stage, parts: Parts) -> None:
    """Part the optimizer's groups; a scheduler keeps lists with an entry per group, so it is made anew."""
    assert stage.optimizer is not None
    options = {id(p): group for group in stage.optimizer.param_groups for p in group["params"]}
    stage.optimizer.param_groups = [{**options[id(params[0])], "params": params} for _, params in parts]
    if stage.scheduler is not None:
        assert stage.training.scheduler is not None
        stage.scheduler = stage.training.scheduler(stage.optimizer)


def _optimizer_state(stage: Stage, keys: Keys, saved: Saved, parts: Parts) -> dict[str, Any]:
    """In the form that the optimizer loads: parameters are numbers, in the order of the groups."""
    assert stage.optimizer is not None
    params = [parameter for _, part in parts for parameter in part]
    numbers = {id(parameter): number for number, parameter in enumerate(params)}
    groups = [
        {**group, **copy.deepcopy(saved.values(home)), "params": [numbers[id(p)] for p in part]}
        for group, (home, part) in zip(stage.optimizer.param_groups, parts, strict=True)
    ]
    known = [p for p in params if keys[id(p)] in saved.memories]
    return {"state": {numbers[id(p)]: _own(saved.memories[keys[id(p)]], p) for p in known}, "param_groups": groups}


def _own(entry: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Copies, since optimizers keep the tensors that they load; moments lie in memory as their parameter does."""
    copied: dict[str, Any] = copy.deepcopy(dict(entry))
    for name, value in copied.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape == parameter.shape:
            copied[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
    return copied


def _schedule(homes: list[Home | None], saved: Saved) -> Any:
    """The state of a scheduler over groups with these homes; None where nothing of it is known."""
    first = next((home for home in homes if home is not None), None)
    if first is None:
        return None
    whole = [(first[0], group) for group in range(len(saved.stages[first[0]]["groups"]))]
    if homes == whole:
        return saved.stages[first[0]]["schedule"]
    known = [home or first for home in homes]
    return _joined([saved.stages[i]["schedule"] for i, _ in known], [group for _, group in known])


def _joined(schedules: list[Any], groups: list[int]) -> Any:
    """A scheduler's state with one entry per group, each from its own saved schedule; the rest is the first one's."""
    first = schedules[0]
    if isinstance(first, list):  # of schedulers in a row
        return [_joined([each[n] for each in schedules], groups) for n in range(len(first))]
    if type(first) is not dict:
        return first
    return {
        name: [each[name][group] for each, group in zip(schedules, groups, strict=True)]
        if name in PER_GROUP and isinstance(value, list)
        else _joined([each[name] for each in schedules], groups)
        for name, value in first.items()
    }
