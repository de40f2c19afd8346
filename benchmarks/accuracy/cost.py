"""What a method costs on a network: parameters, memory as planned and as measured, FLOPs and time."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autodecouple
from autodecouple.plans import StageSpec
from tools.rounds import table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare
from accuracy.data import Data
from accuracy.journal import Outcome, once
from accuracy.recipes import FULL, QUICK
from accuracy.studies import Ground, Line
from accuracy.training import BACKPROP, train

METHODS = (
    BACKPROP, "auto", "downstream", "infopro", "dgl", "predsim", "supcon", "deinforeg", "associated", "early_exit",
)  # fmt: skip
NETWORKS = ("cifar10-vgg", "ag_news-lstm", "ag_news-transformer")
BATCHES = 30
"""That are timed: their median stands for all of an epoch."""


@dataclass(frozen=True)
class Cost:
    """Of one method on one network.

    trained:       parameters, heads included; inference: of the model alone; exits: of the model and of what it takes
                   to answer at every stage (of Associated Learning: its own inference and shortcuts), 0 without exits
    planned_bytes: of training on one device, stages one after the other; stage_bytes: of the largest stage, on a
                   device of its own; peak_bytes: measured on one device
    head_share:    of the heads in all FLOPs of training
    epoch_seconds: of the recipe's training rows, stages one after the other
    """

    method: str
    trained: int
    inference: int
    exits: int
    planned_bytes: int
    stage_bytes: int
    peak_bytes: int
    head_share: float
    epoch_seconds: float


def lines(quick: bool, methods: Sequence[str] = METHODS) -> tuple[Line, ...]:
    """With Adam and in float32, as the plans count."""
    recipes = {name: (QUICK if quick else FULL)[name] for name in NETWORKS}
    columns = {method: method for method in methods}
    how: dict[str, Any] = {"optimizer": "adam", "precision": "float32"}
    return tuple(Line(name, dataclasses.replace(each, **how), columns) for name, each in recipes.items())


def run(line: Line, seed: int, ground: Ground) -> list[Cost]:
    settings = ground.settings(line) | {"table": "cost", "seed": seed, "n_stages": line.n_stages}
    found = []
    for method in line.columns.values():
        make = partial(measure, line, method, seed, ground.rows(line, seed))
        found.append(Cost(**once(ground.path, settings | {"method": method}, make)))
        ground.show(f"{line.name}: {method}, {found[-1].epoch_seconds:.1f} s an epoch")
    return found


def measure(line: Line, method: str, seed: int, rows: Data) -> Outcome:
    """Train a few batches; the steps are timed by when the first parameter gets its gradient."""
    recipe, times = dataclasses.replace(line.recipe, epochs=1), []

    def watch(model: nn.Module) -> None:
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(lambda parameter: times.append(time.perf_counter()))

    few = dataclasses.replace(
        rows, train_x=rows.train_x[: BATCHES * recipe.batch], train_y=rows.train_y[: BATCHES * recipe.batch]
    )
    result = train(recipe, few, method, line.n_stages, seed, watch=watch)
    steps = [b - a for a, b in itertools.pairwise(times[2:])]  # memory is traced in the second, which is slow
    seconds = statistics.median(steps) * -(-len(rows.train_y) // recipe.batch)
    planned = _planned(line, method, seed, rows)
    found = Cost(method, result.trained, result.parameters, *planned, result.peak_bytes, result.head_share, seconds)
    return dataclasses.asdict(found)


def _planned(line: Line, method: str, seed: int, rows: Data) -> tuple[int, int, int]:
    """Before anything is trained: parameters of exits, bytes on one device and of the largest stage.

    Backprop is a plan of one stage.
    """
    torch.manual_seed(seed)
    model, example = line.recipe.model(rows), rows.train_x[: line.recipe.batch]
    _, objective = compare.method(method)
    n_stages, cut_at = (line.n_stages if objective else 1), line.recipe.cut_at
    how: dict[str, Any] = {"example_inputs": example, "schedule": "sequential", "devices": ["cpu"], "seed": seed}
    how |= {"cut_at": cut_at if len(cut_at) == n_stages - 1 else ()}
    with autodecouple.compile(model, n_stages, objective or BACKPROP, **how) as decoupled:
        stages, heads = decoupled.plan.stages, [stage.code.head for stage in decoupled.stages[:-1]]
    used = sum(map(_exit_parameters, heads))
    exits = sum(parameter.numel() for parameter in model.parameters()) + used if used else 0
    together = sum(map(_weights, stages)) + max(stage.step_bytes for stage in stages)
    return exits, together, max(stage.memory_bytes for stage in stages)


def _weights(stage: StageSpec) -> int:
    return stage.memory_bytes - stage.step_bytes


def _exit_parameters(head: nn.Module | None) -> int:
    """Of a head that gives scores; the encoder of targets is for training alone."""
    if head is None or not getattr(head, "predicts", False):
        return 0
    return sum(p.numel() for name, p in head.named_parameters() if not name.startswith("encoder."))


COLUMNS = (
    "method", "trained", "of heads", "inference", "with exits", "planned", "measured", "largest stage",
    "heads' FLOPs", "s/epoch",
)  # fmt: skip


def markdown(found: Sequence[Cost]) -> str:
    """A row per method; memory on one device as planned and as measured."""
    return table(COLUMNS, map(_row, found))


def _row(cost: Cost) -> tuple[str, ...]:
    counts = (cost.trained, cost.trained - cost.inference, cost.inference)
    numbers = [*(f"{count:,}" for count in counts), f"{cost.exits:,}" if cost.exits else ""]
    memory = [f"{size / 2**20:.1f} MiB" for size in (cost.planned_bytes, cost.peak_bytes, cost.stage_bytes)]
    return (f"`{cost.method}`", *numbers, *memory, f"{cost.head_share:.0%}", f"{cost.epoch_seconds:.1f}")
