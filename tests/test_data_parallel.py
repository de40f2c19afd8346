"""Lanes times replicas train what one process would on the global batch, and all replicas the same to the last bit.

Not equal to the one process to the last bit: a sum over rows is taken in other parts, so that numbers differ by
rounding. In float64 after 24 batches they agree to 1e-11, some thousand times the rounding of one number; a mask, a
label or a row that is not the right one shows at once, as 1e-2.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tools import Outcome, run_ranks
from replica_tools import (
    Encoding,
    assert_close,
    captured,
    compiled,
    global_batches,
    one_process,
    parts,
    replicated,
    sgd,
    shards,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from training_tools import Result, assert_same, before_actions, comparable, train

import autodecouple
from autodecouple import DataParallel
from autodecouple.errors import InputError
from autodecouple.executors.job import Job
from autodecouple.executors.world import Grid
from autodecouple.objectives import LoCo, SupCon
from autodecouple.schedules import MicroBatched
from autodecouple.schedules.actions import Action, Op

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]

TOLERANCE = 1e-11
EQUAL = [parts(8, 2)] * 20
ROWS = [*EQUAL, parts(5, 2), parts(8, 2), (1, 4), parts(3, 2)]
"""Of two replicas: 24 batches, the last ones smaller, and their shards of unequal size."""
TOGETHER = DataParallel(2, gather=True)


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def assert_equal_to(expected: Result, outcomes: Sequence[Outcome], lanes: int) -> None:
    """Every rank knows the losses of its lane, of the global batch, and the whole state; all ranks the same."""
    for outcome in outcomes:
        assert outcome.error is None, outcome.message
        assert_close(outcome.value.state, expected.state, TOLERANCE)
        assert_same(outcome.value.state, outcomes[0].value.state)
    replicas = len(outcomes) // lanes
    for batch, losses in enumerate(expected.losses):
        for stage, loss in enumerate(losses):
            known = [outcome.value.losses[batch][stage] for outcome in outcomes]
            known = [number for number in known if number is not None]
            assert known == [known[0]] * replicas if loss is not None else not known
            assert loss is None or known[0] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)


CASES: dict[str, tuple[str, int, Any, Any, dict[str, Any]]] = {
    "contrastive, gathered": ("vectors", 2, "supcon", TOGETHER, {"optimizer": adam}),
    "regularised, gathered": ("vectors", 2, "deinforeg", TOGETHER, {}),
    "early exits, each its own": ("vectors", 2, "early_exit", 2, {"optimizer": adam}),
    "an objective that knows of no replicas": ("vectors", 4, [Encoding(), "bp", Encoding()], TOGETHER, {}),
    "accumulated and clipped": ("vectors", 2, "supcon", TOGETHER, {"accumulate": 3, "clip_grad_norm": 0.1}),
    "recomputed": ("vectors", 2, "early_exit", 2, {"recompute": True}),
    "overlapping stages on two lanes": ("vectors", 4, LoCo(SupCon()), TOGETHER, {}),
    "coupled stages on two lanes": ("vectors", 4, ["bp", "early_exit", "bp"], 2, {}),
    "coupled lanes": ("vectors", 2, "bp", 2, {"clip_grad_norm": 0.5}),
    "attention, on either order of dimensions": ("tokens", 4, ["supcon", "early_exit", "deinforeg"], TOGETHER, {}),
}  # fmt: skip
QUICK = ("contrastive, gathered", "early exits, each its own")


def slow_but(quick: Sequence[str], cases: Sequence[str]) -> list[Any]:
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.dist
@pytest.mark.parametrize("case", slow_but(QUICK, list(CASES)))
def test_two_lanes_of_two_replicas_equal_one_process(case: str) -> None:
    """With dropout, and shards of unequal size: losses of every batch, and the whole state at the end."""
    kind, n_stages, loss, data, options = CASES[case]
    options = {"optimizer": sgd, **options}
    batches = global_batches(kind, [sum(sizes) for sizes in ROWS])
    expected = one_process(kind, n_stages, loss, batches, **options)
    assert_equal_to(expected, replicated(2, data, kind, n_stages, loss, ROWS, **options), 2)


@pytest.mark.dist
@pytest.mark.parametrize("loss", ["early_exit", pytest.param("supcon", marks=pytest.mark.slow)])
def test_synchronised_norms_see_the_global_batch(loss: str) -> None:
    """Where the model has SyncBatchNorm: normalised by the rows of all replicas, also where shards are unequal."""
    rows = [parts(8, 2)] * 20 + [(3, 2), (2, 5)]
    batches = global_batches("synced", [sum(sizes) for sizes in rows])
    expected = one_process("synced", 2, loss, batches, optimizer=sgd)
    assert_equal_to(expected, replicated(2, TOGETHER, "synced", 2, loss, rows, optimizer=sgd), 2)


@pytest.mark.dist
@pytest.mark.slow
def test_micro_batches_of_replicas_are_not_those_of_the_global_batch() -> None:
    """Three of 4 rows and three of 3 are other slices than three of 7; masks are those of the global batch all the
    same, and means over rows do not depend on how they are sliced."""
    rows = [(4, 4), (4, 3), (3, 4)] * 8
    options: dict[str, Any] = {"optimizer": sgd, "schedule": MicroBatched(num_micro_batches=3)}
    batches = global_batches("vectors", [sum(sizes) for sizes in rows])
    expected = one_process("vectors", 3, "supcon", batches, **options)
    assert_equal_to(expected, replicated(3, TOGETHER, "vectors", 3, "supcon", rows, **options), 3)


@pytest.mark.dist
def test_replicas_do_not_depend_on_the_pipeline() -> None:
    """To the last bit: two replicas of one lane with both stages, and of two lanes with one each."""
    rows = [parts(7, 2)] * 6
    wide = replicated(1, 2, "vectors", 2, "early_exit", rows, optimizer=sgd, devices=["cpu"])
    long = replicated(2, 2, "vectors", 2, "early_exit", rows, optimizer=sgd)
    for outcome in (*wide, *long):
        assert outcome.error is None, outcome.message
        assert_same(outcome.value.state, wide[0].value.state)


@pytest.mark.dist
@pytest.mark.slow
def test_three_replicas_and_a_mesh_that_counts_lanes_first() -> None:
    rows = [parts(8, 3), (2, 1, 3)] * 5
    expected = one_process("vectors", 2, "supcon", global_batches("vectors", [8, 6] * 5), optimizer=sgd)
    assert_equal_to(
        expected, replicated(2, DataParallel(3, gather=True), "vectors", 2, "supcon", rows, optimizer=sgd), 2
    )
    captured("vectors")
    batches = global_batches("vectors", [8, 6] * 5)

    def rank(number: int) -> Any:
        replica, lane = divmod(number, 2)
        data = DataParallel(3, gather=True, ranks=((0, 2, 4), (1, 3, 5)))
        decoupled = compiled("vectors", 2, "supcon", executor="distributed", data_parallel=data, optimizer=sgd)
        own = shards(batches, rows, replica) if lane == 0 else [(None, None)] * len(batches)
        return train(decoupled, own)  # type: ignore[arg-type]

    assert_equal_to(expected, run_ranks(6, rank), 2)


@pytest.mark.dist
def test_other_weights_on_other_replicas_are_those_of_the_first() -> None:
    """A script that seeds by rank, or not at all, trains one model all the same, as with DDP."""
    rows = [parts(8, 2)] * 4
    batches = global_batches("vectors", [8] * 4)
    expected = one_process("vectors", 2, "early_exit", batches, optimizer=sgd)
    found = captured("vectors")

    def rank(number: int) -> Any:
        replica = number % 2
        if replica:
            found.initial.update({name: value + 1 for name, value in found.initial.items()})
        decoupled = compiled("vectors", 2, "early_exit", executor="distributed", data_parallel=2, optimizer=sgd)
        return train(decoupled, shards(batches, rows, replica))

    assert_equal_to(expected, run_ranks(4, rank), 2)


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.dist
@pytest.mark.parametrize("replica", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_replicas_leave_out_a_batch_together(replica: int) -> None:
    """One replica's rows give no finite loss on the last stage: none of them updates it, and all the others do."""
    rows = [parts(8, 2)] * 6
    batches = global_batches("vectors", [8] * 6)
    batches[2] = (batches[2][0].clone(), batches[2][1])
    batches[2][0][3 if replica == 0 else 5] = float("inf")
    options: dict[str, Any] = {"optimizer": sgd, "on_nonfinite": "skip", "accumulate": 2}
    expected = one_process("vectors", 2, "early_exit", batches, **options)
    captured("vectors")

    def rank(number: int) -> Any:
        decoupled = compiled(
            "vectors", 2, "early_exit", executor="distributed", data_parallel=DataParallel(2), **options
        )
        result = train(decoupled, shards(batches, rows, number % 2))
        return result, [stage.skipped for stage in decoupled.stages]

    for outcome in run_ranks(4, rank):
        assert outcome.error is None, outcome.message
        assert outcome.value[1] == [1, 1]
        assert_close(outcome.value[0].state, expected.state, TOLERANCE)


