"""The compiler's front: compile a model, decide a plan, simulate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autodecouple import schedules, simulator
from autodecouple.cost import Cost, FlopCost, measured
from autodecouple.decoupled import Decoupled
from autodecouple.options import Loss, Options, Wish, check_model, check_training
from autodecouple.passes.candidates import Candidate
from autodecouple.pipeline import analyse, decide
from autodecouple.plans import Plan
from autodecouple.schedules import Schedule
from autodecouple.stage import Training
from autodecouple.timeline import Timeline


def default_optimizer(params: list[nn.Parameter]) -> Optimizer:
    """Adam with a learning rate of 1e-3, as in the SCPL experiments."""
    return torch.optim.Adam(params, lr=1e-3)


def compile(
    model: nn.Module,
    n_stages: int | None = None,
    loss: Loss = "supcon",
    *,
    example_inputs: Any = None,
    criterion: Callable[[Any, Any], torch.Tensor] | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = default_optimizer,
    scheduler: Callable[[Optimizer], Any] | None = None,
    devices: Sequence[Any] | None = None,
    plan: Plan | None = None,
    schedule: str | Schedule = "streaming",
    cost: str = "flops",
    cut_at: Sequence[str] = (),
    memory_limit: int | None = None,
    detach_classifier: bool | str = False,
    clip_grad_norm: float | None = None,
    accumulate: int = 1,
    on_nonfinite: str = "raise",
    executor: str | None = None,
    seed: int = 0,
) -> Decoupled:
    """Cut an unmodified model into stages that train on local losses, and run them as a pipeline.

    n_stages:       None for one per device
    loss:           name or Objective of the hidden stages, or a list of one each; "bp" couples a stage to the next
    example_inputs: one batch as a tensor, tuple or dict; meta tensors do. None captures at the first batch
    criterion:      (output, target) -> scalar loss of the last stage; None is cross-entropy on the logits
    optimizer:      parameters -> optimizer, called once per stage; scheduler: optimizer -> scheduler, stepped with it
    devices:        one entry per lane; None is every visible GPU, or else one CPU lane per core
    plan:           a plan to build instead of deciding one; schedule: a name or a value from autodecouple.schedules
    cost:           what balances the stages: "flops" of a training step
    cut_at:         nodes or modules after which to cut; memory_limit: bytes that a stage may take
    detach_classifier: the papers' form of SCPL: the last stage has a local loss too, and the classifier (found, or
                    named here) trains on detached features, as one more stage on the same lane
    clip_grad_norm: per stage; accumulate: batches per update; on_nonfinite: "raise", "skip" or "ignore"
    executor:       "streams" or "inline"; None is inline for the sequential schedule, else streams
    seed:           of the heads' weights and of every dropout mask
    Raises an AutodecoupleError that says what does not fit, before anything is trained.
    """
    wish = Wish.checked(
        n_stages,
        loss,
        devices,
        cost=cost,
        cut_at=cut_at,
        memory_limit=memory_limit,
        detach_classifier=detach_classifier,
        plan=plan,
    )
    training = check_training(Training(optimizer, scheduler, clip_grad_norm, accumulate, on_nonfinite))
    options = Options.checked(wish, training, criterion, schedule, executor, seed)
    decoupled = Decoupled(check_model(model), options)
    if example_inputs is not None:
        decoupled.capture(example_inputs)
    return decoupled


def plan(
    model: nn.Module,
    example_inputs: Any,
    n_stages: int | None = None,
    loss: Loss = "supcon",
    *,
    devices: Sequence[Any] | None = None,
    cost: str = "flops",
    cut_at: Sequence[str] = (),
    memory_limit: int | None = None,
    detach_classifier: bool | str = False,
) -> Plan:
    """Decide where to cut without building anything; arguments as for `compile`. Meta tensors compute nothing."""
    wish = Wish.checked(
        n_stages,
        loss,
        devices,
        cost=cost,
        cut_at=cut_at,
        memory_limit=memory_limit,
        detach_classifier=detach_classifier,
    )
    graph, candidates = analyse(check_model(model), example_inputs)
    return decide(graph, candidates, wish)


def simulate(
    plan: Plan, schedule: str | Schedule = "streaming", batches: int = 32, cost: Cost | Timeline | None = None
) -> Timeline:
    """Predict the timeline of a stream of batches.

    cost: seconds per action; a measured Timeline gives its medians; None is FLOPs at 1e12 per second and free links
    """
    found = schedules.resolve(schedule)
    if cost is None:
        cost = FlopCost(plan, found.num_micro_batches)
    elif isinstance(cost, Timeline):
        cost = measured(cost)
    return simulator.run(plan, found, cost, batches)


def cuts(model: nn.Module, example_inputs: Any) -> tuple[Candidate, ...]:
    """Every place between two operations: the cut there, or why there is none."""
    return analyse(check_model(model), example_inputs)[1]


def code(
    model: nn.Module, example_inputs: Any, n_stages: int | None = None, loss: Loss = "supcon", **options: Any
) -> tuple[str, ...]:
    """The generated Python of every stage; further options as for `compile`."""
    options = {"schedule": "sequential", "optimizer": _no_optimizer, **options}
    with compile(model, n_stages, loss, example_inputs=example_inputs, **options) as decoupled:
        return decoupled.code


def _no_optimizer(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.0)


__all__ = ["code", "compile", "cuts", "default_optimizer", "plan", "simulate"]
