"""Resuming is exact, and a state that does not fit changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, MultiStepLR, OneCycleLR
from training_tools import CLASSES, assert_same, comparable, compiled, make_batches, sgd, train

from autodecouple.decoupled import Decoupled
from autodecouple.errors import CheckpointError

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
        decoupled.save(tmp_path / "state")
        second = steps(decoupled, 5)
        expected = decoupled.state_dict()
    assert [stage["pending"] for stage in state["stages"]] == [1, 1, 1]
    torch.manual_seed(99)
    with compiled("dropout", 3, **OPTIONS) as resumed:
        if through == "file":
            resumed.load(tmp_path / "state")
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
        decoupled.save(tmp_path / "state")
        rates = [schedule.get_last_lr() for schedule in decoupled.schedulers]
    with compiled("norm", 2, optimizer=sgd, scheduler=scheduler) as other:
        other.load(tmp_path / "state")
        assert [schedule.get_last_lr() for schedule in other.schedulers] == rates
        assert other.train_step(*make_batches("norm", [6])[0]).losses


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


WEIGHT = torch.zeros(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"path": ("format",), "value": 99}, "not a state of this version"),
    "seed": ({"path": ("seed",), "value": 4}, "seed=4, not 0: pass that one"),
    "missing key": ({"path": ("model", "7.bias"), "remove": True}, "does not fit the model: it lacks 7.bias"),
    "extra key": ({"path": ("model", "8.bias"), "value": WEIGHT}, "it has besides 8.bias"),
    "shape": ({"path": ("model", "7.bias"), "value": WEIGHT[:2]}, "it has other shapes for 7.bias"),
    "no model": ({"path": ("model",), "remove": True}, "not whole"),
    "no heads": ({"path": ("heads",), "remove": True}, "not whole"),
    "no head": ({"path": ("heads", "output"), "remove": True}, "not whole"),
    "no plan": ({"path": ("plan",), "remove": True}, "not whole"),
    "bad plan": ({"path": ("plan",), "value": "{}"}, "plan cannot be read"),
    "no step": ({"path": ("step",), "remove": True}, "not whole"),
    "no random state": ({"path": ("random",), "value": {}}, "not whole"),
    "type": ({"path": ("model", "7.bias"), "value": WEIGHT.double()}, "it has other types for 7.bias"),
    "no stage": ({"path": ("stages", 2), "remove": True}, "does not fit the trained parameters: it lacks model."),
    "no optimizer": ({"path": ("stages", 2, "optimizer"), "remove": True}, "not whole"),
    "no group": (
        {"path": ("stages", 2, "groups"), "value": []},
        "does not fit the trained parameters: it lacks model.",
    ),
    "optimizer kind": (
        {"path": ("stages", 1, "optimizer"), "value": "SGD"},
        "with optimizer SGD, but stage 1 here has AdamW",
    ),
    "scheduler kind": (
        {"path": ("stages", 1, "scheduler"), "value": "StepLR"},
        "with scheduler StepLR, but stage 1 here has MultiStepLR",
    ),
    "gradients": ({"path": ("gradients",), "value": [WEIGHT]}, "not whole"),
    "gradients' shapes": (
        {"path": ("gradients", "model.0.0.weight"), "value": WEIGHT},
        "does not fit the gradients: it has other shapes for model.0.0.weight",
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


def test_another_loss_is_refused_by_its_heads(taken: dict[str, Any]) -> None:
    """At the same cut another head lies: most likely a mistake in what was passed."""
    options: dict[str, Any] = {"optimizer": adam, "scheduler": multi_step, "accumulate": 2}
    with compiled("norm", 3, "early_exit", **options) as decoupled:
        before = decoupled.state_dict()
        with pytest.raises(CheckpointError, match="saved with loss .supcon., but has .early_exit."):
            decoupled.load_state_dict(taken)
        assert_same(decoupled.state_dict(), before)


def test_the_model_s_part_loads_into_the_model(taken: dict[str, Any]) -> None:
    """No special tool to get the weights out."""
    with compiled("norm", 3) as decoupled:
        fresh = copy.deepcopy(decoupled.model)
    fresh.load_state_dict(taken["model"])
    assert fresh(torch.zeros(2, 1, 4, 4)).shape == (2, CLASSES)
