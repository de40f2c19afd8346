"""What each rank writes of a checkpoint: the stages that it trains, and rank 0 what belongs to none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodecouple.executors.ranks import Ranks
from autodecouple.flat import place_of
from autodecouple.pipeline import Pipeline
from autodecouple.states import LAST, parameter_keys

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Part:
    """One rank's part of a flat state.

    weights: names the file of its share of the model's own, if it has any; aliases: further names of any weights
    """

    rank: int
    flat: Mapping[str, Any]
    aliases: Mapping[str, str]
    weights: str | None = WEIGHTS

    def copied(self) -> Part:
        """On the CPU, so that training may go on at once."""
        flat = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            for name, value in self.flat.items()
        }
        return dataclasses.replace(self, flat=flat)


def part_of(flat: Mapping[str, Any], pipeline: Pipeline, ranks: Ranks) -> Part:
    """What this rank writes: all of it where it is alone."""
    aliases = flat["progress"]["aliases"]
    if ranks.size == 1:
        return Part(0, flat, aliases)
    stages = _stages(flat, pipeline)
    writers = {name: ranks.writer(stages[name]) if name in stages else 0 for name in flat}
    writers[f"loops.{ranks.rank}"] = ranks.rank
    own = {name: value for name, value in flat.items() if writers[name] == ranks.rank}
    holders = sorted({rank for name, rank in writers.items() if name.startswith("model.")})
    return Part(ranks.rank, own, aliases, _shard(holders, ranks.rank))


def _shard(holders: list[int], rank: int) -> str | None:
    """The name that other programs expect of a file that is one of several."""
    if rank not in holders:
        return None
    return f"model-{holders.index(rank) + 1:05d}-of-{len(holders):05d}.safetensors" if len(holders) > 1 else WEIGHTS


def _stages(flat: Mapping[str, Any], pipeline: Pipeline) -> dict[str, int]:
    """The stage that each name belongs to, where it belongs to any."""
    keys = parameter_keys(pipeline)
    parameters = {keys[id(parameter)]: stage.index for stage in pipeline.stages for parameter in stage.parameters}
    held = {place_of(t): stage.index for stage in pipeline.stages for t in (*stage.parameters, *stage.buffers)}
    heads = {cut.after: index for index, cut in enumerate(pipeline.plan.cuts)} | {LAST: len(pipeline.stages) - 1}

    def stage(name: str) -> int | None:
        section, _, rest = name.partition(".")
        match section:
            case "model":
                return held.get(place_of(flat[name]))
            case "heads":
                return heads[rest.partition(".")[0]]
            case "optim" | "gradients":
                return parameters.get(rest, parameters.get(rest.rpartition(".")[0]))
            case _:
                return int(rest) if section == "stages" else None

    found = {name: stage(name) for name in flat}
    return {name: index for name, index in found.items() if index is not None}
