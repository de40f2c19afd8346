"""Worker processes train what one thread would, to the last bit, and none is left behind, whatever happens."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from training_tools import Encoding, Result, assert_same, before_actions, comparable, compiled, make_batches, sgd, train

from autodecouple.decoupled import Decoupled
from autodecouple.errors import ClosedError, InputError, NonFiniteLossError, PeerError
from autodecouple.executors.job import Job
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Streaming
from autodecouple.schedules.actions import Action, Op

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]
ROOT = Path(__file__).resolve().parent.parent
SIZES = [8, 8, 3, 8, 1, 8]


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    before = set(multiprocessing.active_children())
    yield
    gc.collect()
    deadline = time.monotonic() + 5.0
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def pids_of(decoupled: Decoupled) -> list[int]:
    crew = decoupled._pipeline.executor._crew  # type: ignore[union-attr]
    return crew.pids  # type: ignore[no-any-return]


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1].splitlines()[0]
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- law 3

CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "two lanes": (2, "supcon", {"optimizer": adam, "scheduler": step_lr}),
    "a lane for each stage": (4, ["supcon", "deinforeg", "early_exit"], {}),
    "one lane": (1, "early_exit", {}),
    "a queue of one": (4, "supcon", {"schedule": Streaming(queue_depth=1)}),
    "a barrier": (3, "supcon", {"schedule": Streaming(barrier=True)}),
    "micro-batches": (3, ["supcon", "early_exit", "deinforeg"], {"schedule": MicroBatched(num_micro_batches=3)}),
    "a signal that skips a lane": (4, [Encoding(), "bp", Encoding()], {}),
    "encodings of the labels": (3, ["associated", "supcon", "associated"], {"optimizer": adam}),
    "coupled stages": (3, ["bp", "supcon", "bp"], {"optimizer": adam}),
    "overlapping stages": (4, "loco", {"optimizer": adam}),
    "half an accumulation": (2, "deinforeg", {"accumulate": 4, "clip_grad_norm": 0.5}),
    "recomputed": (2, "supcon", {"recompute": True}),
}


QUICK = ("two lanes", "micro-batches", "encodings of the labels", "coupled stages", "overlapping stages")


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_processes_equal_one_thread(case: str) -> None:
    lanes, loss, options = CASES[case]
    options = {"optimizer": sgd, **options}
    batches = make_batches("dropout", SIZES)
    count = options["schedule"].num_micro_batches if "schedule" in options else 1
    reference = MicroBatched(num_micro_batches=count) if count > 1 else "sequential"
    expected = train(compiled("dropout", 4, loss, **{**options, "executor": "inline", "schedule": reference}), batches)
    assert_same(train(compiled("dropout", 4, loss, lanes=lanes, executor="processes", **options), batches), expected)


@pytest.mark.parametrize("schedule", slow_but([OneFOneB(3)], [GPipe(3), OneFOneB(3)]), ids=repr)
def test_schedules_of_backprop(schedule: Any) -> None:
    batches = make_batches("plain", [8, 3, 8, 8])
    expected = train(compiled("plain", 3, "bp", schedule=schedule, executor="inline"), batches)
    assert_same(train(compiled("plain", 3, "bp", schedule=schedule, executor="processes"), batches), expected)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 4])
def test_fifty_batches(lanes: int) -> None:
    batches = make_batches("dropout", [8] * 49 + [3])
    loss = ["supcon", "deinforeg", "early_exit"]
    expected = train(compiled("dropout", 4, loss, executor="inline", optimizer=adam), batches)
    assert_same(
        train(compiled("dropout", 4, loss, executor="processes", lanes=lanes, optimizer=adam), batches), expected
    )


def test_slow_lanes_and_inputs_that_are_used_again() -> None:
    """`train_step` returns when the inputs have left: the caller may write the next batch into the same tensors."""
    batches = make_batches("norm", [8] * 12)
    expected = train(compiled("norm", 3, executor="inline"), batches)
    x, y = (torch.empty_like(part) for part in batches[0])
    late = threading.local()

    def wait(job: Job, action: Action) -> None:
        late.count = getattr(late, "count", 0) + 1
        time.sleep(0.003 * (late.count % 3))

    steps = []
    with before_actions(wait), compiled("norm", 3, executor="processes") as decoupled:
        for inputs, target in batches:
            x.copy_(inputs)
            y.copy_(target)
            steps.append(decoupled.train_step(x, y))
        found = Result([s.losses for s in steps], [s.output for s in steps], comparable(decoupled.state_dict()))
    assert_same(found, expected)


def test_the_timeline_shows_lanes_that_work_at_once() -> None:
    with compiled("norm", 3, executor="processes") as decoupled:
        for x, y in make_batches("norm", [8] * 5):
            decoupled.train_step(x, y)
        timeline = decoupled.timeline
    assert {span.lane for span in timeline.spans} == {0, 1, 2}
    assert len(timeline.spans) == 5 * 3 * 4
    assert {span.batch for span in decoupled.timeline.spans} == set(range(5))


# ---------------------------------------------------------------- state


def test_a_state_goes_over_between_processes_and_one_thread() -> None:
    batches = make_batches("dropout", SIZES)
    options: dict[str, Any] = {"optimizer": adam, "scheduler": step_lr, "accumulate": 2}
    expected = train(compiled("dropout", 3, executor="inline", **options), batches)
    for first, second in (("processes", "inline"), ("inline", "processes"), ("processes", "processes")):
        with compiled("dropout", 3, executor=first, **options) as decoupled:
            for x, y in batches[:3]:
                decoupled.train_step(x, y)
            state = decoupled.state_dict()
            decoupled.train_step(*batches[5])  # what comes behind does not change it
            decoupled.synchronize()
        decoupled = compiled("dropout", 3, executor=second, **options)
        decoupled.train_step(*batches[5])  # and is gone when a state is loaded
        decoupled.load_state_dict(state)
        assert_same(train(decoupled, batches[3:]).state, expected.state)


def test_reading_in_between_changes_nothing() -> None:
    batches = make_batches("norm", SIZES)
    expected = train(compiled("norm", 3, executor="inline", accumulate=2, optimizer=adam), batches)
    with compiled("norm", 3, executor="inline", accumulate=2, optimizer=adam) as reference:
        reference.train_step(*batches[0])
        output = reference(batches[1][0])
    with compiled("norm", 3, executor="processes", accumulate=2, optimizer=adam) as decoupled:
        for number, (x, y) in enumerate(batches):
            decoupled.train_step(x, y)
            if number == 0:
                assert torch.equal(decoupled(batches[1][0]), output)
            decoupled.state_dict()
        state = decoupled.state_dict()
    assert_same(comparable(state), expected.state)
    assert_same(comparable(decoupled.state_dict()), expected.state)  # closed, and still here
    assert decoupled(batches[0][0]).shape == (8, 4)


def test_hyper_parameters_that_the_caller_changes() -> None:
    """A schedule by hand: the optimizers that the caller sees are not those that train."""
    batches = make_batches("norm", [8] * 6)
    states = []
    for executor in ("inline", "processes"):
        with compiled("norm", 3, executor=executor, optimizer=sgd) as decoupled:
            for number, (x, y) in enumerate(batches):
                for optimizer in decoupled.optimizers:
                    optimizer.param_groups[0]["lr"] = 0.1 / (1 + number // 2)
                decoupled.train_step(x, y)
            states.append(comparable(decoupled.state_dict()))
    assert_same(*states)


def test_parameters_that_get_other_memory() -> None:
    """`parameter.data = ...` and load_state_dict(assign=True) take a tensor's shared memory away."""
    batches = make_batches("norm", [8] * 4)
    states = []
    for executor in ("inline", "processes"):
        with compiled("norm", 2, executor=executor, optimizer=adam) as decoupled:
            for number, (x, y) in enumerate(batches):
                if number == 2:
                    for parameter in decoupled.model.parameters():
                        parameter.data = parameter.data * 0.5
                decoupled.train_step(x, y)
            states.append(comparable(decoupled.state_dict()))
    assert_same(*states)


