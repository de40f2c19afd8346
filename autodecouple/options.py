"""What the user asks for, checked before anything is captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autodecouple import objectives, schedules
from autodecouple.backends import EAGER, Backend
from autodecouple.devices import Device
from autodecouple.errors import InputError, PlanError
from autodecouple.executors import EXECUTORS
from autodecouple.executors.world import one_lane_per_rank, world_size
from autodecouple.graph import Graph
from autodecouple.objectives import Objective
from autodecouple.objectives.loco import without_overlap
from autodecouple.passes.carry import place_objectives
from autodecouple.passes.measuring.updates import MakeOptimizer
from autodecouple.passes.partition import check_n_stages
from autodecouple.passes.place import check_lane, default_devices
from autodecouple.plans import Plan
from autodecouple.replication import DataParallel
from autodecouple.schedules import Schedule, Sequential
from autodecouple.stage import Training

COSTS = ("flops", "measured")
"""What may balance the stages."""

Loss = str | Objective | Sequence[str | Objective]


@dataclass(frozen=True)
class Capturing:
    """How a model is captured.

    mode:    "train", or "eval" for a model that can only be captured so: it then trains as it evaluates
    dynamic: dimensions, beside the batch, that may differ from the example's (1 for sequences of any length)
    tied:    parameters under several names: "together" in one stage, or "untie" into one for each name
    """

    mode: str = "train"
    dynamic: tuple[int, ...] = ()
    tied: str = "together"

    def __post_init__(self) -> None:
        if self.mode not in ("train", "eval"):
            raise InputError(f'mode must be "train" or "eval", not {self.mode!r}')
        if self.tied not in ("together", "untie"):
            raise InputError(f'tied must be "together" or "untie", not {self.tied!r}')
        if not all(isinstance(dim, int) and dim > 0 for dim in self.dynamic):
            raise InputError(f"dynamic={self.dynamic!r} must hold dimensions from 1 on; 0 is the batch")


@dataclass(frozen=True)
class Wish:
    """What a plan is asked to be; `n_stages` counts without the extra stage of a detached classifier.

    optimizer: whose time counts where the cost is measured
    notes:     what was chosen where the choice was left open, and why
    """

    n_stages: int
    objectives: tuple[Objective, ...]
    devices: tuple[Device, ...]
    cut_at: tuple[str, ...] = ()
    memory_limit: int | None = None
    no_split: tuple[str, ...] = ()
    detach_classifier: bool | str = False
    plan: Plan | None = None
    cost: str = "flops"
    recompute: bool = False
    optimizer: MakeOptimizer | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def checked(
        n_stages: int | None,
        loss: Loss,
        devices: Sequence[Any] | None,
        *,
        cost: str = "flops",
        cut_at: Sequence[str] = (),
        memory_limit: int | None = None,
        no_split: Sequence[str] = (),
        detach_classifier: bool | str = False,
        plan: Plan | None = None,
        recompute: bool = False,
        optimizer: MakeOptimizer | None = None,
    ) -> Wish:
        """Raises InputError, PartitionError or PlanError for what can be refused without the model."""
        if cost not in COSTS:
            raise InputError(f"cost={cost!r} is not known; there are: {', '.join(map(repr, COSTS))}")
        for field, names in (("cut_at", cut_at), ("no_split", no_split)):
            if isinstance(names, str):
                raise InputError(f"{field}={names!r} is a string; pass a list of names: [{names!r}]")
        if plan is not None and not isinstance(plan, Plan):
            raise PlanError(f"plan={plan!r} is no Plan; read JSON with Plan.from_json(text)")
        lanes = tuple(map(check_lane, default_devices() if devices is None else devices))
        if not lanes:
            raise InputError('devices is empty; name at least one lane, like devices=["cpu"]')
        if n_stages is None:
            given = plan is not None or cut_at
            n_stages = (len(plan.stages) if plan is not None else len(cut_at) + 1) if given else len(lanes)
        check_n_stages(n_stages)
        if plan is not None and len(plan.stages) != n_stages:
            raise PlanError(f"the plan has {len(plan.stages)} stages, but n_stages={n_stages}")
        hidden = n_stages if detach_classifier and plan is None else n_stages - 1
        found = objectives.resolve(loss, hidden)
        if hidden == n_stages and found[-1].name == "bp":
            raise InputError(
                f"detach_classifier={detach_classifier!r} trains the classifier on detached features, but"
                ' loss="bp" couples it to the stage before it: leave one of the two out, or name a local loss for that'
                ' stage, the last of a list, like "supcon"'
            )
        recompute = recompute or (plan is not None and plan.recompute)
        levers = tuple(cut_at), memory_limit, tuple(no_split), detach_classifier
        return Wish(n_stages, found, lanes, *levers, plan, cost, recompute, optimizer)

    def placed(self, graph: Graph) -> Wish:
        """The wish with objectives that know where they stand, and what enters the model."""
        objectives = self.objectives
        if self.detach_classifier:
            objectives = (*objectives[:-1], without_overlap(objectives[-1]))
        return dataclasses.replace(self, objectives=place_objectives(objectives, graph))


@dataclass(frozen=True)
class Options:
    """All that `compile` was told, beside the model."""

    capturing: Capturing
    wish: Wish
    training: Training
    criterion: Callable[[Any, Any], torch.Tensor] | None
    schedule: Schedule
    executor: str
    seed: int
    backend: Backend = EAGER

    @staticmethod
    def checked(
        capturing: Capturing,
        wish: Wish,
        training: Training,
        criterion: Callable[[Any, Any], torch.Tensor] | None,
        schedule: str | Schedule,
        executor: str | None,
        seed: int,
        backend: Backend = EAGER,
    ) -> Options:
        if criterion is not None and not callable(criterion):
            raise InputError(f"criterion={criterion!r} is not callable; pass a loss like nn.CrossEntropyLoss()")
        if training.data_parallel.replicas > 1 and backend.name != EAGER.name:
            raise InputError(
                f"backend={backend.name!r} draws the masks of one process's rows, and cannot share those of the global"
                ' batch among replicas: take backend="eager" with data_parallel='
            )
        found = schedules.resolve(schedule)
        executor = choose_executor(executor, found)
        if hasattr(found, "lag"):
            _check_in_flight(found, executor, training.data_parallel, backend)
        return Options(capturing, wish, training, criterion, found, executor, seed, backend)


def choose_executor(executor: str | None, schedule: Schedule) -> str:
    """The executor asked for, or the one that suits where the script runs; raises InputError for an unknown name."""
    if executor is not None:
        if executor not in EXECUTORS:
            raise InputError(f"executor={executor!r} is not known; there are: {', '.join(EXECUTORS)}")
        return executor
    if isinstance(schedule, Sequential):
        return "inline"
    return "distributed" if world_size() > 1 else "streams"


def _check_in_flight(schedule: Schedule, executor: str, data: DataParallel, backend: Backend) -> None:
    """Raises InputError for what cannot hold several batches between their forward and their backward."""
    name = type(schedule).__name__
    if executor == "processes":
        raise InputError(
            f'{name} leaves batches in flight between two steps, which the workers of executor="processes" do not hold:'
            ' take executor="streams", or torchrun'
        )
    if backend.name != EAGER.name:
        raise InputError(
            f"{name} runs each batch on its own version of the weights, which backend={backend.name!r} cannot swap:"
            ' take backend="eager"'
        )
    if data.replicas > 1:
        raise InputError(
            f"{name} has no replicas: take data_parallel=1, or another schedule for coupled stages, such as"
            ' schedule="1f1b"'
        )


def choose_devices(devices: Sequence[Any] | None, executor: str, data: DataParallel) -> Sequence[Any] | None:
    """One lane per process where processes train, unless lanes are named."""
    if data.replicas > 1 and executor != "distributed":
        raise InputError(
            f"data_parallel={data.replicas} needs a process for every lane and replica, but executor={executor!r} is"
            " one process: start the script with torchrun (or, in one process, take a larger batch)"
        )
    return one_lane_per_rank(data) if devices is None and executor == "distributed" else devices


def check_training(training: Training) -> Training:
    """Raises InputError naming the first field that no training could use."""
    if isinstance(training.accumulate, bool) or not isinstance(training.accumulate, int) or training.accumulate < 1:
        raise InputError(f"accumulate must be a positive integer, not {training.accumulate!r}")
    if training.clip_grad_norm is not None and not training.clip_grad_norm > 0:
        raise InputError(f"clip_grad_norm must be positive or None, not {training.clip_grad_norm!r}")
    if training.on_nonfinite not in ("raise", "skip", "ignore"):
        raise InputError(f'on_nonfinite must be "raise", "skip" or "ignore", not {training.on_nonfinite!r}')
    if not callable(training.optimizer):
        raise InputError(
            f"optimizer={training.optimizer!r} must be a function from parameters to an optimizer, since every stage"
            " has its own: optimizer=lambda params: torch.optim.Adam(params, lr=1e-3)"
        )
    return training


def check_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, but is {type(model).__name__}")
    return model
