"""Resuming is exact, files are whole or not there, and a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, MultiStepLR, OneCycleLR
from training_tools import CLASSES, assert_same, comparable, compiled, make_batches, sgd, train

from autodecouple.decoupled import Decoupled
from autodecouple.errors import CheckpointError
from autodecouple.plans import Plan

pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")

X, Y = make_batches("dropout", [40])[0]


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def multi_step(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return MultiStepLR(optimizer, [1, 3], 0.5)


OPTIONS: dict[str, Any] = {"optimizer": adam, "scheduler": multi_step, "accumulate": 2, "loss": ["deinforeg", "supcon"]}


def steps(decoupled: Decoupled, count: int) -> list[tuple[float | None, ...]]:
    """Batches drawn with the global generator, as a loader would shuffle."""
    taken = []
    for _ in range(count):
        rows = torch.randperm(len(X))[:6]
        taken.append(decoupled.train_step(X[rows], Y[rows]))
    decoupled.synchronize()
    return [step.losses for step in taken]


@pytest.mark.parametrize("through", ["memory", "file"])
def test_resuming_equals_never_having_stopped(through: str, tmp_path: Path) -> None:
    """Five batches, a new process as it were, five more: dropout, BatchNorm, the heads' own statistics, moments, the
    scheduler, half an accumulation and the order of the rows are those of ten batches at a stretch. And training on
    does not change a state that was taken."""
    torch.manual_seed(1)
    with compiled("dropout", 3, **OPTIONS) as decoupled:
        first = steps(decoupled, 5)
        state = decoupled.state_dict()
        decoupled.save(tmp_path / "state.pt")
        second = steps(decoupled, 5)
        expected = decoupled.state_dict()
    assert [stage["pending"] for stage in state["stages"]] == [1, 1, 1]
    torch.manual_seed(99)
    with compiled("dropout", 3, **OPTIONS) as resumed:
        if through == "file":
            resumed.load(tmp_path / "state.pt")
        else:
            resumed.load_state_dict(state)
        assert steps(resumed, 5) == second != first
        assert_same(comparable(resumed.state_dict()), comparable(expected))


def test_one_state_starts_two_runs() -> None:
    """torch's optimizers take the tensors of a loaded state for their own: the first run would train the second's."""
    with compiled("norm", 2, optimizer=adam) as decoupled:
        decoupled.train_step(*make_batches("norm", [6])[0])
        state = decoupled.state_dict()
    untouched = copy.deepcopy(state)
    results = []
    for _ in range(2):
        with compiled("norm", 2, optimizer=adam) as decoupled:
            decoupled.load_state_dict(state)
            results.append(decoupled.train_step(*make_batches("norm", [6], seed=5)[0]).losses)
            decoupled.train_step(*make_batches("norm", [6], seed=6)[0])
    assert_same(state, untouched)
    assert results[0] == results[1]


def test_going_back_in_the_same_run() -> None:
    """A state of an earlier step is taken back while the workers live: batch numbers go back, too."""
    with compiled("dropout", 3, **OPTIONS) as decoupled:
        steps(decoupled, 2)
        state = decoupled.state_dict()
        once = steps(decoupled, 3)
        decoupled.load_state_dict(state)
        assert steps(decoupled, 3) == once


@pytest.mark.parametrize("executor", ["inline", "streams"])
def test_a_state_goes_over_between_executors_and_lanes(executor: str) -> None:
    """What was trained on three lanes goes on on one, bit for bit."""
    batches = make_batches("dropout", [6] * 4)
    expected = train(compiled("dropout", 3, optimizer=sgd), batches).state
    with compiled("dropout", 3, optimizer=sgd, executor=executor) as decoupled:
        for pair in batches[:2]:
            decoupled.train_step(*pair)
        state = decoupled.state_dict()
    found = compiled("dropout", 3, optimizer=sgd, lanes=1)
    found.load_state_dict(state)
    assert_same(train(found, batches[2:]).state, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        multi_step,
        lambda o: ExponentialLR(o, 0.9),
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: OneCycleLR(o, 0.1, total_steps=20),
    ],
)
def test_files_hold_any_scheduler(scheduler: Any, tmp_path: Path) -> None:
    """Read with weights_only: a file from elsewhere runs no code."""
    with compiled("norm", 2, optimizer=sgd, scheduler=scheduler) as decoupled:
        decoupled.train_step(*make_batches("norm", [6])[0])
        decoupled.save(tmp_path / "state.pt")
        rates = [schedule.get_last_lr() for schedule in decoupled.schedulers]
    with compiled("norm", 2, optimizer=sgd, scheduler=scheduler) as other:
        other.load(tmp_path / "state.pt")
        assert [schedule.get_last_lr() for schedule in other.schedulers] == rates
        assert other.train_step(*make_batches("norm", [6])[0]).losses


# ---------------------------------------------------------------- files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full in the middle, or killed: the checkpoint of the epoch before is whole, and nothing else is left."""
    path = tmp_path / "state.pt"
    with compiled("norm", 2) as decoupled:
        decoupled.save(path)
        before = path.read_bytes()

        def half(state: Any, file: Any) -> None:
            file.write(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space"):
            decoupled.save(path)
        monkeypatch.undo()
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["state.pt"]
        decoupled.load(path)


def test_a_file_can_be_read_by_whom_any_other_can(tmp_path: Path) -> None:
    """Written to a temporary file made for one's own eyes only, it was readable to nobody else."""
    (tmp_path / "other").write_text("")
    with compiled("norm", 2) as decoupled:
        decoupled.save(str(tmp_path / "state.pt"))
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with compiled("norm", 2) as decoupled:
        decoupled.save(path)
        whole = path.read_bytes()
        before = decoupled.state_dict()
        flipped = bytearray(whole)
        for position in range(len(whole) // 3, len(whole) // 3 + 200):
            flipped[position] ^= 255
        for broken in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint at all", bytes(flipped)):
            path.write_bytes(broken)
            with pytest.raises(CheckpointError):
                decoupled.load(path)
            assert_same(decoupled.state_dict(), before)
        torch.save([1, 2], path)
        with pytest.raises(CheckpointError, match="holds a list, not a state"):
            decoupled.load(path)
        with pytest.raises(FileNotFoundError):
            decoupled.load(tmp_path / "nowhere.pt")
        with pytest.raises(CheckpointError, match="is not there: make it"):
            decoupled.save(tmp_path / "nowhere" / "state.pt")


# ---------------------------------------------------------------- states that do not fit


def change(state: dict[str, Any], *path: Any, value: Any = None, remove: bool = False) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner: Any = state
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


@pytest.fixture(scope="module")
def taken() -> dict[str, Any]:
    with compiled("norm", 3, optimizer=adam, scheduler=multi_step, accumulate=2) as decoupled:
        decoupled.train_step(*make_batches("norm", [6], seed=8)[0])
        return decoupled.state_dict()


WEIGHT = torch.zeros(2)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"path": ("format",), "value": 99}, "not a state of this version"),
    "seed": ({"path": ("seed",), "value": 4}, "seed=4, not 0: pass that one"),
    "missing key": ({"path": ("model", "7.bias"), "remove": True}, "does not fit the model: it lacks 7.bias"),
    "extra key": ({"path": ("model", "8.bias"), "value": WEIGHT}, "it has besides 8.bias"),
    "shape": ({"path": ("model", "7.bias"), "value": WEIGHT}, "it has other shapes for 7.bias"),
    "no model": ({"path": ("model",), "remove": True}, "not whole"),
    "no heads": ({"path": ("heads",), "remove": True}, "not whole"),
    "no head": ({"path": ("heads", "1"), "remove": True}, "not whole"),
    "no plan": ({"path": ("plan",), "remove": True}, "not whole"),
    "bad plan": ({"path": ("plan",), "value": "{}"}, "plan cannot be read"),
    "no step": ({"path": ("step",), "remove": True}, "not whole"),
    "no random state": ({"path": ("random",), "value": {}}, "not whole"),
    "no stage": ({"path": ("stages", 2), "remove": True}, "not whole"),
    "no optimizer": ({"path": ("stages", 2, "optimizer"), "remove": True}, "not whole"),
    "optimizer groups": ({"path": ("stages", 2, "optimizer", "param_groups"), "value": []}, "optimizer of stage 2"),
    "optimizer kind": (
        {"path": ("stages", 1, "kinds", "optimizer"), "value": "SGD"},
        "with optimizer SGD, but has AdamW",
    ),
    "scheduler kind": (
        {"path": ("stages", 1, "kinds", "scheduler"), "value": "StepLR"},
        "with scheduler StepLR, but has MultiStepLR",
    ),
    "gradients": ({"path": ("stages", 0, "gradients"), "value": [WEIGHT]}, "accumulation does not fit stage 0"),
    "gradients' shapes": (
        {"path": ("stages", 0, "gradients", 0), "value": WEIGHT},
        "accumulation does not fit stage 0",
    ),
    "pending": ({"path": ("stages", 0, "pending"), "remove": True}, "not whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_changes_nothing(taken: dict[str, Any], case: str) -> None:
    """Looked at in full before anything is put back: half a state would be worse than none."""
    spoiled, message = REFUSED[case]
    state = change(taken, *spoiled["path"], value=spoiled.get("value"), remove=spoiled.get("remove", False))
    with compiled("norm", 3, optimizer=adam, scheduler=multi_step, accumulate=2) as decoupled:
        before = decoupled.state_dict()
        with pytest.raises(CheckpointError) as caught:
            decoupled.load_state_dict(state)
        assert message in str(caught.value)
        assert_same(decoupled.state_dict(), before)
        decoupled.load_state_dict(taken)
        assert decoupled.state_dict()["step"] == 1


def test_other_cuts_are_refused_and_the_plan_is_the_way_out(taken: dict[str, Any]) -> None:
    options: dict[str, Any] = {"optimizer": adam, "scheduler": multi_step, "accumulate": 2}
    with compiled("norm", 3, cut_at=("0", "1"), **options) as decoupled:
        before = decoupled.state_dict()
        with pytest.raises(CheckpointError, match=r'compile with plan=Plan.from_json\(state\["plan"\]\)'):
            decoupled.load_state_dict(taken)
        assert_same(decoupled.state_dict(), before)
    with compiled("norm", 3, plan=Plan.from_json(taken["plan"]), **options) as decoupled:
        decoupled.load_state_dict(taken)
    other = compiled("norm", 3, "early_exit", **options)
    with other as decoupled, pytest.raises(CheckpointError, match="does not fit head 0"):
        decoupled.load_state_dict(taken)
    with compiled("norm", 3, "bp", **options) as decoupled, pytest.raises(CheckpointError, match="coupled"):
        decoupled.load_state_dict(taken)


def test_the_model_s_part_loads_into_the_model(taken: dict[str, Any]) -> None:
    """No special tool to get the weights out."""
    with compiled("norm", 3) as decoupled:
        fresh = copy.deepcopy(decoupled.model)
    fresh.load_state_dict(taken["model"])
    assert fresh(torch.zeros(2, 1, 4, 4)).shape == (2, CLASSES)
