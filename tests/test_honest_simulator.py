"""Law 7: with measured costs the simulator's makespan is that of the executor within 10 %.

The stages sleep for known times instead of computing for unknown ones, so that a busy machine does not matter much.
This is the only place in the tests where time counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
from training_tools import compiled, make_batches

import autodecouple
from autodecouple.schedules import GPipe, MicroBatched, OneFOneB, Schedule, Sequential, Streaming
from autodecouple.schedules.actions import Op
from autodecouple.stage import Stage
from autodecouple.timeline import Timeline

BATCHES = 6
METHODS = {op: op.name.lower() for op in Op}

CASES: dict[str, tuple[Any, int, Schedule]] = {
    "sequential": ("supcon", 1, Sequential()),
    "streaming": ("supcon", 4, Streaming()),
    "streaming, shallow": ("supcon", 4, Streaming(queue_depth=1)),
    "streaming, two lanes": ("supcon", 2, Streaming(queue_depth=3)),
    "barrier": ("supcon", 4, Streaming(barrier=True)),
    "micro-batches": ("early_exit", 4, MicroBatched(num_micro_batches=2)),
    "overlapping": ("loco", 4, Streaming()),
    "groups": (["supcon", "bp", "supcon"], 4, Streaming()),
    "gpipe": ("bp", 4, GPipe(num_micro_batches=2)),
    "1f1b": ("bp", 4, OneFOneB(num_micro_batches=3)),
}


@contextmanager
def sleeping(seconds: Mapping[tuple[int, Op], float]) -> Iterator[None]:
    """Every action of a stage takes at least so long."""

    def slow(op: Op, original: Any) -> Any:
        def wrapped(stage: Stage, *args: Any, **kwargs: Any) -> Any:
            stop = time.perf_counter() + seconds[stage.index, op]
            result = original(stage, *args, **kwargs)
            time.sleep(max(0.0, stop - time.perf_counter()))
            return result

        return wrapped

    with ExitStack() as stack:
        for op, name in METHODS.items():
            stack.enter_context(mock.patch.object(Stage, name, slow(op, getattr(Stage, name))))
        yield


def run(case: str, seconds: Mapping[tuple[int, Op], float]) -> tuple[Timeline, Timeline]:
    """(measured, predicted from what was measured)."""
    loss, lanes, schedule = CASES[case]
    decoupled = compiled("norm", 4, loss, lanes=lanes, schedule=schedule)
    with decoupled, sleeping(seconds):
        for pair in make_batches("norm", [8] * BATCHES):
            decoupled.train_step(*pair)
        measured = decoupled.timeline
        return measured, autodecouple.simulate(decoupled.plan, schedule, BATCHES, cost=measured)


@pytest.mark.parametrize("case", CASES)
def test_the_simulator_is_honest(case: str) -> None:
    """Lanes, queue depths, barriers, micro-batches and coupled groups cost what the simulator says they cost."""
    chance = random.Random(case)
    seconds = {(stage, op): chance.uniform(0.006, 0.02) for stage in range(4) for op in Op}
    ratios: list[float] = []
    while len(ratios) < 6:  # a busy machine wakes sleepers up late, a wrong rule is wrong every time
        measured, predicted = run(case, seconds)
        assert len(measured.spans) == len(predicted.spans) and measured.num_lanes == predicted.num_lanes
        ratios.append(predicted.makespan / measured.makespan)
        if abs(ratios[-1] - 1) < 0.1:
            return
    pytest.fail(f"predicted / measured makespan: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")


def test_streaming_is_as_fast_as_its_slowest_stage() -> None:
    """Counted by hand: four stages of 40 ms fill up over three forwards, then a batch is done every 40 ms; one after
    the other they take four times as long. A slow machine may take longer, never less."""
    seconds = {(stage, op): 0.01 for stage in range(4) for op in Op}
    ideal = 3 * 0.01 + BATCHES * 0.04
    found = [run("streaming", seconds)[0].makespan]
    while min(found) >= 1.5 * ideal and len(found) < 6:
        found.append(run("streaming", seconds)[0].makespan)
    assert ideal <= min(found) < 1.5 * ideal
    assert run("sequential", seconds)[0].makespan >= 4 * BATCHES * 0.04
