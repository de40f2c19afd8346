"""The compiler's front: compile a model, decide a plan, simulate it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from autodecouple import schedules, simulator
from autodecouple.backends import resolve_backend
from autodecouple.cost import Cost, measured, predicted
from autodecouple.decoupled import Decoupled
from autodecouple.graph import Graph
from autodecouple.options import (
    Capturing,
    Loss,
    Options,
    Wish,
    check_model,
    check_training,
    choose_devices,
    choose_executor,
)
from autodecouple.passes.candidates import Candidate, find_cuts
from autodecouple.passes.capturing.tied import untied
from autodecouple.passes.measuring.updates import MakeOptimizer
from autodecouple.passes.settle import settle
from autodecouple.pipeline import decide, note_untied, prepare, with_target
from autodecouple.plans import Plan
from autodecouple.replication import DataParallel
from autodecouple.schedules import Schedule
from autodecouple.stage import Training
from autodecouple.timeline import Timeline


def default_optimizer(params: list[nn.Parameter]) -> Optimizer:
    """Adam with a learning rate of 1e-3, as in the SCPL experiments; on a GPU as one kernel for all parameters."""
    fused = all(parameter.is_cuda and parameter.is_floating_point() for parameter in params)
    return torch.optim.Adam(params, lr=1e-3, fused=True if fused else None)


def compile(
    model: nn.Module | Graph,
    n_stages: int | None = None,
    loss: Loss = "supcon",
    *,
    example_inputs: Any = None,
    example_target: Any = None,
    criterion: Callable[[Any, Any], torch.Tensor] | None = None,
    optimizer: MakeOptimizer = default_optimizer,
    scheduler: Callable[[Optimizer], Any] | None = None,
    devices: Sequence[Any] | None = None,
    plan: Plan | None = None,
    schedule: str | Schedule = "streaming",
    cost: str = "flops",
    cut_at: Sequence[str] = (),
    no_split: Sequence[str] = (),
    memory_limit: int | None = None,
    tied: str = "together",
    mode: str = "train",
    dynamic: Sequence[int] = (),
    detach_classifier: bool | str = False,
    recompute: bool = False,
    clip_grad_norm: float | None = None,
    accumulate: int = 1,
    on_nonfinite: str = "raise",
    executor: str | None = None,
    data_parallel: int | DeviceMesh | DataParallel = 1,
    backend: str | Mapping[str, Any] = "eager",
    seed: int = 0,
) -> Decoupled:
    """Cut an unmodified model into stages that train on local losses, and run them as a pipeline.

    model:          the module, or what `capture` made of it
    n_stages:       None for one per device
    loss:           name or Objective of the hidden stages, or a list of one each; "bp" couples a stage to the next
    example_inputs: one batch as a tensor, tuple or dict; meta tensors do. None captures at the first batch
    example_target: what the batch is compared with, where the output does not tell: labels of rows for a model whose
                    output is (N, T, V), say
    criterion:      (output, target) -> scalar loss of the last stage; None is cross-entropy on the logits
    optimizer:      parameters -> optimizer, called once per stage; scheduler: optimizer -> scheduler, stepped with it
    devices:        one entry per lane, a name or a Device; None is every visible GPU, or else one CPU lane per core;
                    under torchrun one per process
    plan:           a plan to build instead of deciding one; schedule: a name or a value from autodecouple.schedules
    cost:           what balances the stages: "flops" of a training step, or the seconds that its parts take, "measured"
                    on the devices: the model then runs, and is afterwards as it was; the optimizer is timed, too
    cut_at:         nodes or modules after which to cut; no_split: modules, or classes of them, never cut inside
    memory_limit:   bytes that a stage may take
    tied:           a parameter under several names holds its uses "together" in one stage; "untie" makes one for each
    mode:           "eval" captures a model that can only be captured so, and trains it as it evaluates
    dynamic:        dimensions, beside the batch, whose size may change: (1,) for sequences of any length
    detach_classifier: the papers' form of SCPL: the last stage has a local loss too, and the classifier (found, or
                    named here) trains on detached features, as one more stage on the same lane
    recompute:      run a stage's forward again for its backward instead of keeping its activations
    clip_grad_norm: per stage; accumulate: batches per update; on_nonfinite: "raise", "skip" or "ignore"
    executor:       "streams" (a thread per lane), "processes" (forked, one per CPU lane), "distributed" (torchrun)
                    or "inline"; None is inline for the sequential schedule, distributed under torchrun, else streams
    data_parallel:  processes per lane, each with rows of its own; a DeviceMesh ("pipeline", "data"); or a DataParallel,
                    which can compare the rows of all of them in the local losses
    backend:        how a stage runs: "eager"; "compile", its body and head through torch.compile (or a dict of options
                    for that); "cuda_graphs", all that a batch takes as one launch. What cannot be is run eagerly, and
                    a warning says why
    seed:           of the heads' weights and of every dropout mask
    Raises an AutodecoupleError that says what does not fit, before anything is trained.
    """
    executor = choose_executor(executor, schedules.resolve(schedule))
    data = DataParallel.resolve(data_parallel)
    wish = Wish.checked(
        n_stages,
        loss,
        choose_devices(devices, executor, data),
        cost=cost,
        cut_at=cut_at,
        memory_limit=memory_limit,
        no_split=no_split,
        detach_classifier=detach_classifier,
        plan=plan,
        recompute=recompute,
        optimizer=optimizer,
    )
    training = Training(optimizer, scheduler, clip_grad_norm, accumulate, on_nonfinite, wish.recompute, data)
    training = check_training(training)
    capturing = Capturing(mode, tuple(dynamic), tied)
    options = Options.checked(capturing, wish, training, criterion, schedule, executor, seed, resolve_backend(backend))
    decoupled = Decoupled(model if isinstance(model, Graph) else check_model(model), options)
    if example_inputs is not None or isinstance(model, Graph):
        decoupled.capture(example_inputs, example_target)
    return decoupled


def capture(
    model: nn.Module,
    example_inputs: Any,
    *,
    example_target: Any = None,
    tied: str = "together",
    mode: str = "train",
    dynamic: Sequence[int] = (),
) -> Graph:
    """Capture and measure a model once; `plan` and `compile` take the result in its place, as often as you like."""
    capturing = Capturing(mode, tuple(dynamic), tied)
    return with_target(prepare(check_model(model), example_inputs, capturing), example_target)


def plan(
    model: nn.Module | Graph,
    example_inputs: Any = None,
    n_stages: int | None = None,
    loss: Loss = "supcon",
    *,
    example_target: Any = None,
    devices: Sequence[Any] | None = None,
    cost: str = "flops",
    cut_at: Sequence[str] = (),
    no_split: Sequence[str] = (),
    memory_limit: int | None = None,
    tied: str = "together",
    mode: str = "train",
    dynamic: Sequence[int] = (),
    detach_classifier: bool | str = False,
    recompute: bool = False,
    optimizer: MakeOptimizer = default_optimizer,
    schedule: str | Schedule = "streaming",
) -> Plan:
    """Decide where to cut without building anything; arguments as for `compile`. Meta tensors compute nothing.

    schedule: may place the stages on the lanes in turn, or tell how many versions of its weights each will keep
    """
    found = schedules.resolve(schedule)
    wish = Wish.checked(
        n_stages,
        loss,
        devices,
        cost=cost,
        cut_at=cut_at,
        memory_limit=memory_limit,
        no_split=no_split,
        detach_classifier=detach_classifier,
        recompute=recompute,
        optimizer=optimizer,
    )
    how: dict[str, Any] = {"example_target": example_target, "mode": mode, "dynamic": dynamic}
    with _captured(model, example_inputs, tied, **how) as graph:
        decided = decide(graph, find_cuts(graph), wish, None if isinstance(model, Graph) else example_inputs)
        return settle(decided, found, wish)


@contextlib.contextmanager
def _captured(model: nn.Module | Graph, example_inputs: Any, tied: str = "together", **how: Any) -> Iterator[Graph]:
    """The capture of a model that stays as it was: what is untied for it is tied again."""
    if isinstance(model, Graph):
        yield model
    elif tied == "together":
        yield capture(model, example_inputs, **how)
    else:
        with untied(check_model(model)) as parted:
            yield note_untied(capture(model, example_inputs, **how), parted)


def simulate(
    plan: Plan, schedule: str | Schedule = "streaming", batches: int = 32, cost: Cost | Timeline | None = None
) -> Timeline:
    """Predict the timeline of a stream of batches.

    cost: seconds per action; a measured Timeline gives its medians; None is what the plan holds: seconds of stages and
          links where it was made with cost="measured", else FLOPs at 1e12 per second and free links
    """
    found = schedules.resolve(schedule)
    plan = schedules.placed(plan, found)
    if cost is None:
        cost = predicted(plan, found)
    elif isinstance(cost, Timeline):
        cost = measured(cost)
    return simulator.run(plan, found, cost, batches)


def cuts(model: nn.Module | Graph, example_inputs: Any = None, **options: Any) -> tuple[Candidate, ...]:
    """Every place between two operations: the cut there, or why there is none; options as for `capture`."""
    with _captured(model, example_inputs, **options) as graph:
        return find_cuts(graph)


def code(
    model: nn.Module, example_inputs: Any, n_stages: int | None = None, loss: Loss = "supcon", **options: Any
) -> tuple[str, ...]:
    """The generated Python of every stage; further options as for `compile`."""
    options = {"schedule": "sequential", "optimizer": _no_optimizer, **options}
    with compile(model, n_stages, loss, example_inputs=example_inputs, **options) as decoupled:
        return decoupled.code


def _no_optimizer(params: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.0)


__all__ = ["capture", "code", "compile", "cuts", "default_optimizer", "plan", "simulate"]
