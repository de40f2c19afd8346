"""Every objective under every schedule that its plan takes, on every executor, on three families of models.

Each cell trains a few batches to what the same schedule gives inline, to the last bit, and gives every parameter of the
model and of the heads a gradient. Objectives and schedules are those of the registries; new ones are cells, too.

    inline     the same schedule in one thread: what the others must equal; detached, that is the sequential order
    streams    four lanes, a thread each
    processes  two lanes of two stages, forked
    ranks      two lanes of two stages, as under torchrun
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import BLOCKS, FAMILIES, batch, captured, compiled
from rank_tools import run_ranks
from training_tools import Result, assert_same, sgd, train

import autodecouple
from autodecouple.errors import InputError, ScheduleError
from autodecouple.objectives import DGL, OBJECTIVES, Associated, DeInfoReg, EarlyExit, SupCon
from autodecouple.plans import Plan
from autodecouple.schedules import SCHEDULES, Program, Sequential, placed

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")

SMALL = (SupCon(hidden=8, out=4), DeInfoReg(widths=(8, 8)), EarlyExit(hidden=8), Associated(6, hidden=8), DGL(width=8))
LOSSES: dict[str, Any] = {
    **{name: name for name in OBJECTIVES},
    **{each.name: each for each in SMALL},
    "mixed": [Associated(6, hidden=8), "infopro", Associated(6, hidden=8)],
    "partly coupled": ["downstream", "bp", "predsim"],
}
LANES = {"inline": 2, "streams": 4, "processes": 2, "distributed": 2}
ROWS = (8, 8, 5)
"""Of the batches; fewer in a last one, and no multiple of the micro-batches."""
REFUSED = "pipedream", "processes"
QUICK = (("cnn", "infopro"), ("lstm", "mixed"))


@functools.cache
def plan_of(family: str, name: str, lanes: int) -> Plan:
    graph, _ = captured(family)
    devices, cut_at = ["cpu"] * lanes, BLOCKS[family][:-1]
    return autodecouple.plan(graph, n_stages=4, loss=LOSSES[name], devices=devices, cut_at=cut_at)


def takes(plan: Plan, schedule: str) -> bool:
    """Whether the plan's stages can be trained so: schedules of backprop refuse detached cuts, for one."""
    try:
        Program(placed(plan, SCHEDULES[schedule]), SCHEDULES[schedule])
    except ScheduleError:
        return False
    return True


def trained(family: str, name: str, schedule: Any, executor: str) -> Result:
    options: dict[str, Any] = {"executor": executor, "lanes": LANES[executor], "optimizer": sgd}
    if executor == "distributed":
        options["devices"] = None  # a lane for each rank
    decoupled = compiled(family, LOSSES[name], schedule, **options)
    result = train(decoupled, [batch(family, rows, seed) for seed, rows in enumerate(ROWS)])
    if executor == "inline":
        assert_every_parameter_had_a_gradient(decoupled)
    return result


def assert_every_parameter_had_a_gradient(decoupled: Any) -> None:
    """Momentum remembers."""
    states = [pair for optimizer in decoupled.optimizers for pair in optimizer.state.items()]
    remembered = {id(p) for p, state in states if state["momentum_buffer"] is not None}
    heads = [stage.code.head for stage in decoupled.stages if stage.code.head is not None]
    parameters = [*decoupled.model.named_parameters(), *(pair for head in heads for pair in head.named_parameters())]
    assert [name for name, p in parameters if id(p) not in remembered] == []


@functools.cache
def expected(family: str, name: str, schedule: str) -> Result:
    """Inline; where every cut is detached it is what the stages give one after the other."""
    found = trained(family, name, schedule, "inline")
    if not any(plan_of(family, name, 2).coupled_after(stage) for stage in range(3)):
        assert_same(found, sequential(family, name, SCHEDULES[schedule].num_micro_batches))
    return found


@functools.cache
def sequential(family: str, name: str, num_micro_batches: int) -> Result:
    return trained(family, name, Sequential(num_micro_batches), "inline")


def check_ranks(family: str, name: str, schedules: list[str]) -> None:
    """One world for all schedules; each rank has its own losses, the whole state, and the last one the outputs."""

    def rank(number: int) -> Any:
        return [trained(family, name, schedule, "distributed") for schedule in schedules]

    outcomes = run_ranks(2, rank)
    for number, outcome in enumerate(outcomes):
        assert outcome.error is None, outcome.message
        for schedule, found in zip(schedules, outcome.value, strict=True):
            wanted = expected(family, name, schedule)
            assert_same(found.state, wanted.state, schedule)
            mine = [[a for a in losses if a is not None] for losses in found.losses]
            own = placed(plan_of(family, name, 2), SCHEDULES[schedule]).lanes[number]
            assert mine == [[loss for s in own if (loss := losses[s]) is not None] for losses in wanted.losses], (
                schedule
            )
    assert_same([found.outputs for found in outcomes[-1].value], [expected(family, name, s).outputs for s in schedules])


CELLS = [(family, name) for family in FAMILIES for name in LOSSES]


@pytest.mark.parametrize("family, name", QUICK)
def test_streamed_in_threads(family: str, name: str) -> None:
    """A sample of what follows."""
    assert_same(trained(family, name, "streaming", "streams"), expected(family, name, "streaming"))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("family, name", CELLS)
def test_every_schedule_on_every_executor(family: str, name: str) -> None:
    schedules = [schedule for schedule in SCHEDULES if takes(plan_of(family, name, 2), schedule)]
    for schedule in schedules:
        for executor in ("streams", "processes"):
            if (schedule, executor) == REFUSED:
                with pytest.raises(InputError, match='which the workers of executor="processes" do not hold'):
                    trained(family, name, schedule, executor)
            elif takes(plan_of(family, name, LANES[executor]), schedule):
                assert_same(trained(family, name, schedule, executor), expected(family, name, schedule), schedule)
    check_ranks(family, name, [schedule for schedule in schedules if schedule != "sequential"])
