"""Law 8: nothing hangs. What is raised in a stage reaches the caller; what does not fit is refused before it runs."""

from __future__ import annotations

import copy
import linecache
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
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
from training_tools import (
    CLASSES,
    Batch,
    assert_same,
    before_actions,
    compiled,
    hold_until,
    make_batches,
    sgd,
    train,
)

import autodecouple
from autodecouple.decoupled import Decoupled
from autodecouple.errors import AutodecoupleError, ClosedError, InputError, NonFiniteLossError, ScheduleError
from autodecouple.executors.job import Job
from autodecouple.objectives import DeInfoReg
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Streaming
from autodecouple.schedules.actions import Action, Op
from autodecouple.stage import Stage

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
        "optimizer": copy.deepcopy(stage.optimizer.state_dict()) if stage.optimizer is not None else None,
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
    assert "wrapped" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
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


def test_an_error_of_stage_0_leaves_no_trace_anywhere() -> None:
    """The batch never reaches the others, so that the run is that of a loader which never gave it."""
    batches = make_batches("norm", [6] * 6)
    expected = train(compiled("norm", 3, optimizer=sgd, executor="inline"), [*batches[:2], *batches[4:]])
    decoupled = compiled("norm", 3, optimizer=sgd)
    with failing("forward", 0, 2, ValueError("boom")):
        for batch in batches[:4]:
            with pytest.raises(ValueError) if batch is batches[3] else mock.MagicMock():
                decoupled.train_step(*batch)
                if batch is batches[3]:
                    decoupled.synchronize()
    with decoupled:
        steps = [decoupled.train_step(*batch) for batch in batches[4:]]
        assert [step.losses for step in steps] == expected.losses[2:]
        assert_same(decoupled.state_dict()["model"], expected.state["model"])


def test_the_oldest_error_counts() -> None:
    """Stage 0 fails on batch 2 while stage 1 still holds batch 1 and fails on it, too: what a plain loop would have
    raised first is raised, whichever came first by the clock."""
    late, first, second = threading.Event(), ValueError("batch 1"), KeyError("batch 2")

    def fail(job: Job, action: Action) -> None:
        if (job.index, action) == (1, Action(1, Op.FORWARD, 0)):
            assert late.wait(20)
            raise first
        if (job.index, action) == (2, Action(0, Op.FORWARD, 0)):
            late.set()
            raise second

    decoupled = compiled("norm", 2)
    with before_actions(fail):
        steps = expect(decoupled, first, make_batches("norm", [4] * 3))
    assert steps[0].losses
    with pytest.raises(ValueError, match="batch 1"):
        _ = steps[1].losses
    decoupled.close()


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_an_optimizer_that_fails_has_changed_nothing(executor: str) -> None:
    """User code, too: the batch is left out, and the next one trained."""

    class Picky(torch.optim.SGD):
        fail = False

        def step(self, closure: Any = None) -> None:
            if self.fail:
                type(self).fail = False
                raise ValueError("not today")
            super().step(closure)

    batches = make_batches("norm", [6] * 3)
    decoupled = compiled("norm", 2, executor=executor, optimizer=lambda params: Picky(params, lr=0.1))
    decoupled.train_step(*batches[0])
    decoupled.synchronize()
    before = stage_state(decoupled, 0)
    Picky.fail = True
    # Stage 0 is the first to update.
    with before_actions(_hold_other_stages), pytest.raises(ValueError, match="not today"):
        decoupled.train_step(*batches[1])
        decoupled.synchronize()
    assert_same(stage_state(decoupled, 0), before)
    with decoupled:
        assert decoupled.train_step(*batches[2]).losses


