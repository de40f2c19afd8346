"""fit goes on from a checkpoint as if it had never stopped: in any epoch, at any batch, in the same order."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from training_tools import assert_same, comparable, compiled, make_batches, sgd

from autodecouple import checkpoints, storage
from autodecouple.decoupled import Decoupled
from autodecouple.epochs import Epoch
from autodecouple.errors import InputError
from autodecouple.executors.ranks import Ranks
from autodecouple.loops import Loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*had no two rows of one class"),
    pytest.mark.timeout(120),
]


def make(n_stages: int = 2, executor: str = "inline", **options: Any) -> Decoupled:
    return compiled("dropout", n_stages, "early_exit", executor=executor, optimizer=sgd, **options)


class Noisy(TensorDataset):
    """Augmentation draws from torch's own generator, between the batches."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


def loader(kind: str, rows: int) -> DataLoader[Any]:
    """The generators stand as at the begin of a script."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    (whole,) = make_batches("dropout", [rows])
    data = (Noisy if kind == "noisy" else TensorDataset)(*whole)
    match kind:
        case "own generator":
            return DataLoader(data, batch_size=4, shuffle=True, generator=generator)
        case "sampler":
            sampler = RandomSampler(data, replacement=True, generator=generator)
            return DataLoader(data, batch_size=4, sampler=sampler)
        case _:
            return DataLoader(data, batch_size=4, shuffle=kind != "in order")


class Stopped(Exception):
    """What ends a script in the middle."""


class Stopping:
    """A loader that fails before some batch of some epoch."""

    def __init__(self, data: DataLoader[Any], batches: int) -> None:
        self.data, self.left = data, batches
        self.generator, self.sampler = data.generator, data.sampler

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left == 0:
                raise Stopped
            self.left -= 1
            yield batch


def comparable_history(history: list[Epoch]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(dataclasses.replace(epoch, seconds=0.0)) for epoch in history]


KINDS = ["in order", "shuffled", "own generator", "sampler", "noisy"]


@pytest.mark.slow
@settings(max_examples=8)
@example(kind="shuffled", rows=17, epochs=2, every=2, stops=[3, 4], executor="inline", validation=True)
@example(kind="own generator", rows=17, epochs=2, every=1, stops=[3, 6], executor="inline", validation=False)
@example(kind="sampler", rows=17, epochs=3, every=None, stops=[7, 2], executor="inline", validation=False)
@example(kind="noisy", rows=17, epochs=2, every=2, stops=[3, 4], executor="streams", validation=False)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 17),
    epochs=st.integers(1, 3),
    every=st.none() | st.integers(1, 4),
    stops=st.lists(st.integers(0, 12), max_size=3),
    executor=st.sampled_from(["inline", "streams"]),
    validation=st.booleans(),
)
def test_a_loop_goes_on_where_it_was_saved(
    kind: str, rows: int, epochs: int, every: int | None, stops: list[int], executor: str, validation: bool
) -> None:
    """Stopped any number of times, anywhere: state, losses and accuracies of all epochs as if never stopped."""
    held_out = make_batches("dropout", [5]) if validation else None
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"validation": held_out, "progress": False}
        again = {**options, "checkpoint": Path(folder) / "c", "save_every": every, "resume": True}
        for stop in stops:
            data = Stopping(loader(kind, rows), stop)
            try:
                with make(executor=executor) as decoupled:
                    decoupled.fit(data, epochs, **again)
            except Stopped:
                pass
        data = loader(kind, rows)
        with make(executor=executor) as decoupled:
            found = decoupled.fit(data, epochs, **again)
            state = comparable(decoupled.state_dict())
        data = loader(kind, rows)
        with make() as decoupled:
            expected = decoupled.fit(data, epochs, **options)
            assert_same(state, comparable(decoupled.state_dict()))
    assert_same(comparable_history(found), comparable_history(expected))


def test_a_finished_loop_is_not_trained_again(tmp_path: Path) -> None:
    """More epochs go on behind it."""
    data = loader("shuffled", 8)
    options: dict[str, Any] = {"checkpoint": tmp_path / "c", "resume": True, "progress": False}
    with make() as decoupled:
        first = decoupled.fit(data, 2, **options)
    with make() as decoupled:
        assert_same(comparable_history(decoupled.fit(data, 2, **options)), comparable_history(first))
        assert decoupled.state_dict()["step"] == 4
        assert_same(comparable_history(decoupled.fit(data, 3, **options)[:2]), comparable_history(first))
        assert decoupled.state_dict()["step"] == 6


def test_without_resume_a_loop_begins_anew(tmp_path: Path) -> None:
    data = loader("shuffled", 8)
    with make() as decoupled:
        for _ in range(2):
            history = decoupled.fit(data, 1, checkpoint=tmp_path / "c", progress=False)
            assert len(history) == 1
        assert decoupled.state_dict()["step"] == 4


def test_a_checkpoint_that_no_loop_wrote_begins_the_first_epoch(tmp_path: Path) -> None:
    with make() as decoupled:
        decoupled.train_step(*make_batches("dropout", [4])[0])
        decoupled.save(tmp_path / "c")
    with make() as decoupled:
        decoupled.fit(loader("in order", 8), 1, checkpoint=tmp_path / "c", resume=True, progress=False)
        assert decoupled.state_dict()["step"] == 3


def test_resume_by_hand(tmp_path: Path) -> None:
    """Also in the moment between the two renames, when only the old one is there, and beside its place."""
    batches = make_batches("dropout", [4] * 3)
    with make() as decoupled:
        assert decoupled.resume(tmp_path / "c") == 0
        for pair in batches:
            decoupled.train_step(*pair)
        decoupled.save(tmp_path / "c", background=True)
        expected = comparable(decoupled.state_dict())
    (tmp_path / "c").rename(tmp_path / ".c.old")
    with make() as decoupled:
        assert decoupled.resume(tmp_path / "c") == 3
        assert_same(comparable(decoupled.state_dict()), expected)


def test_a_shorter_loader_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path / "c", "save_every": 3, "resume": True, "progress": False}
    with pytest.raises(Stopped), make() as decoupled:
        decoupled.fit(Stopping(loader("in order", 16), 3), 1, **options)
    with make() as decoupled, pytest.raises(InputError, match="after 3 batches of epoch 1, but the loader gives 2"):
        decoupled.fit(loader("in order", 8), 1, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resume": True}, "pass checkpoint="),
        ({"save_every": 3}, "pass checkpoint="),
        ({"save_every": 0, "checkpoint": "c"}, "save_every must be a positive number of batches, not 0"),
        ({"save_every": True, "checkpoint": "c"}, "not True"),
    ],
    ids=str,
)
def test_what_fit_cannot_do_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    if "checkpoint" in options:
        options = {**options, "checkpoint": tmp_path / "c"}
    with make() as decoupled, pytest.raises(InputError, match=says):
        decoupled.fit(loader("in order", 4), 1, **options)


def test_a_model_that_is_captured_later_cannot_be_resumed(tmp_path: Path) -> None:
    with make(example_inputs=None) as decoupled, pytest.raises(InputError, match="pass example_inputs="):
        decoupled.fit(loader("in order", 4), 1, checkpoint=tmp_path / "c", resume=True, progress=False)


def test_other_cuts_go_on_too(tmp_path: Path) -> None:
    """The epochs before are kept; the means of the one under way are of what was trained since."""
    assert storage.write
    options: dict[str, Any] = {"checkpoint": tmp_path / "c", "save_every": 1, "resume": True, "progress": False}
    with pytest.raises(Stopped), make(2) as decoupled:
        decoupled.fit(Stopping(loader("shuffled", 16), 6), 2, **options)
    with pytest.warns(UserWarning, match="saved with other cuts"), make(3) as decoupled:
        first, second = decoupled.fit(loader("shuffled", 16), 2, **options)
        assert decoupled.state_dict()["step"] == 8
    assert len(first.losses) == 2 and len(second.losses) == 3


nan = math.nan


def test_what_several_ranks_knew_is_put_together() -> None:
    """Each knew the losses of its own stages, the last one the accuracy."""
    records = {}
    for rank, (losses, accuracy) in enumerate([((1.0, nan, nan), nan), ((nan, 2.0, 3.0), 0.5)]):
        loop = Loop(history=[Epoch(1, losses, accuracy, 0.25, 1.0)], epoch=2, batch=3)
        loop.mean.rows, loop.mean.sums = 12, [4.0, 5.0, 6.0]
        records[rank] = loop.record([])
    assert comparable_history(Loop.resumed(records, Ranks(), 3, []).history) == [
        {"epoch": 1, "losses": (1.0, 2.0, 3.0), "accuracy": 0.5, "validation": 0.25, "seconds": 0.0}
    ]
    alone, own = Loop.resumed(records, Ranks(), 3, []), Loop.resumed(records, Ranks(1, 2), 3, [])
    assert (alone.epoch, alone.batch, alone.mean.rows) == (2, 3, 0)
    assert own.mean.rows == 12 and math.isnan(own.history[0].losses[0]) and own.history[0].losses[1:] == (2.0, 3.0)


def test_what_a_loop_saves_is_plain(tmp_path: Path) -> None:
    """So that it can be read again without running code; the generators' states are tensors."""
    random.seed(1)
    with make() as decoupled:
        decoupled.fit(loader("own generator", 12), 1, checkpoint=tmp_path / "c", save_every=2, progress=False)
    loops = checkpoints.load(tmp_path / "c")["loops"]
    assert set(loops) == {0} and loops[0]["epoch"] == 2 and loops[0]["batch"] == 0
    assert len(loops[0]["draws"]) == 2
