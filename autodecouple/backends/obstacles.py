"""Why a stage cannot be recorded as a graph; each in words that go on from "because"."""

from __future__ import annotations

import torch

from autodecouple.backends.draws import kernel_draws, whole_modules
from autodecouple.backends.rates import can_be_recorded
from autodecouple.stage import Stage
from autodecouple.work import Work


def lasting_obstacle(stage: Stage, on_gpu: bool) -> str | None:
    """What no batch will change; None where nothing stands in the way."""
    training, plan, index = stage.training, stage.plan, stage.index
    if not on_gpu:
        return f"its device is {stage.device}, and only a GPU has them"
    if stage.optimizer is None:
        return "it has no parameters to train"
    if not can_be_recorded(stage.optimizer):
        kind = type(stage.optimizer).__name__
        return f"{kind} counts its steps on the host: take an optimizer of torch.optim with capturable=, or SGD"
    if stage.coupled_before or stage.overlaps or plan.coupled_after(index):
        return "it is coupled to its neighbour, and forward and backward of one batch do not follow each other"
    if training.recompute or training.accumulate > 1:
        return "recompute and accumulate are for eager stages"
    if plan.signal_source(index) is not None or (index < len(plan.cuts) and plan.cuts[index].encodes):
        return "its loss reads or gives an encoding of the target, which is not there when its forward begins"
    return _obstacle_in(stage)


def _obstacle_in(stage: Stage) -> str | None:
    """Of the stage's code."""
    if drawn := kernel_draws(stage.code.body, stage.device):
        return f"{', '.join(drawn)} draws random numbers inside a kernel, the same ones in every replay"
    if stage.code.head_draws:
        return "its head draws random numbers: the same ones in every replay"
    if whole := whole_modules(stage.code.body):
        return f"{', '.join(whole)} runs as it was written, and its Python code would run once only"
    return None


def passing_obstacle(work: Work) -> str | None:
    """What another batch may not have."""
    if len(work.sizes) > 1:
        return "the schedule has several micro-batches"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved_tensors_hooks are in force, and would be called once only"
    return None
