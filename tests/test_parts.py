"""Every rank writes its own part of a checkpoint, and all of them are one: whole or not there, for any other ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_tools import Outcome, run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from training_tools import Batch, assert_same, comparable, compiled, make_batches, train

from autodecouple import checkpoints, files, storage
from autodecouple.decoupled import Decoupled
from autodecouple.errors import CheckpointError, PeerError
from autodecouple.executors import attempt
from autodecouple.executors.ranks import Notes, Ranks

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
]

BATCHES = make_batches("dropout", [8, 8, 5, 8, 3, 8, 8, 2])


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


OPTIONS: dict[str, Any] = {"optimizer": adam, "accumulate": 3}


def make(executor: str, n_stages: int = 4) -> Decoupled:
    devices = None if executor == "distributed" else ["cpu"] * 2
    return compiled("dropout", n_stages, "early_exit", devices=devices, executor=executor, **OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, for all that are forked."""
    assert storage.write
    make("inline").close()


def feed(decoupled: Decoupled, batches: Sequence[Batch]) -> None:
    for x, y in batches:
        decoupled.train_step(x, y)


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes), [o.message for o in outcomes]
    return [outcome.value for outcome in outcomes]


# ---------------------------------------------------------------- any ranks


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    """Four ranks, two, one, and two again: as one process that never stopped, half an accumulation included."""
    expected = train(make("inline"), BATCHES).state

    def part(executor: str, done: int, more: int) -> Any:
        with make(executor) as decoupled:
            assert decoupled.resume(tmp_path / "c") == done
            feed(decoupled, BATCHES[done : done + more])
            decoupled.save(tmp_path / "c", background=done > 0)
            return comparable(decoupled.state_dict())

    values(run_ranks(4, lambda number: part("distributed", 0, 2)))
    values(run_ranks(2, lambda number: part("distributed", 2, 2)))
    part("inline", 4, 2)
    for state in values(run_ranks(2, lambda number: part("distributed", 6, 2))):
        assert_same(state, expected)
    assert_same(comparable(checkpoints.load(tmp_path / "c")), expected)


@pytest.mark.dist
def test_each_rank_writes_its_own_stages_and_gathers_nothing(tmp_path: Path) -> None:
    """Other programs read the whole: torch's converter, and whoever knows safetensors in several files."""

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            feed(decoupled, BATCHES[:3])
            decoupled.save(tmp_path / "c")
            own = decoupled.plan.lanes[number]
            held = {stage.index for stage in decoupled.stages if stage.optimizer and stage.optimizer.state}
            return own, held, decoupled.state_dict()

    outcomes = values(run_ranks(2, rank))
    assert all(set(own) == held for own, held, _ in outcomes)
    state = outcomes[0][2]
    assert_same(checkpoints.load(tmp_path / "c"), {**state, "random": checkpoints.load(tmp_path / "c")["random"]})
    reader = storage._Reader(tmp_path / "c")
    places = {index.fqn: info.relative_path for index, info in reader.read_metadata().storage_data.items()}
    for rank_, (own, _, _) in enumerate(outcomes):
        keys = [key for stage in own for group in state["stages"][stage]["groups"] for key in group["params"]]
        assert {places[f"optim.{key}.exp_avg"] for key in keys} == {f"__{rank_}_0.distcp"}
        model = [key for key in keys if key.startswith("model.")]
        assert {places[key] for key in model} == {f"__{rank_}_0.distcp"}
    dcp_to_torch_save(tmp_path / "c", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    assert_same({name: found[f"model.{name}"] for name in state["model"]}, dict(state["model"]))
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weights = {name: load_file(tmp_path / "c" / file)[name] for name, file in index["weight_map"].items()}
    assert_same(weights, dict(state["model"]))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())