def test_a_scheduler_that_fails_leaves_a_whole_update() -> None:
    """It is stepped when the parameters have been: then there is no way back, and buffers must not go back alone."""

    class Picky(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            if self.last_epoch:
                raise ValueError("no rate")
            return [group["lr"] for group in self.optimizer.param_groups]

    batches = make_batches("norm", [6])
    expected = train(compiled("norm", 1, optimizer=sgd, executor="inline"), batches)
    decoupled = compiled("norm", 1, optimizer=sgd, scheduler=Picky, executor="inline")
    with pytest.raises(ValueError, match="no rate"):
        decoupled.train_step(*batches[0])
    assert_same(decoupled.state_dict()["model"], expected.state["model"])


def test_an_error_leaves_an_accumulation_as_it_was() -> None:
    """Two batches per update, and one between them fails: its gradients must not stay, nor theirs be lost. They
    were thrown away, and the update came a batch late."""
    a, bad, b = make_batches("norm", [6] * 3)
    expected = train(compiled("norm", 3, accumulate=2, optimizer=sgd, executor="inline"), [a, b])
    for executor in ("inline", "streams"):
        for method in ("forward", "backward", "update"):
            decoupled = compiled("norm", 3, accumulate=2, optimizer=sgd, executor=executor)
            decoupled.train_step(*a)
            decoupled.synchronize()
            fault = failing(method, 0, 1, ValueError("boom"))
            with fault, before_actions(_hold_other_stages), pytest.raises(ValueError):
                decoupled.train_step(*bad)
                decoupled.synchronize()
            with decoupled:
                decoupled.train_step(*b)
                assert_same(decoupled.state_dict()["model"], expected.state["model"])


def _hold_other_stages(job: Job, action: Action) -> None:
    if action.stage:
        time.sleep(0.1)  # until stage 0 has failed; then they are dropped


def test_buffers_of_a_failed_batch_go_back_to_before_its_first_micro_batch() -> None:
    """1F1B holds no micro-batch between a backward and the next forward: the buffers were set aside a second time
    there, and came back with the first micro-batch in them."""
    decoupled = compiled("norm", 2, "bp", schedule=OneFOneB(num_micro_batches=3), executor="inline")
    before = stage_state(decoupled, 1)
    calls: list[int] = []
    backward = Stage.backward

    def third_time(self: Stage, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.index)
        if calls.count(1) == 3:
            raise ValueError("boom")
        return backward(self, *args, **kwargs)

    with mock.patch.object(Stage, "backward", third_time), pytest.raises(ValueError):
        decoupled.train_step(*make_batches("norm", [6])[0])
    assert_same(stage_state(decoupled, 1), before)


# ---------------------------------------------------------------- Ctrl-C


@contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Ctrl-C comes to the main thread in a moment."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(after, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()


@pytest.mark.parametrize("waiting_in", ["train_step", "synchronize", "losses"])
def test_ctrl_c_returns_at_once(waiting_in: str) -> None:
    """With a stage that is stuck: the caller gets the prompt back, and close() ends the workers once it goes on."""
    go = threading.Event()
    batches = make_batches("norm", [4] * 8)
    decoupled = compiled("norm", 2)
    with before_actions(hold_until(go)):
        step = decoupled.train_step(*batches[0])
        start = time.monotonic()
        with interrupted(0.3):
            if waiting_in == "train_step":
                for batch in batches:
                    decoupled.train_step(*batch)
            elif waiting_in == "synchronize":
                decoupled.synchronize()
            else:
                _ = step.losses
        assert time.monotonic() - start < 5
        go.set()
        assert len(step.losses) == 2
        assert decoupled.train_step(*batches[0]).losses  # it may go on, too
        decoupled.close()


def test_ctrl_c_in_a_with_block_drops_what_is_under_way() -> None:
    go = threading.Event()

    def hold(job: Job, action: Action) -> None:
        if action.stage == 1:
            go.wait(20)

    with before_actions(hold), pytest.raises(KeyboardInterrupt), compiled("norm", 2) as decoupled:
        step = decoupled.train_step(*make_batches("norm", [4])[0])
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt
    with pytest.raises(ClosedError, match="batch 0 was dropped"):
        _ = step.losses


def test_ctrl_c_at_any_line_of_train_step_leaves_a_pipeline_that_works() -> None:
    """A batch was half posted, or had the number of the one before: the lanes then waited for ever. Here every line
    of the caller's side is interrupted once."""
    (batch,) = make_batches("norm", [4])
    decoupled = compiled("norm", 2)
    at, lines = 0, 1
    with decoupled, before_actions(lambda job, action: time.sleep(0.001)):
        while at < lines:
            for drain in (True, False):
                lines = _count_and_interrupt(at, lambda: decoupled.train_step(*batch))
                if drain:
                    decoupled.synchronize()
            steps = [decoupled.train_step(*batch) for _ in range(2)]
            decoupled.synchronize()
            assert [step.batch for step in steps] == list(range(steps[0].batch, steps[0].batch + 2))
            assert all(step.losses for step in steps)
            at += 1
    assert lines > 30


def _count_and_interrupt(at: int, call: Callable[[], object]) -> int:
    """Raise KeyboardInterrupt at that line of this package, and count its lines.

    Not at the end of a `with` block, which is traced as a second visit of its line: no signal is handled there.
    """
    seen, entered = 0, set()

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal seen
        if "autodecouple" not in frame.f_code.co_filename:
            return None
        if event == "line":
            place = (frame, frame.f_lineno)
            if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with "):
                if place in entered:
                    return trace
                entered.add(place)
            seen += 1
            if seen == at + 1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return at + 2
    finally:
        sys.settrace(before)
    return seen


# ---------------------------------------------------------------- losses that are not finite


NAN_CASES: list[tuple[Any, Schedule, str]] = [
    ("supcon", Streaming(), "inline"),
    ("supcon", Streaming(), "streams"),
    (DeInfoReg(widths=(8,)), Streaming(), "streams"),
    (["early_exit", "bp"], MicroBatched(num_micro_batches=2), "streams"),
    ("bp", GPipe(num_micro_batches=2), "streams"),
    ("bp", GPipe(num_micro_batches=1), "inline"),
    ("bp", OneFOneB(num_micro_batches=2), "streams"),
]


def poisoned(batch: Batch) -> Batch:
    x, y = batch
    x = x.clone()
    x[0] = NAN
    return x, torch.zeros_like(y)


@pytest.mark.parametrize(("loss", "schedule", "executor"), NAN_CASES)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_nan_in_the_input_updates_nothing(loss: Any, schedule: Schedule, executor: str, policy: str) -> None:
    """Weights, heads, BatchNorm statistics (the heads' own among them) and moments are those of a run that never saw
    the batch. A coupled stage has no loss of its own to look at: it was updated with NaN gradients."""
    batches = make_batches("norm", [6] * 4)
    options = {"schedule": schedule, "optimizer": sgd}
    expected = train(compiled("norm", 3, loss, executor="inline", **options), batches).state
    decoupled = compiled("norm", 3, loss, executor=executor, on_nonfinite=policy, **options)
    for batch in batches[:2]:
        decoupled.train_step(*batch)
    decoupled.synchronize()
    if policy == "raise":
        with pytest.raises(NonFiniteLossError, match="the loss of stage . is nan") as caught:
            decoupled.train_step(*poisoned(batches[0]))
            decoupled.synchronize()
        assert "batch 2" in caught.value.__notes__[0]
    else:
        step = decoupled.train_step(*poisoned(batches[0]))
        assert step.losses[-1] != step.losses[-1]
        assert [stage.skipped for stage in decoupled.stages] == [1, 1, 1]
    with decoupled:
        for batch in batches[2:]:
            decoupled.train_step(*batch)
        found = decoupled.state_dict()
    for stage in found["stages"]:
        stage["skipped"] = 0
    for part in ("model", "heads", "stages"):
        assert_same(found[part], expected[part])


class NaNAt:
    """A criterion that is NaN for batches whose labels are all of one class."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output, target)
        return loss * NAN if bool((target == target[0]).all()) else loss


@pytest.mark.parametrize("executor", ["inline", "streams"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_nan_of_one_stage_concerns_that_stage(executor: str, policy: str) -> None:
    """Only the last loss is NaN: the stages before it have trained on the batch, and may."""
    good, bad = make_batches("norm", [6] * 2)
    bad = bad[0], torch.ones_like(bad[1])
    with compiled("norm", 3, optimizer=sgd, executor="inline") as reference:
        reference.train_step(*good)
        before = stage_state(reference, 2)
        reference.train_step(*bad)
        after = stage_state(reference, 1)
    decoupled = compiled("norm", 3, optimizer=sgd, executor=executor, criterion=NaNAt(), on_nonfinite=policy)
    # The other stages first: an error drops what they have not begun.
    with before_actions(lambda job, action: time.sleep(0.1 if action == Action(2, Op.UPDATE) else 0)), decoupled:
        decoupled.train_step(*good)
        if policy == "raise":
            with pytest.raises(NonFiniteLossError, match="loss of stage 2 is nan") as caught:
                decoupled.train_step(*bad)
                decoupled.synchronize()
            assert "of stage 2 of 3" in caught.value.__notes__[0] and "batch 1" in caught.value.__notes__[0]
        else:
            losses = decoupled.train_step(*bad).losses
            assert losses[2] != losses[2] and losses[1] == losses[1]
            assert [stage.skipped for stage in decoupled.stages] == [0, 0, 1]
        assert_same(stage_state(decoupled, 2), before)
        assert_same(stage_state(decoupled, 1), after)


def test_ignoring_a_nan_is_what_plain_torch_does() -> None:
    decoupled = compiled("norm", 2, optimizer=sgd, on_nonfinite="ignore")
    with decoupled:
        decoupled.train_step(*poisoned(make_batches("norm", [6])[0]))
        assert all(parameter.isnan().any() for parameter in decoupled.model.parameters())


def test_a_skipped_batch_leaves_an_accumulation_as_it_was() -> None:
    """The gradients gathered before it are kept: they were thrown away with those of the bad batch."""
    a, b, c = make_batches("norm", [6] * 3)
    options = {"accumulate": 2, "optimizer": sgd}
    expected = train(compiled("norm", 2, executor="inline", **options), [a, b, c]).state
    decoupled = compiled("norm", 2, on_nonfinite="skip", **options)
    with decoupled:
        for batch in (a, poisoned(a), b, poisoned(b), c):
            decoupled.train_step(*batch)
        found = decoupled.state_dict()
    assert_same(found["model"], expected["model"])
    assert [stage["pending"] for stage in found["stages"]] == [1, 1]
    assert_same(found["gradients"], expected["gradients"])


# ---------------------------------------------------------------- what is refused before anything runs


@pytest.mark.parametrize("which", ["input", "target"])
def test_a_tensor_overwritten_too_early_is_noticed(which: str) -> None:
    """train_step returns at once; a loader that fills one buffer again and again would train on the wrong rows."""
    go = threading.Event()

    def hold(job: Job, action: Action) -> None:
        if job.index == 1:
            go.wait(20)

    x, y = make_batches("norm", [6])[0]
    decoupled = compiled("norm", 2)
    with before_actions(hold):
        decoupled.train_step(x, y)
        decoupled.synchronize()  # from here on they are the caller's again
        x.mul_(0.5)
        y.fill_(1)
        decoupled.train_step(x, y)
        (x if which == "input" else y).zero_()
        go.set()
        with pytest.raises(InputError, match=r"changed in place before a stage had read it.*synchronize\(\)") as caught:
            decoupled.synchronize()
        assert "batch 1" in caught.value.__notes__[0]
    decoupled.close()


X, Y = make_batches("norm", [6])[0]

BAD_BATCHES: dict[str, tuple[Any, Any, str]] = {
    "no target": (X, None, "target is missing"),
    "short target": (X, Y[:5], "shape (5,), but the batch has 6 rows"),
    "column target": (X, Y[:, None], "shape (6, 1)"),
    "float target": (X, Y.float(), "int64 class indices, but is torch.float32: pass target.long()"),
    "int32 target": (X, Y.int(), "torch.int32"),
    "class too high": (X, torch.full_like(Y, CLASSES), "holds class 4, but the model's output has 4 classes, 0 to 3"),
    "class too low": (X, torch.full_like(Y, -1), "holds class -1"),
    "list target": (X, Y.tolist(), "must be a tensor of class indices, but is list"),
    "double input": (X.double(), Y, "was captured, but got shape (6, 1, 4, 4) float64"),
    "flat input": (X[0], Y, "was captured, but got shape (1, 4, 4) float32"),
    "large input": (X.repeat(1, 1, 2, 1), Y, "got shape (6, 1, 8, 4)"),
    "no rows": (X[:0], Y[:0], "no rows"),
    "numpy input": (X.numpy(), Y, "must be a tensor"),
    "two inputs": ((X, X), Y, "2 positional inputs"),
    "named input": ({"x": X}, Y, "keyword inputs x"),
}


@pytest.fixture(scope="module")
def ready() -> Iterator[Decoupled]:
    with compiled("norm", 3) as decoupled:
        yield decoupled


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(ready: Decoupled, case: str) -> None:
    """In the caller's thread and before any stage has begun; the next batch is fine."""
    x, y, message = BAD_BATCHES[case]
    before = ready.state_dict()
    with pytest.raises(InputError) as caught:
        ready.train_step(x, y)
    assert message in str(caught.value)
    assert_same(ready.state_dict(), before)


def test_a_single_row_is_trained() -> None:
    """SupCon with nothing to compare is 0, not NaN; the criterion trains the last stage."""
    decoupled = compiled("norm", 3)
    with warnings.catch_warnings(), decoupled:
        warnings.simplefilter("ignore")
        before = decoupled.state_dict()["model"]
        losses = decoupled.train_step(*make_batches("norm", [1])[0]).losses
        assert losses[0] == 0 and losses[1] == 0 and losses[2] is not None and losses[2] > 0
        after = decoupled.state_dict()["model"]
        assert not torch.equal(before["7.weight"], after["7.weight"])
        assert torch.equal(before["0.0.weight"], after["0.0.weight"])
        assert all(value.isfinite().all() for value in after.values())


def test_batches_without_positives_are_warned_about_once() -> None:
    """Counted by the head, said by the caller's thread, where it drains."""
    decoupled = compiled("norm", 3)
    x, _ = make_batches("norm", [CLASSES])[0]
    with decoupled:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decoupled.train_step(*make_batches("norm", [8])[0])
            decoupled.synchronize()
            for _ in range(2):
                decoupled.train_step(x, torch.arange(CLASSES))
        with pytest.warns(UserWarning, match="2 batches had no two rows of one class") as caught:
            decoupled.synchronize()
        assert [entry.filename for entry in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decoupled.train_step(x, torch.arange(CLASSES))
            decoupled.synchronize()


MODEL = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[AutodecoupleError], str]] = {
    "loss": ({"loss": "supkon"}, InputError, "did you mean 'supcon'? There are: supcon, deinforeg, early_exit, "),
    "losses": ({"loss": ["supcon"] * 3}, InputError, "loss has 3 objectives, but 2 stages have 1 hidden ones"),
    "schedule": ({"schedule": "stream"}, ScheduleError, "sequential, streaming, barrier, micro_batched, gpipe, 1f1b"),
    "executor": ({"executor": "threads"}, InputError, "'threads' is not known; there are: inline, streams"),
    "cost": ({"cost": "time"}, InputError, "there are: 'flops', 'measured'"),
    "policy": ({"on_nonfinite": "warn"}, InputError, '"raise", "skip" or "ignore", not \'warn\''),
    "accumulate": ({"accumulate": 0}, InputError, "positive integer, not 0"),
    "clip": ({"clip_grad_norm": -1.0}, InputError, "positive or None, not -1.0"),
    "optimizer": ({"optimizer": torch.optim.SGD(MODEL.parameters(), 0.1)}, InputError, "lambda params:"),
    "criterion": ({"criterion": "ce"}, InputError, "not callable"),
    "devices": ({"devices": []}, InputError, "devices is empty"),
    "gpipe": ({"schedule": "gpipe"}, ScheduleError, "is detached"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(case: str) -> None:
    """By a message that names the value and lists what there is."""
    options, kind, message = BAD_OPTIONS[case]
    loss = options.get("loss", "supcon")
    others = {name: value for name, value in options.items() if name != "loss"}
    with pytest.raises(kind) as caught:
        autodecouple.compile(MODEL, 2, loss, example_inputs=(torch.zeros(4, 5),), **{"devices": ["cpu"], **others})
    assert message in str(caught.value)


# ---------------------------------------------------------------- after the end


def test_a_closed_pipeline_trains_no_more_but_still_serves() -> None:
    decoupled = compiled("norm", 2)
    x, y = make_batches("norm", [4])[0]
    decoupled.train_step(x, y)
    decoupled.close()
    decoupled.close()
    with pytest.raises(ClosedError, match="closed; compile the model again"):
        decoupled.train_step(x, y)
    assert decoupled(x).shape == (4, CLASSES)
    assert decoupled.state_dict()["step"] == 1
    assert len(decoupled.timeline.spans) == 8
    decoupled.to("cpu")
    with pytest.raises(ClosedError):
        decoupled.train_step(x, y)


def test_a_pipeline_closed_before_its_first_batch_stays_closed() -> None:
    decoupled = autodecouple.compile(MODEL, 2)
    decoupled.close()
    with pytest.raises(ClosedError):
        decoupled.capture((torch.zeros(4, 5),))


def test_close_raises_what_was_not_yet_seen_and_ends_the_workers() -> None:
    decoupled = compiled("norm", 2)
    error = ValueError("boom")
    with failing("loss", 1, 0, error):
        decoupled.train_step(*make_batches("norm", [4])[0])
        with pytest.raises(ValueError) as caught:
            decoupled.close()
    assert caught.value is error


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
    )


@pytest.mark.dist
def test_a_forked_child_is_told_and_its_parent_trains_on() -> None:
    """Threads stay behind at fork: waiting for them in the child would be waiting for ever."""
    done = run_python(
        """
        import os, torch
        from autodecouple.errors import ClosedError
        from training_tools import compiled, make_batches
        torch.set_num_threads(1)
        decoupled = compiled("norm", 2)
        batch = make_batches("norm", [4])[0]
        decoupled.train_step(*batch)
        child = os.fork()
        if child == 0:
            try:
                decoupled.train_step(*batch)
            except ClosedError as error:
                code = 7 if "forked after compile()" in str(error) else 8
                decoupled.close()
                os._exit(code)
            os._exit(9)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print("parent", len(decoupled.train_step(*batch).losses))
        """
    )
    assert done.stdout.split() == ["child", "7", "parent", "2"], done.stderr


@pytest.mark.dist
@pytest.mark.parametrize(
    "ending",
    [
        "",
        pytest.param("raise SystemExit(5)", marks=pytest.mark.slow),
        pytest.param("import signal; signal.raise_signal(signal.SIGINT)", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_ends_without_close_does_not_hang(ending: str) -> None:
    """Neither with batches under way, nor does a worker inside an operator bring the interpreter down."""
    done = run_python(
        f"""
        import torch
        from training_tools import compiled, make_batches, delays
        torch.set_num_threads(1)
        decoupled = compiled("norm", 3)
        with delays(1, 0.2):
            for batch in make_batches("norm", [64] * 3):
                decoupled.train_step(*batch)
        print("end", flush=True)
        {ending}
        """
    )
    assert done.stdout.split() == ["end"], done.stderr
    expected = {"": 0, "raise SystemExit(5)": 5}.get(ending, -signal.SIGINT)
    assert done.returncode == expected, done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