@pytest.mark.dist
def test_replicas_raise_together() -> None:
    batches = global_batches("vectors", [8] * 6)
    batches[2] = (batches[2][0] * float("nan"), batches[2][1])
    captured("vectors")

    def rank(number: int) -> Any:
        decoupled = compiled("vectors", 2, "early_exit", executor="distributed", data_parallel=2, optimizer=sgd)
        clean = [(x.nan_to_num() if number % 2 == 0 else x, y) for x, y in batches]
        train(decoupled, clean)

    outcomes = run_ranks(4, rank)
    assert {outcomes[0].error, outcomes[1].error} <= {"NonFiniteLossError", "PeerError"}
    assert all("the loss of stage" in outcome.message for outcome in outcomes)


# ---------------------------------------------------------------- states


@pytest.mark.dist
def test_a_checkpoint_goes_on_with_another_number_of_replicas(tmp_path: Path) -> None:
    """Four batches on 2 x 2, with an accumulation under way, four in one process, four on 1 x 3: as in one process."""
    batches = global_batches("vectors", [7] * 12)
    options: dict[str, Any] = {"optimizer": adam, "accumulate": 3}
    expected = one_process("vectors", 2, "supcon", batches, **options)

    def run(lanes: int, replicas: int, start: int, load: str | None, save: str) -> list[Outcome]:
        def rank(number: int) -> Any:
            replica = number % replicas
            data, devices = DataParallel(replicas, gather=True), ["cpu"] * lanes
            decoupled = compiled(
                "vectors", 2, "supcon", devices=devices, executor="distributed", data_parallel=data, **options
            )
            if load is not None:
                decoupled.load(tmp_path / load)
            with decoupled:
                for x, y in shards(batches[start : start + 4], [parts(7, replicas)] * 4, replica):
                    decoupled.train_step(x, y)
                decoupled.save(tmp_path / save)
                return comparable(decoupled.state_dict())

        return run_ranks(lanes * replicas, rank)

    first = run(2, 2, 0, None, "first")
    assert [outcome.error for outcome in first] == [None] * 4, first
    with compiled("vectors", 2, "supcon", executor="inline", devices=["cpu"], **options) as decoupled:
        decoupled.load(tmp_path / "first")
        for x, y in batches[4:8]:
            decoupled.train_step(x, y)
        decoupled.save(tmp_path / "second")
    last = run(1, 3, 8, "second", "third")
    for outcome in last:
        assert outcome.error is None, outcome.message
        assert_close(outcome.value, expected.state, TOLERANCE)