@pytest.mark.dist
def test_one_process_takes_the_place_of_several(tmp_path: Path) -> None:
    """Files of the ranks before are not left in the folder, which is another one."""

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            decoupled.save(tmp_path / "c")

    values(run_ranks(2, rank))
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 2
    with make("inline") as decoupled:
        decoupled.resume(tmp_path / "c")
        decoupled.save(tmp_path / "c")
    names = {".metadata", "__0_0.distcp", "model.safetensors", "plan.json", "sums.json"}
    assert set(os.listdir(tmp_path / "c")) == names and os.listdir(tmp_path) == ["c"]


@pytest.mark.dist
def test_rank_0_says_where(tmp_path: Path) -> None:
    """A name with the time in it differs on every rank."""

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            decoupled.save(tmp_path / f"c{number}")

    values(run_ranks(2, rank))
    assert os.listdir(tmp_path) == ["c0"]


# ---------------------------------------------------------------- failures


def failing_once(owner: Any, name: str, error: BaseException) -> Any:
    original, failures = getattr(owner, name), [error]

    def call(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, call)


@pytest.mark.dist
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("where", [(0, "write"), (1, "write"), (0, "finish")], ids=str)
def test_a_write_that_fails_on_one_rank_fails_on_all(where: tuple[int, str], background: bool, tmp_path: Path) -> None:
    """The old one stays, every rank knows why, the training goes on, and the next save is none the worse."""
    victim, step = where

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            decoupled.save(tmp_path / "c")
            feed(decoupled, BATCHES[:2])
            error = OSError(28, "no space left on device")
            fails = failing_once(storage, step, error) if number == victim else contextlib.nullcontext()
            with fails, pytest.raises(CheckpointError, match=f"before still is: rank {victim}: OSError"):
                decoupled.save(tmp_path / "c", background=background)
                decoupled.synchronize()
            step_of_old = checkpoints.load(tmp_path / "c")["step"]
            feed(decoupled, BATCHES[2:4])
            decoupled.save(tmp_path / "c", background=background)
            return step_of_old

    assert values(run_ranks(2, rank)) == [0, 0]
    assert checkpoints.load(tmp_path / "c")["step"] == 4 and os.listdir(tmp_path) == ["c"]


@pytest.mark.dist
def test_what_follows_from_a_failure_is_not_taken_for_it(tmp_path: Path) -> None:
    """Rank 0 takes the folder away that it could not write into; rank 1, still writing there, said that it was gone."""

    def gone(flat: Any, folder: Path, rank: int = 0) -> Any:
        while folder.exists():
            time.sleep(0.01)
        raise FileNotFoundError(2, "no such folder")

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            failing = mock.Mock(side_effect=OSError(28, "no space left on device"))
            write = mock.patch.object(storage, "write", gone if number else failing)
            with write, pytest.raises(CheckpointError, match="before still is: rank 0: OSError.*no space"):
                decoupled.save(tmp_path / "c", background=True)
                decoupled.synchronize()

    values(run_ranks(2, rank))


@pytest.mark.dist
def test_a_path_that_cannot_be_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            for background in (False, True):
                with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
                    decoupled.save(tmp_path / "file", background=background)
            fails = failing_once(Path, "mkdir", OSError(5, "the disk")) if number == 0 else contextlib.nullcontext()
            with fails, pytest.raises(CheckpointError, match="rank 0: OSError.*the disk"):
                decoupled.save(tmp_path / "c")
            feed(decoupled, BATCHES[:1])
            decoupled.save(tmp_path / "c")

    values(run_ranks(2, rank))


