"""Ranks train what one process would, to the last bit; when one fails all end, with its error, and none hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tools import Outcome, forked_ranks, free_port, run_ranks
from torch import Tensor, nn
from training_tools import Batch, Encoding, Result, assert_same, comparable, compiled, make_batches, sgd, train

from autodecouple.errors import InputError
from autodecouple.executors.wire import SLOTS, Decoder, Encoder, Message
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Streaming
from autodecouple.stage import Stage

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
    "coupled stages on several ranks": (3, 4, ["bp", "supcon", "bp"], {"optimizer": adam}),
    "half an accumulation": (2, 3, "deinforeg", {"accumulate": 4, "clip_grad_norm": 0.5}),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
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
@pytest.mark.parametrize("schedule", [GPipe(num_micro_batches=3), OneFOneB(num_micro_batches=3)], ids=["gpipe", "1f1b"])
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