@pytest.mark.dist
def test_statistics_are_those_of_the_first_replica() -> None:
    """BatchNorm sees its own rows, as in DDP; what is read is the first replica's, on all ranks."""
    from training_tools import compiled as tiny
    from training_tools import make_batches

    tiny("norm", 2, executor="inline").close()
    batches = make_batches("norm", [8] * 4)

    def rank(number: int) -> Any:
        decoupled = tiny("norm", 2, "early_exit", devices=None, executor="distributed", data_parallel=2)
        shard = slice(4 * (number % 2), 4 * (number % 2) + 4)
        result = train(decoupled, [(x[shard], y[shard]) for x, y in batches])
        return result.state, decoupled(batches[0][0])

    outcomes = run_ranks(4, rank)
    for outcome in outcomes:
        assert outcome.error is None, outcome.message
        assert_same(outcome.value, outcomes[0].value)
    alone = tiny("norm", 2, "early_exit", executor="inline")
    x, y = batches[0]
    with alone:
        alone.train_step(x[:4], y[:4])
        first = alone.state_dict()["model"]["0.1.running_mean"]

    def one(number: int) -> Any:
        decoupled = tiny("norm", 2, "early_exit", devices=None, executor="distributed", data_parallel=2)
        shard = slice(4 * (number % 2), 4 * (number % 2) + 4)
        return train(decoupled, [(x[shard], y[shard])]).state["model"]["0.1.running_mean"]

    for outcome in run_ranks(4, one):
        assert_same(outcome.value, first)


# ---------------------------------------------------------------- failures


def at(stage: int, batch: int, act: Callable[[], None]) -> Any:
    """Do something before a stage's loss of a batch."""

    def hook(job: Job, action: Action) -> None:
        if (action.stage, action.op, job.index) == (stage, Op.LOSS, batch):
            act()

    return before_actions(hook)


