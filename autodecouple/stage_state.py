"""What a stage goes on from, beside its weights: taken, put back, and handed from process to process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from autodecouple.stage import Stage


def stage_state(stage: Stage) -> dict[str, Any]:
    """Optimizer, scheduler, counters, and the gradients of an accumulation under way; no copies."""
    return {
        "optimizer": stage.optimizer.state_dict() if stage.optimizer is not None else None,
        "scheduler": stage.scheduler.state_dict() if stage.scheduler is not None else None,
        "kinds": {"optimizer": kind_of(stage.optimizer), "scheduler": kind_of(stage.scheduler)},
        "pending": stage.pending,
        "skipped": stage.skipped,
        "gradients": [p.grad for p in stage.parameters] if stage.pending else None,
    }


def restore_stage(stage: Stage, saved: Mapping[str, Any]) -> None:
    """Put it back; the state may be used again, for another stage or another time."""
    if stage.optimizer is not None:
        stage.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it would take the tensors themselves
    if stage.scheduler is not None:
        stage.scheduler.load_state_dict(copy.deepcopy(saved["scheduler"]))
    stage.pending, stage.skipped = saved["pending"], saved["skipped"]
    gradients = saved["gradients"] or [None] * len(stage.parameters)
    for parameter, gradient in zip(stage.parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone().to(parameter.device)


def kind_of(part: object) -> str | None:
    return None if part is None else type(part).__name__