# ---------------------------------------------------------------- the caller's state


def test_autocast_of_the_caller_reaches_the_workers() -> None:
    batches = make_batches("norm", [8] * 3)
    results = []
    for executor in ("inline", "processes"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(train(compiled("norm", 2, executor=executor), batches))
    assert results[0].outputs[0].dtype == torch.bfloat16
    assert_same(*results)


def test_saved_tensors_hooks_are_refused() -> None:
    with (
        compiled("norm", 2, executor="processes") as decoupled,
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        pytest.raises(InputError, match="saved_tensors_hooks"),
    ):
        decoupled.train_step(*make_batches("norm", [8])[0])


def test_where_it_cannot_work_it_says_so() -> None:
    with mock.patch.object(torch.cuda, "is_initialized", lambda: True), pytest.raises(InputError, match="CUDA"):
        compiled("norm", 2, executor="processes")
    with (
        mock.patch.object(multiprocessing, "get_all_start_methods", lambda: ["spawn"]),
        pytest.raises(InputError, match="forks"),
    ):
        compiled("norm", 2, executor="processes")


def test_targets_that_cannot_leave_the_process() -> None:
    with compiled("norm", 2, "bp", executor="processes", criterion=lambda out, target: out.sum()) as decoupled:
        with pytest.raises(InputError, match="cannot be sent to another process"):
            decoupled.train_step(make_batches("norm", [8])[0][0], {"of": threading.Lock()})
        decoupled.train_step(make_batches("norm", [8])[0][0], {"of": 3})


# ---------------------------------------------------------------- failures


class TwoArguments(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@contextlib.contextmanager
def at(stage: int, batch: int, act: Callable[[], Any], op: Op = Op.LOSS) -> Iterator[None]:
    def hook(job: Job, action: Action) -> None:
        if (action.stage, action.op, job.index) == (stage, op, batch):
            act()

    with before_actions(hook):
        yield


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("stage", "error", "kind"),
    [
        (0, ValueError("boom"), ValueError),
        (1, ValueError("boom"), ValueError),
        (2, ValueError("boom"), ValueError),
        (1, SystemExit(3), SystemExit),
        (0, KeyboardInterrupt("boom"), KeyboardInterrupt),
        (2, TwoArguments(3, "boom"), PeerError),
    ],
    ids=repr,
)
def test_an_error_arrives_with_its_type_and_place(stage: int, error: BaseException, kind: type[BaseException]) -> None:
    batches = make_batches("norm", [8] * 30)
    with at(stage, 3, fail(error)):
        decoupled = compiled("norm", 3, executor="processes")
        with pytest.raises(kind) as caught:
            train(decoupled, batches)
    notes = "\n".join(caught.value.__notes__)
    assert f"in loss of stage {stage} of 3" in notes and "batch 3" in notes and "in act" in notes
    if kind is PeerError:
        assert "TwoArguments: 3: boom" in str(caught.value)


def test_after_an_error_training_goes_on_without_the_batch() -> None:
    """Batches before it are trained on every stage, and the new workers begin with what the old ones told."""
    batches = make_batches("norm", [8] * 6)
    expected = train(compiled("norm", 3, executor="inline", optimizer=adam), [*batches[:2], *batches[3:]])
    with compiled("norm", 3, executor="processes", optimizer=adam) as decoupled:
        with at(0, 2, fail(ValueError("boom")), Op.FORWARD), pytest.raises(ValueError, match="boom"):
            for x, y in batches[:3]:
                decoupled.train_step(x, y)
            decoupled.synchronize()
        for x, y in batches[3:]:
            decoupled.train_step(x, y)
        found = comparable(decoupled.state_dict())
    assert_same(
        {n: v for n, v in found.items() if n != "step"}, {n: v for n, v in expected.state.items() if n != "step"}
    )


def test_a_loss_that_is_not_finite() -> None:
    x, y = make_batches("norm", [8])[0]
    with compiled("norm", 2, executor="processes") as decoupled:
        decoupled.train_step(x * float("nan"), y)
        with pytest.raises(NonFiniteLossError, match="the loss of stage 0"):
            decoupled.synchronize()


@pytest.mark.parametrize("lane", slow_but([1], [0, 1, 2]))
def test_a_killed_worker_is_named_and_its_state_can_be_loaded_again(lane: int) -> None:
    batches = make_batches("norm", [8] * 30)
    decoupled = compiled("norm", 3, executor="processes", optimizer=adam)
    expected = train(compiled("norm", 3, executor="inline", optimizer=adam), batches[:2]).state
    decoupled = compiled("norm", 3, executor="processes", optimizer=adam)
    with decoupled:
        start = decoupled.state_dict()
        decoupled.train_step(*batches[0])
        pids = pids_of(decoupled)
        os.kill(pids[lane], signal.SIGKILL)
        with pytest.raises(PeerError, match=rf"lane {lane} \(stage {lane}\) was killed by SIGKILL"):
            for x, y in batches:
                decoupled.train_step(x, y)
            decoupled.synchronize()
        assert not any(map(is_alive, pids))
        with pytest.raises(ClosedError, match=rf"optimizer state of stages \[{lane}\]"):
            decoupled.train_step(*batches[0])
        decoupled.load_state_dict(start)
        for x, y in batches[:2]:
            decoupled.train_step(x, y)
        assert_same(comparable(decoupled.state_dict()), expected)


def test_ctrl_c_leaves_the_workers_alone() -> None:
    """The terminal sends it to all processes of a group; the caller answers, and may go on."""
    batches = make_batches("norm", [8] * 8)
    expected = train(compiled("norm", 2, executor="inline"), batches)
    with compiled("norm", 2, executor="processes") as decoupled:
        for x, y in batches[:4]:
            decoupled.train_step(x, y)
        for pid in pids_of(decoupled):
            os.kill(pid, signal.SIGINT)
        with at(0, 4, lambda: time.sleep(0.5), Op.FORWARD), pytest.raises(KeyboardInterrupt):
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            while True:
                time.sleep(0.05)
                decoupled.synchronize()
        for x, y in batches[4:]:
            decoupled.train_step(x, y)
        assert_same(comparable(decoupled.state_dict()), expected.state)


def test_a_pipeline_that_nobody_closes_goes_with_its_last_reference() -> None:
    decoupled = compiled("norm", 2, executor="processes")
    decoupled.train_step(*make_batches("norm", [8])[0])
    pids = pids_of(decoupled)
    del decoupled
    gc.collect()
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_leaving_by_an_error_of_the_loop() -> None:
    with pytest.raises(RuntimeError, match="mine"), compiled("norm", 2, executor="processes") as decoupled:
        decoupled.train_step(*make_batches("norm", [8])[0])
        pids = pids_of(decoupled)
        raise RuntimeError("mine")
    assert not any(map(is_alive, pids))


# ---------------------------------------------------------------- scripts

SCRIPT = """
import os, signal, sys
import torch
from torch import nn
import autodecouple

def main(end):
    torch.set_num_threads(2)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    model(torch.randn(512, 64)).sum().backward()  # the parent's OpenMP threads are running
    model.zero_grad()
    x, y = torch.randn(512, 64), torch.randint(4, (512,))
    def criterion(output, target):
        while target.min() == 3:  # for ever
            pass
        return nn.functional.cross_entropy(output, target)
    devices = ["cpu"] * 2
    decoupled = autodecouple.compile(
        model, 2, "early_exit", devices=devices, example_inputs=(x,), executor="processes", criterion=criterion
    )
    for _ in range(5):
        step = decoupled.train_step(x, y)
    print(*decoupled._pipeline.executor._crew.pids, flush=True)
    if end == "hang":
        decoupled.train_step(x, torch.full((512,), 3))
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raise":
        raise ValueError("mine")
    return decoupled

kept = main(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("forget", 0), ("raise", 1), ("kill", -9), ("hang", 0)])
def test_no_process_outlives_a_script(end: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(script), end], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50
    )
    assert run.returncode == code, run.stderr
    pids = [int(pid) for pid in run.stdout.split()]
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(is_alive, pids))
    if end == "forget":
        assert not run.stderr