def fail() -> None:
    raise ValueError("boom")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_into(where: int, act: Callable[[], None]) -> list[Outcome]:
    """2 x 2 ranks that train for long, on one of which something happens in the third batch."""
    captured("vectors")
    batches = global_batches("vectors", [4] * 200)

    def rank(number: int) -> Any:
        decoupled = compiled("vectors", 2, "supcon", executor="distributed", data_parallel=TOGETHER)
        with at(number // 2 if number == where else -1, 2, act):
            train(decoupled, batches)

    return run_ranks(4, rank)


@pytest.mark.dist
@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_an_error_on_one_replica_ends_all_with_its_name(where: int) -> None:
    outcomes = run_into(where, fail)
    own = outcomes.pop(where)
    assert own.error == "ValueError" and f"loss of stage {where // 2}" in own.message
    for outcome in outcomes:
        assert outcome.error == "PeerError" and outcome.seconds < 30, outcome
        assert f"rank {where} (stage {where // 2}, replica {where % 2}) failed: ValueError: boom" in outcome.message


@pytest.mark.dist
@pytest.mark.parametrize("where", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_replica_is_named(where: int) -> None:
    outcomes = run_into(where, kill)
    assert outcomes.pop(where).exit_code == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.error == "PeerError" and outcome.seconds < 30, outcome
        assert f"rank {where} (stage {where // 2}, replica {where % 2}) is gone" in outcome.message


@pytest.mark.dist
def test_replicas_with_other_numbers_of_batches() -> None:
    """A sampler that deals one replica less than the others would hang."""
    captured("vectors")

    def rank(number: int) -> Any:
        decoupled = compiled("vectors", 2, "supcon", executor="distributed", data_parallel=2)
        train(decoupled, global_batches("vectors", [4] * (5 - (number == 1))))

    outcomes = run_ranks(4, rank)
    assert {outcome.error for outcome in outcomes} <= {"InputError", "PeerError"}, outcomes
    assert all("replicas are not at the same place" in outcome.message for outcome in outcomes[:2])
    assert "trains batch 4" in outcomes[0].message and "after 4 batches" in outcomes[0].message


@pytest.mark.dist
def test_replicas_that_ask_for_other_things_are_refused() -> None:
    captured("vectors")

    def rank(number: int) -> Any:
        data = DataParallel(2, gather=number == 3)
        compiled("vectors", 2, "supcon", executor="distributed", data_parallel=data)

    for outcome in run_ranks(4, rank):
        assert outcome.error == "PlanError" and "first difference is in the data parallel" in outcome.message


# ---------------------------------------------------------------- what can be said at once


def test_one_process_cannot_hold_replicas() -> None:
    with pytest.raises(InputError, match="executor='streams' is one process: start the script with torchrun"):
        autodecouple.compile(nn.Linear(2, 2), 2, data_parallel=2)


def test_processes_must_be_lanes_times_replicas() -> None:
    with pytest.raises(InputError, match="5 processes cannot hold 2 replicas of each lane"):
        Grid.of(5, DataParallel(2))
    assert Grid.of(6, DataParallel(2)).ranks == ((0, 1), (2, 3), (4, 5))
    assert Grid.of(6, DataParallel(3)).place(4) == (1, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replicas": 0}, "positive number of replicas, not 0"),
        ({"replicas": True}, "not True"),
        ({"replicas": 2, "strategy": "fsdp"}, "fully_shard puts a DTensor"),
        ({"replicas": 2, "strategy": "zero"}, 'there is "ddp"'),
        ({"replicas": 2, "ranks": ((0, 1), (2, 2))}, "every rank from 0 on once"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DataParallel(**given)


@pytest.mark.dist
def test_a_mesh_tells_lanes_and_replicas() -> None:
    def rank(number: int) -> Any:
        torch.distributed.init_process_group("gloo")
        mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("pipeline", "data"))
        other = DeviceMesh("cpu", torch.tensor([[0, 1], [2, 3]]), mesh_dim_names=("stage", "dp"))
        with pytest.raises(InputError, match=r"dimensions \('stage', 'dp'\), but stages need"):
            DataParallel.resolve(other)
        found = DataParallel.resolve(mesh)
        torch.distributed.destroy_process_group()
        return found

    for outcome in run_ranks(4, rank):
        assert outcome.value == DataParallel(2, ranks=((0, 2), (1, 3))), outcome
