"""Law 8: nothing hangs. What is raised in a stage reaches the caller; what does not fit is refused before it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autodecouple
from autodecouple.decoupled import Decoupled
from autodecouple.errors import AutodecoupleError, ClosedError, InputError, NonFiniteLossError, ScheduleError
from autodecouple.executors.job import Job
from autodecouple.objectives import DeInfoReg
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Streaming
from autodecouple.schedules.actions import Action, Op
from autodecouple.stage import Stage
from training_tools import (
    CLASSES,
    Batch,
    assert_same,
    before_actions,
    compiled,
    make_batches,
    sgd,
    train,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]

NAN = float("nan")


class TwoArguments(Exception):
    """An exception that cannot be made again from its message, as of many libraries."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Falsy(Exception):
    """`if error:` is not how to ask whether there is one."""

    def __bool__(self) -> bool:
        return False


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("boom"),
    "two arguments": lambda: TwoArguments(3, "boom"),
    "falsy": Falsy,
    "StopIteration": lambda: StopIteration("boom"),  # contextlib turns it into a RuntimeError where it may
    "SystemExit": lambda: SystemExit(3),  # torchgpipe hangs for ever on this one
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
}


@contextmanager
def failing(method: str, stage: int, batch: int, error: BaseException, late: bool = False) -> Iterator[None]:
    """Let one method of a stage raise, in one batch and once: before it has done anything, or after all."""
    original = getattr(Stage, method)
    number = threading.local()
    raised: list[bool] = []

    def wrapped(self: Stage, *args: Any, **kwargs: Any) -> Any:
        strikes = self.index == stage and number.batch == batch and not raised
        if strikes and not late:
            raised.append(True)
            raise error
        result = original(self, *args, **kwargs)
        if strikes:
            raised.append(True)
            raise error
        return result

    def remember(job: Job, action: Action) -> None:
        number.batch = job.index

    with mock.patch.object(Stage, method, wrapped), before_actions(remember):
        yield


def stage_state(decoupled: Decoupled, index: int) -> dict[str, Any]:
    """Everything that one stage owns, gradients included."""
    stage = decoupled.stages[index]
    head = stage.code.head
    return {
        "parameters": [parameter.detach().clone() for parameter in stage.parameters],
        "gradients": [parameter.grad for parameter in stage.parameters if parameter.grad is not None],
        "buffers": [buffer.clone() for buffer in stage.buffers],
        "head": [buffer.clone() for buffer in head.buffers()] if head is not None else [],
        "optimizer": decoupled.state_dict()["stages"][index]["optimizer"],
    }


def expect(decoupled: Decoupled, error: BaseException, batches: list[Batch]) -> list[Any]:
    """Give batches until the error arrives, at the latest when draining; returns the steps."""
    steps = []
    with pytest.raises(type(error)) as caught:
        for batch in batches:
            steps.append(decoupled.train_step(*batch))
        decoupled.synchronize()
    assert caught.value is error
    return steps


CASES: list[tuple[Any, Schedule, str]] = [
    (["supcon", "early_exit"], Streaming(), "streams"),
    (["supcon", "early_exit"], Streaming(queue_depth=4), "streams"),
    (["supcon", "early_exit"], Streaming(barrier=True), "streams"),
    (["supcon", "early_exit"], MicroBatched(num_micro_batches=2), "streams"),
    (["supcon", "bp"], Streaming(), "streams"),
    (["supcon", "early_exit"], Streaming(), "inline"),
    (["bp", "bp"], GPipe(num_micro_batches=2), "streams"),
    (["bp", "bp"], OneFOneB(num_micro_batches=3), "streams"),
    (["bp", "bp"], OneFOneB(num_micro_batches=3), "inline"),
]


def check_fault(
    case: tuple[Any, Schedule, str], kind: str, method: str, stage: int, batch: int, lanes: int, late: bool
) -> None:
    loss, schedule, executor = case
    if method == "loss" and stage < 2 and loss[stage] == "bp":
        method = "backward"  # a coupled stage has no loss
    late = late and method != "update"  # an update that was made stays made
    error, batches = ERRORS[kind](), make_batches("norm", [6] * 6)
    options = {"schedule": schedule, "optimizer": sgd}
    with compiled("norm", 3, loss, executor="inline", **options) as reference:
        expected = [reference.train_step(*pair).losses for pair in batches[:batch]]
        before = stage_state(reference, stage)
    decoupled = compiled("norm", 3, loss, executor=executor, lanes=lanes, **options)
    with failing(method, stage, batch, error, late):
        steps = expect(decoupled, error, batches)
    # the user's own error, and where it happened
    (note,) = error.__notes__
    assert f"of stage {stage} of 3" in note and "device cpu" in note and f"batch {batch}" in note
    assert any(entry.name == "wrapped" for entry in traceback_of(error))
    # older batches are whole, this one and younger ones are left out
    assert [step.losses for step in steps[:batch]] == expected
    for step in steps[batch:]:
        with pytest.raises(type(error)):
            _ = step.losses
        assert repr(step).endswith("failed)")
    assert_same(stage_state(decoupled, stage), before)
    # and training goes on
    with decoupled:
        assert None not in decoupled.train_step(*batches[0]).losses[2:]
        decoupled.synchronize()


def traceback_of(error: BaseException) -> Iterator[Any]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_name and mock.Mock(**{}) and _Frame(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next


class _Frame:
    def __init__(self, name: str) -> None:
        self.name = name


METHODS = st.sampled_from(["forward", "loss", "backward", "update"])


@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(list(ERRORS)),
    method=METHODS,
    stage=st.integers(0, 2),
    batch=st.integers(0, 3),
    lanes=st.integers(1, 3),
    late=st.booleans(),
)
@settings(max_examples=25)
def test_whatever_a_stage_raises_reaches_the_caller(**example: Any) -> None:
    """Any error in any stage, at any batch, under any schedule: its own type and traceback, a note that says where,
    older batches trained on all stages, the failed one left out from the stage that failed, and no hang."""
    check_fault(**example)


@pytest.mark.slow
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(list(ERRORS)),
    method=METHODS,
    stage=st.integers(0, 2),
    batch=st.integers(0, 3),
    lanes=st.integers(1, 3),
    late=st.booleans(),
)
@settings(max_examples=200)
def test_whatever_a_stage_raises_reaches_the_caller_at_length(**example: Any) -> None:
    check_fault(**example)