@pytest.mark.dist
@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_is_killed_while_it_saves_is_named(background: bool, tmp_path: Path) -> None:
    """The last of four ranks, whom the first is not connected with; the old checkpoint stays."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rank(number: int) -> Any:
        with make("distributed") as decoupled:
            decoupled.save(tmp_path / "c")
            feed(decoupled, BATCHES[:2])
            with mock.patch.object(storage, "write", kill if number == 3 else storage.write):
                decoupled.save(tmp_path / "c", background=background)
                decoupled.synchronize()

    outcomes = run_ranks(4, rank)
    assert outcomes.pop().exit_code == -signal.SIGKILL
    for outcome in outcomes:
        assert outcome.error in ("PeerError", "CheckpointError") and outcome.seconds < 30
        assert "rank 3 (stage 3) is gone" in outcome.message
    assert checkpoints.load(tmp_path / "c")["step"] == 0


@pytest.mark.dist
def test_hosts_without_a_common_folder(tmp_path: Path) -> None:
    """Stood in for by a rank that writes what it has to tell somewhere else."""

    def elsewhere(record: Any, folder: Path, notes: Notes) -> None:
        notes.leave(f"part/{notes.ranks.rank}")

    def rank(number: int) -> Any:
        other = (checkpoints, "hand_over", elsewhere) if number else (files, "PATIENCE", 0.1)
        refused = pytest.raises(CheckpointError, match="rank 0 does not see it: all ranks need the same folder")
        with make("distributed") as decoupled, mock.patch.object(*other), refused:
            decoupled.save(tmp_path / "c")

    values(run_ranks(2, rank))
    assert os.listdir(tmp_path) == []


@pytest.mark.dist
def test_a_checkpoint_under_way_when_the_script_ends_is_written(tmp_path: Path) -> None:
    """Nobody closes anything: the pipeline is collected while its ranks still write."""

    def rank(number: int) -> Any:
        decoupled = make("distributed")
        feed(decoupled, BATCHES[:2])
        write = storage.write

        def slowly(*args: Any) -> Any:
            time.sleep(0.5)
            return write(*args)

        with mock.patch.object(storage, "write", slowly):
            decoupled.save(tmp_path / "c", background=True)
            writing = decoupled._writer._under_way
            del decoupled
            assert writing is not None
            writing.result(20)

    values(run_ranks(2, rank))
    assert checkpoints.load(tmp_path / "c")["step"] == 2


# ---------------------------------------------------------------- attempts


def together(size: int, store: Any) -> list[str]:
    """The name of an attempt, on every rank."""
    found: list[str] = [""] * size

    def rank(number: int) -> None:
        found[number] = attempt.attempt(store, number, size, timedelta(seconds=20))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_attempt_has_a_name_of_its_own(size: int) -> None:
    """torchrun keeps its store when it starts ranks again: they found the note of those before that they had failed,
    and connected to where those had listened. Also where ranks of another attempt have said hello, and died."""
    store = dist.HashStore()
    for rank in range(1, size, 2):
        store.set(f"hello/{rank}", "of one that has died")
    names = [together(size, store) for _ in range(3)]
    assert all(len(set(found)) == 1 and found[0] for found in names)
    assert len({found[0] for found in names}) == 3


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    patience = timedelta(seconds=0.2)
    with pytest.raises(PeerError, match=r"ranks \[1, 2\] have not compiled the model within"):
        attempt.attempt(store, 0, 3, patience)
    with pytest.raises(PeerError, match=r"ranks \[0\] have not compiled the model within"):
        attempt.attempt(store, 1, 3, patience)


def test_notes_end_with_the_training() -> None:
    """Whoever waits for a note that never comes is told that the training has ended, or what failed."""
    ended: list[str] = []
    ranks = Ranks(1, 2, (0, 1), dist.HashStore(), ended=lambda: " ".join(ended))
    Notes(ranks, 1).fail("disk full")
    Notes(ranks, 1).fail("and this, too")
    with pytest.raises(CheckpointError, match="^disk full$"):
        Notes(ranks, 1).hear("placed")
    ended.append("rank 3 is gone")
    with pytest.raises(PeerError, match="the training has ended: rank 3 is gone"):
        Notes(ranks, 2).hear("placed")
    Notes(ranks, 3).leave("placed", "c")
    assert Notes(ranks, 3).hear("placed") == "c"
