"""Ranks train what one process would, to the last bit; when one fails all end, with its error, and none hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_tools import Outcome, forked_ranks, free_port, run_ranks
from torch import nn
from training_tools import (
    Batch,
    Encoding,
    Result,
    assert_same,
    before_actions,
    comparable,
    compiled,
    delays,
    make_batches,
    sgd,
    train,
)

from autodecouple.errors import InputError
from autodecouple.executors.gloo import GlooLinks
from autodecouple.executors.job import Job
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Streaming
from autodecouple.schedules.actions import Action, Op

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def spread(size: int, kind: str, n_stages: int, loss: Any, batches: Sequence[Batch], **options: Any) -> list[Outcome]:
    """Train on ranks; only the first is given the batches."""
    compiled(kind, n_stages, loss, executor="inline", **_local(options)).close()  # captured once, for all

    def rank(number: int) -> Any:
        decoupled = compiled(kind, n_stages, loss, devices=None, executor="distributed", **options)
        own = batches if number == 0 else [(None, None)] * len(batches)
        return decoupled.plan.lanes[number], train(decoupled, own)  # type: ignore[arg-type]

    return run_ranks(size, rank)


def _local(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("schedule", "devices")}


def assert_equal_to(expected: Result, outcomes: Sequence[Outcome]) -> None:
    """Every rank has its own losses and the whole state; the last one has the outputs."""
    for outcome in outcomes:
        assert outcome.error is None, outcome.message
        assert outcome.exit_code == 0
        stages, found = outcome.value
        own = [tuple(loss if s in stages else None for s, loss in enumerate(losses)) for losses in expected.losses]
        assert found.losses == own
        assert_same(found.state, expected.state)
        assert_same(found.outputs, expected.outputs if outcome is outcomes[-1] else [None] * len(expected.outputs))


SIZES = [8, 8, 8, 3, 8, 5]
FIFTY = [8] * 48 + [3, 1]

CASES: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "two ranks": (2, 2, "supcon", {"optimizer": adam}),
    "four ranks, four objectives": (4, 4, ["supcon", "deinforeg", "early_exit"], {"optimizer": sgd}),
    "two ranks of two stages each, a queue of one": (2, 4, "early_exit", {"schedule": Streaming(queue_depth=1)}),
    "a barrier": (3, 3, "supcon", {"schedule": Streaming(barrier=True)}),
    "micro-batches": (3, 4, ["supcon", "early_exit", "supcon"], {"schedule": MicroBatched(num_micro_batches=3)}),
    "a signal that skips a lane": (4, 4, [Encoding(), "bp", Encoding()], {}),
    "encodings of the labels": (3, 4, "associated", {"optimizer": adam}),
    "coupled stages on several ranks": (3, 4, ["bp", "supcon", "bp"], {"optimizer": adam}),
    "overlapping stages": (4, 4, "loco", {"optimizer": adam}),
    "overlapping stages, two on each rank": (2, 4, "loco", {"schedule": MicroBatched(num_micro_batches=3)}),
    "half an accumulation": (2, 3, "deinforeg", {"accumulate": 4, "clip_grad_norm": 0.5}),
}


QUICK = (
    "four ranks, four objectives", "a signal that skips a lane", "coupled stages on several ranks",
    "overlapping stages",
)  # fmt: skip


def slow_but(quick: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.dist
@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_ranks_equal_one_process(case: str) -> None:
    """Losses, outputs and the whole state, to the last bit, with dropout, BatchNorm and smaller batches between."""
    size, n_stages, loss, options = CASES[case]
    batches = make_batches("dropout", SIZES)
    schedule = options.get("schedule")
    count = schedule.num_micro_batches if schedule is not None else 1
    reference = MicroBatched(num_micro_batches=count) if count > 1 else "sequential"
    expected = train(
        compiled("dropout", n_stages, loss, **{**options, "executor": "inline", "schedule": reference}), batches
    )
    assert_equal_to(expected, spread(size, "dropout", n_stages, loss, batches, **options))


@pytest.mark.dist
@pytest.mark.parametrize(
    "schedule", slow_but([], [GPipe(num_micro_batches=3), OneFOneB(num_micro_batches=3)]), ids=repr
)
def test_schedules_of_backprop_on_ranks(schedule: Schedule) -> None:
    """Gradients travel back, and with them whether the loss may be trained on."""
    batches = make_batches("plain", [8, 8, 3, 8])
    expected = train(compiled("plain", 3, "bp", schedule=schedule, executor="inline"), batches)
    assert_equal_to(expected, spread(3, "plain", 3, "bp", batches, schedule=schedule))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_fifty_batches(size: int) -> None:
    batches = make_batches("dropout", FIFTY[:-1])
    loss = ["supcon", "deinforeg", "early_exit"]
    expected = train(compiled("dropout", 4, loss, executor="inline", optimizer=adam), batches)
    assert_equal_to(expected, spread(size, "dropout", 4, loss, batches, optimizer=adam))


@pytest.mark.dist
def test_the_first_rank_may_write_into_its_inputs_again() -> None:
    """What leaves it as it was given, such as the labels, is still under way when train_step returns."""
    batches = make_batches("norm", [8] * 12)
    expected = train(compiled("norm", 2, executor="inline"), batches)

    def rank(number: int) -> Any:
        decoupled = compiled("norm", 2, devices=None, executor="distributed")
        x, y = (torch.empty_like(part) for part in batches[0])
        with decoupled, delays(3, 0.02 if number else 0.0):
            for inputs, target in batches:
                x.copy_(inputs)
                y.copy_(target)
                decoupled.train_step(x, y)
            return comparable(decoupled.state_dict())

    for outcome in run_ranks(2, rank):
        assert_same(outcome.value, expected.state)


# ---------------------------------------------------------------- what is read, kept and loaded


@pytest.mark.slow
@pytest.mark.dist
def test_a_state_goes_over_between_ranks_and_one_process() -> None:
    """Three batches on ranks, three in one process, and the other way round: as six in one process. A second reading
    without training in between is the same, and evaluating is possible on every rank."""
    batches = make_batches("dropout", [8, 8, 5, 8, 3, 8])
    options: dict[str, Any] = {"optimizer": adam, "accumulate": 2}
    expected = train(compiled("dropout", 3, executor="inline", **options), batches)

    def first(number: int) -> Any:
        with compiled("dropout", 3, devices=None, executor="distributed", **options) as decoupled:
            for x, y in batches[:3]:
                decoupled.train_step(x, y)
            output = decoupled(batches[0][0])
            assert torch.equal(output, decoupled(batches[0][0]))
            assert decoupled.evaluate(batches[:2])["loss"] > 0
            return decoupled.state_dict(), output

    halves = [outcome.value for outcome in run_ranks(3, first)]
    for state, output in halves:
        assert_same(comparable(state), comparable(halves[0][0]))
        assert torch.equal(output, halves[0][1])
    with compiled("dropout", 3, executor="inline", **options) as decoupled:
        decoupled.load_state_dict(halves[1][0])
        assert_same(train(decoupled, batches[3:]).state, expected.state)
    with compiled("dropout", 3, executor="inline", **options) as decoupled:
        half = train(decoupled, batches[:3]).state
        whole = decoupled.state_dict()
    assert_same(half, comparable(halves[2][0]))

    def second(number: int) -> Any:
        with compiled("dropout", 3, devices=None, executor="distributed", **options) as decoupled:
            decoupled.load_state_dict(whole)
            return train(decoupled, batches[3:]).state

    for outcome in run_ranks(3, second):
        assert_same(outcome.value, expected.state)


# ---------------------------------------------------------------- failures


@contextlib.contextmanager
def at(stage: int, batch: int, act: Callable[[], None]) -> Any:
    """Do something before a stage's loss of a batch."""

    def hook(job: Job, action: Action) -> None:
        if (action.stage, action.op, job.index) == (stage, Op.LOSS, batch):
            act()

    with before_actions(hook):
        yield


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def run_into(size: int, stage: int, act: Callable[[], None], afterwards: float = 0.0) -> list[Outcome]:
    """Ranks that train for long, on one of which something happens in the third batch; it may live on for a while."""
    compiled("norm", size, executor="inline").close()
    batches = make_batches("norm", [8] * 200)

    def rank(number: int) -> Any:
        decoupled = compiled("norm", size, devices=None, executor="distributed")
        try:
            with at(stage, 2, act):
                train(decoupled, batches)
        except BaseException:
            if number == stage:
                time.sleep(afterwards)
            raise

    return run_ranks(size, rank)


@pytest.mark.dist
@pytest.mark.parametrize("stage", slow_but([1], [0, 1, 2]))
def test_an_error_on_one_rank_ends_all_with_its_name(stage: int) -> None:
    """Also where the rank catches its error and goes on to live: nobody waits for it."""
    outcomes = run_into(3, stage, fail(ValueError("boom")), afterwards=5.0)
    own = outcomes.pop(stage)
    assert own.error == "ValueError" and "boom" in own.message and f"loss of stage {stage}" in own.message
    for outcome in outcomes:
        assert outcome.error == "PeerError", outcome
        assert f"rank {stage} (stage {stage}) failed: ValueError: boom" in outcome.message
        assert f"loss of stage {stage} of 3" in outcome.message and "batch 2" in outcome.message
        assert outcome.seconds < 30


@pytest.mark.dist
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), InputError("mine")], ids=repr)
def test_whatever_is_raised_ends_all(error: BaseException) -> None:
    outcomes = run_into(2, 1, fail(error))
    assert [outcome.error for outcome in outcomes] == ["PeerError", type(error).__name__]
    assert type(error).__name__ in outcomes[0].message


@pytest.mark.dist
@pytest.mark.parametrize("rank", slow_but([1], [1, 2, 3]))
def test_a_killed_rank_is_named(rank: int) -> None:
    outcomes = run_into(4, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert outcomes.pop(rank).exit_code == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.error == "PeerError" and outcome.seconds < 30
        assert f"rank {rank} (stage {rank}) is gone" in outcome.message


@pytest.mark.dist
def test_the_rank_with_the_store_is_killed() -> None:
    """With torchrun the store outlives the ranks; without, rank 0 takes it along, and the rest can only say so."""
    outcomes = run_into(3, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert [outcome.error for outcome in outcomes] == ["killed", "PeerError", "PeerError"]
    assert "rank 0 (stage 0) is gone" in outcomes[1].message and "gone" in outcomes[2].message


@pytest.mark.dist
@pytest.mark.parametrize(
    ("counts", "says"),
    [((5, 4), "waits for all batches"), ((4, 5), "trains batch 4")],
    ids=["the first has more", "the second has more"],
)
def test_ranks_with_other_numbers_of_batches(counts: tuple[int, int], says: str) -> None:
    compiled("norm", 2, executor="inline").close()

    def rank(number: int) -> Any:
        decoupled = compiled("norm", 2, devices=None, executor="distributed")
        train(decoupled, make_batches("norm", [8] * counts[number]))

    outcomes = run_ranks(2, rank)
    assert sorted(str(outcome.error) for outcome in outcomes) == ["InputError", "PeerError"], outcomes
    assert all("not at the same place" in outcome.message and says in outcome.message for outcome in outcomes)


@pytest.mark.dist
def test_reading_on_one_rank_only_is_refused() -> None:
    """`if rank == 0: decoupled.save(...)` is everybody's habit, and would hang."""
    compiled("norm", 2, executor="inline").close()

    def rank(number: int) -> Any:
        with compiled("norm", 2, devices=None, executor="distributed") as decoupled:
            for x, y in make_batches("norm", [8] * 3):
                decoupled.train_step(x, y)
            if number == 0:
                decoupled.state_dict()
            for x, y in make_batches("norm", [8] * 3):
                decoupled.train_step(x, y)

    outcomes = run_ranks(2, rank)
    assert [outcome.error for outcome in outcomes] == ["PeerError", "InputError"]
    assert "state_dict()" in outcomes[1].message


@pytest.mark.dist
@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_may_leave_long_after_the_others(late: int) -> None:
    """Rank 0 wrote the state to a file, the others closed and were gone: it said that they had been killed."""
    compiled("norm", 3, executor="inline").close()

    def rank(number: int) -> Any:
        waits_less = mock.patch.object(GlooLinks.end, "__defaults__", (0.1,))
        with waits_less, compiled("norm", 3, devices=None, executor="distributed") as decoupled:
            train_steps = [decoupled.train_step(x, y) for x, y in make_batches("norm", [8] * 3)]
            decoupled.state_dict()
            time.sleep(1.0 if number == late else 0.0)
            return len(train_steps)

    with forked_ranks(3, lambda number: (rank(number), time.sleep(2.0 if number == 0 else 0.0))) as ranks:
        assert [outcome.error for outcome in (each.outcome() for each in ranks)] == [None] * 3


@pytest.mark.dist
def test_other_plans_are_refused_on_every_rank() -> None:
    compiled("norm", 2, executor="inline").close()

    def rank(number: int) -> Any:
        compiled("norm", 2, devices=None, executor="distributed", cut_at=("1" if number < 2 else "3",), loss="bp")

    for outcome in run_ranks(2, lambda number: rank(2 * number)):
        assert outcome.error == "PlanError"
        assert "first difference is in the cuts [0]" in outcome.message and "rank 1" in outcome.message


@pytest.mark.dist
def test_another_number_of_processes_is_refused() -> None:
    compiled("norm", 2, executor="inline").close()
    outcomes = run_ranks(3, lambda number: compiled("norm", 2, devices=None, executor="distributed"))
    assert [outcome.error for outcome in outcomes] == ["InputError"] * 3
    assert "there are 3 processes, but the plan has 2 lanes" in outcomes[0].message


def test_without_other_processes() -> None:
    with pytest.raises(InputError, match="torchrun --nproc-per-node"):
        compiled("norm", 2, executor="distributed")


# ---------------------------------------------------------------- scripts

SCRIPT = """
import os, sys
import torch
from torch import nn
import torch.distributed as dist
import autodecouple

torch.set_num_threads(1)
torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4)]
model = nn.Sequential(*layers, nn.Linear(6, 4))
rank = int(os.environ.get("RANK", "0"))
how = sys.argv[1:]
if "group" in how:
    dist.init_process_group("gloo")
options = {"executor": "inline"} if "inline" in how else {}
decoupled = autodecouple.compile(model, 2, "early_exit", example_inputs=torch.randn(8, 6), **options)
generator = torch.Generator().manual_seed(1)
steps = []
for batch, rows in enumerate([8] * 48 + [3, 2]):
    x, y = torch.randn(rows, 6, generator=generator), torch.randint(4, (rows,), generator=generator)
    if "error" in how and rank == 0 and batch == 5:
        raise RuntimeError("of the loader")
    steps.append(decoupled.train_step(x, y) if rank == 0 else decoupled.train_step(None))
if "group" in how:
    dist.barrier()
    dist.destroy_process_group()  # is not ours
state = decoupled.state_dict()["model"]
with open(f"{__file__}.{'inline' if 'inline' in how else rank}", "w") as file:
    for step in steps:
        for stage, loss in enumerate(step.losses):
            if loss is not None:
                print("loss", step.batch, stage, loss.hex(), file=file)
    for name, value in state.items():
        print("state", name, value.double().sum().item().hex(), file=file)
"""


def script(folder: Path) -> str:
    file = folder / "script.py"
    file.write_text(SCRIPT)
    return str(file)


def assert_told_the_same(folder: Path) -> None:
    """What the ranks wrote, together, is what one process wrote."""
    expected, *found = ((folder / f"script.py.{name}").read_text().splitlines() for name in ("inline", 0, 1))
    states = [[line for line in lines if line.startswith("state")] for lines in (expected, *found)]
    assert states[1] == states[2] == states[0]
    assert len(expected) == 100 + len(states[0])
    assert {*found[0], *found[1]} == {*expected}


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["group"]], ids=["alone", "beside a group of the user's"])
def test_the_same_script_under_torchrun(how: list[str], tmp_path: Path) -> None:
    """No argument says so, the second rank has no data, and nobody closes anything."""
    expected = start([sys.executable, script(tmp_path), "inline"])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    found = start([sys.executable, *launch, script(tmp_path), *how])
    errors = [process.communicate(timeout=60)[1] for process in (expected, found)]
    assert [expected.returncode, found.returncode] == [0, 0], errors
    assert_told_the_same(tmp_path)


@pytest.mark.dist
@pytest.mark.slow
def test_an_error_of_the_loop_is_known_to_all(tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, script(tmp_path), "error"]
    ranks = [start(command, RANK=str(rank), **environment) for rank in range(2)]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "PeerError: rank 0 (stage 0) failed: RuntimeError: of the loader" in errors[1]


def namespaces() -> list[str]:
    """Two network namespaces with a cable between them; none where that is not allowed."""
    names = [f"autodecouple{number}" for number in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add adc0 netns {names[0]} type veth peer name adc1 netns {names[1]}")
    for number, name in enumerate(names):
        commands.append(f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev adc{number}")
        commands += [f"ip -n {name} link set {device} up" for device in ("lo", f"adc{number}")]
    made = shutil.which("ip") is not None and all(
        subprocess.run(command.split(), capture_output=True).returncode == 0 for command in commands
    )
    return names if made else []


@pytest.mark.dist
@pytest.mark.slow
def test_two_hosts(tmp_path: Path) -> None:
    """Each in a network namespace of its own, with nothing but a cable between them."""
    try:
        names = namespaces()
        if not names:
            pytest.skip("network namespaces cannot be made here")
        expected = start([sys.executable, script(tmp_path), "inline"])
        environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "LOCAL_RANK": "0"}
        ranks = [
            start(
                ["ip", "netns", "exec", name, sys.executable, script(tmp_path)],
                RANK=str(rank),
                GLOO_SOCKET_IFNAME=f"adc{rank}",
                **environment,
            )
            for rank, name in enumerate(names)
        ]
        outputs = [rank.communicate(timeout=90) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outputs
        expected.communicate(timeout=60)
        assert_told_the_same(tmp_path)
    finally:
        for number in range(2 if shutil.which("ip") else 0):
            subprocess.run(["ip", "netns", "del", f"autodecouple{number}"], capture_output=True)
