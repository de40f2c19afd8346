"""Schedules of coupled stages that are torch's own, backward in two halves, and what they need of a plan."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules
from training_tools import Result, assert_same, compiled, make_batches, sgd, train

import autodecouple
from autodecouple import simulator
from autodecouple.cost import FlopCost, TableCost, TimedCost
from autodecouple.errors import InputError, PlanError, ScheduleError
from autodecouple.executors import coupled
from autodecouple.executors.coupled import orders, suits
from autodecouple.halves import backward_inputs
from autodecouple.options import choose_executor
from autodecouple.plans import Plan
from autodecouple.schedules import (
    GPipe,
    Interleaved,
    OneFOneB,
    Op,
    Program,
    Schedule,
    Sequential,
    Streaming,
    ZeroBubble,
    placed,
)
from tests.plan_strategies import make_plan


def adam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


IN_TURN: list[Callable[[int], Schedule]] = [Interleaved, ZeroBubble]


def turns(lanes: int, stages: int, detached: bool = False) -> Plan:
    """A plan of coupled stages dealt to the lanes in turn."""
    return make_plan([stage % lanes for stage in range(stages)], detached)


# --- the orders are torch's ----------------------------------------------------------------------------------------


def torch_order(kind: Any, lanes: int, stages: int, micro_batches: int) -> dict[int, list[str]]:
    """What torch's own schedule says; it needs no processes for that."""
    own = [
        SimpleNamespace(num_stages=stages, group_size=lanes, group_rank=0, stage_index=stage, submod=nn.Identity())
        for stage in range(0, stages, lanes)
    ]
    order = kind(own, micro_batches).pipeline_order
    return {lane: [str(action) for action in actions if action is not None] for lane, actions in order.items()}


def torch_run(kind: Any, lanes: int, micro_batches: int) -> dict[int, list[str]]:
    """What torch's own schedule of one stage per lane calls, lane by lane.

    What torch 2.13 gives as `pipeline_order` of 1F1B begins the last lane with micro-batch 1, and is not what it runs.
    """
    found: dict[int, list[str]] = {}
    for lane in range(lanes):
        recorded = found[lane] = []
        cursor: Any = SimpleNamespace(advance=lambda action, recorded=recorded: recorded.append(str(action)))
        kind(coupled.RuntimeStage(lane, lanes, lane, lanes, cursor), micro_batches).step(return_outputs=False)
    return found


def our_order(schedule: Schedule, plan: Plan) -> dict[int, list[str]]:
    return {lane: [str(a) for a in actions] for lane, actions in orders(Program(plan, schedule)).items()}


CASES = [(lanes, per_lane, count) for lanes, per_lane, count in product((2, 3, 4), (1, 2, 3), range(1, 10))]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Interleaved, torch_schedules.ScheduleInterleaved1F1B),
        (ZeroBubble, torch_schedules.ScheduleInterleavedZeroBubble),
    ],
)
def test_stages_in_turn_go_in_torchs_order(ours: Callable[[int], Schedule], theirs: Any) -> None:
    compared = 0
    for lanes, per_lane, count in CASES:
        if count % max(1, count // lanes):
            continue  # which torch refuses
        found = our_order(ours(count), turns(lanes, lanes * per_lane))
        assert found == torch_order(theirs, lanes, lanes * per_lane, count), (lanes, per_lane, count)
        compared += 1
    assert compared > 50


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(GPipe, torch_schedules.ScheduleGPipe), (OneFOneB, torch_schedules.Schedule1F1B)],
)
def test_the_classical_schedules_go_in_torchs_order(ours: Callable[[int], Schedule], theirs: Any) -> None:
    for lanes, count in product((2, 3, 4), range(1, 10)):
        if count >= lanes:  # torch's 1F1B refuses fewer
            assert our_order(ours(count), turns(lanes, lanes)) == torch_run(theirs, lanes, count)


@given(st.sampled_from(IN_TURN), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_stages_in_turn_are_whole_for_any_number_of_micro_batches(
    kind: Callable[[int], Schedule], lanes: int, per_lane: int, count: int
) -> None:
    """Also where torch's schedules refuse: a batch of few rows has fewer micro-batches. `Program` checks the rest."""
    program = Program(turns(lanes, lanes * per_lane), kind(count))
    for actions in program.lanes:
        for stage, op in product(range(lanes * per_lane), (Op.FORWARD, Op.BACKWARD, Op.WEIGHT)):
            found = [a.micro_batch for a in actions if (a.stage, a.op) == (stage, op)]
            assert found in ([], list(range(count)))


def test_the_orders_written_out() -> None:
    lanes = [" ".join(map(str, lane)) for lane in Interleaved(2)(turns(2, 4))]
    assert lanes == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1 2U 0U",
        "1F0 1F1 3F0 3L0 3B0 3F1 3L1 3B1 1B0 1B1 3U 1U",
    ]
    lanes = [" ".join(map(str, lane)) for lane in ZeroBubble(3)(turns(2, 2))]
    assert lanes == [
        "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0B2 0W2 0U",
        "1F0 1L0 1B0 1F1 1L1 1B1 1W0 1F2 1L2 1B2 1W1 1W2 1U",
    ]


# --- what they take ------------------------------------------------------------------------------------------------


def unit_costs(num_stages: int, backward: float, weight: float = 0.0) -> TableCost:
    seconds = {Op.FORWARD: 1.0, Op.LOSS: 0.0, Op.BACKWARD: backward, Op.WEIGHT: weight, Op.UPDATE: 0.0}
    return TableCost({(stage, op): value for stage in range(num_stages) for op, value in seconds.items()})


@pytest.mark.parametrize(("lanes", "per_lane", "rounds"), [(2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 2, 1), (3, 3, 2)])
def test_interleaving_takes_the_time_that_the_paper_gives(lanes: int, per_lane: int, rounds: int) -> None:
    """Narayanan et al. 2021, section 2.2: the bubble is (K-1) forwards and backwards of one stage, of V on a lane."""
    count, stages = rounds * lanes, lanes * per_lane
    timeline = simulator.run(turns(lanes, stages), Interleaved(count), unit_costs(stages, 2.0), 1)
    assert timeline.makespan == 3.0 * (per_lane * count + lanes - 1)


@pytest.mark.parametrize(("lanes", "count"), [(2, 2), (2, 5), (3, 6), (4, 4), (4, 12)])
def test_zero_bubble_takes_the_time_that_the_paper_gives(lanes: int, count: int) -> None:
    """Qi et al. 2024, table 2: ZB-H1 has a bubble of (K-1)(F + B - W)."""
    cost = unit_costs(lanes, 1.0, 1.0)
    assert simulator.run(turns(lanes, lanes), ZeroBubble(count), cost, 1).makespan == 3 * count + lanes - 1


@pytest.mark.parametrize("name", ["interleaved", "zero_bubble"])
def test_a_plan_is_simulated_with_its_stages_in_turn(name: str) -> None:
    """Whatever lanes it was made with; the weights' half of a backward adds up with the other."""
    plan = make_plan([0, 0, 1, 1], detached=False, flops=[(2, 1, 4)] * 4)
    timeline = autodecouple.simulate(plan, schedule=name, batches=2)
    assert {span.action.stage: span.lane for span in timeline.spans} == {0: 0, 1: 1, 2: 0, 3: 1}
    backward = sum(span.seconds for span in timeline.spans if span.action.op in (Op.BACKWARD, Op.WEIGHT))
    assert backward == pytest.approx(2 * 16e-12)
    assert "weight" in str(timeline) if name == "zero_bubble" else "weight" not in str(timeline)


def test_seconds_of_a_timed_plan_are_split_in_half() -> None:
    plan = turns(2, 2)
    timed = {"forward_seconds": 1.0, "backward_seconds": 6.0, "head_seconds": 0.5}
    plan = dataclasses.replace(plan, stages=tuple(dataclasses.replace(stage, **timed) for stage in plan.stages))
    for cost in (TimedCost(plan, 3, splits_backward=True), TimedCost(plan, 3)):
        action = Program(plan, ZeroBubble(3)).lanes[0][2]
        assert action.op is Op.BACKWARD
        assert cost.seconds(action) == (1.0 if cost.splits_backward else 2.0)
    halves = [FlopCost(plan, splits_backward=True).seconds(dataclasses.replace(action, op=op)) for op in Op]
    assert halves[2] == halves[3] == 1e-12


# --- what they need of a plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_TURN)
def test_other_plans_are_refused_with_the_way_out(kind: Callable[[int], Schedule]) -> None:
    with pytest.raises(ScheduleError, match=r"3 stages for 2 lanes: take n_stages=4"):
        placed(make_plan([0, 0, 1], detached=False), kind(2))
    with pytest.raises(ScheduleError, match=r"hold \(0, 1\), \(2, 3\); schedules.placed"):
        kind(2)(make_plan([0, 0, 1, 1], detached=False))
    with pytest.raises(ScheduleError, match=r'is for coupled stages.*loss="bp"'):
        kind(2)(turns(2, 4, detached=True))
    with pytest.raises(ScheduleError, match="num_micro_batches=0"):
        kind(0)


def test_placing_again_changes_nothing_and_other_schedules_leave_the_lanes() -> None:
    plan = make_plan([0, 0, 1, 1], detached=False)
    once = placed(plan, Interleaved())
    assert once.lanes == ((0, 2), (1, 3)) and placed(once, ZeroBubble()) == once
    assert placed(plan, GPipe()) is plan


def test_a_plan_with_stages_in_turn_goes_through_json_into_compile() -> None:
    with compiled("plain", 4, "bp", lanes=2, schedule="interleaved", executor="inline") as decoupled:
        plan = decoupled.plan
    assert plan.lanes == ((0, 2), (1, 3))
    with compiled("plain", 4, "bp", plan=Plan.from_json(plan.to_json()), schedule="zero_bubble") as decoupled:
        assert decoupled.plan.lanes == plan.lanes
    uneven = dataclasses.replace(plan, stages=(*plan.stages[:3], dataclasses.replace(plan.stages[3], lane=0)))
    with pytest.raises(PlanError, match="contiguous stages, or the stages in turn"):
        compiled("plain", 4, "bp", plan=uneven, schedule="interleaved")


def test_mixed_plans_and_single_lanes_stay_on_our_own_lanes() -> None:
    assert suits(turns(2, 4))
    assert not suits(make_plan([0, 1, 2], detached=[False, True]))
    assert not suits(make_plan([0, 0], detached=False))


@pytest.mark.parametrize("schedule", [GPipe(), OneFOneB(), Interleaved(), ZeroBubble(), Streaming()])
def test_several_processes_train_on_ranks_whatever_the_schedule(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_executor(None, schedule) == "streams"
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_executor(None, schedule) == "distributed"
    assert choose_executor(None, Sequential()) == "inline"
    with pytest.raises(InputError, match="is not known"):
        choose_executor("pipelining", schedule)


# --- the same training ---------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(IN_TURN),
    lanes=st.integers(1, 3),
    executor=st.sampled_from(["inline", "streams"]),
    count=st.integers(1, 5),
    recompute=st.booleans(),
)
@settings(max_examples=8)
def test_schedules_in_turn_equal_1f1b(kind: Any, lanes: int, executor: str, count: int, recompute: bool) -> None:
    """To the last bit, with dropout, BatchNorm and a smaller batch; 1F1B is held against backprop elsewhere."""
    batches = make_batches("dropout", [8, 3, 8])
    options: dict[str, Any] = {"optimizer": sgd, "recompute": recompute}
    expected = train(compiled("dropout", 6, "bp", schedule=OneFOneB(count), executor="inline", **options), batches)
    found = train(
        compiled("dropout", 6, "bp", lanes=lanes, schedule=kind(count), executor=executor, **options), batches
    )
    assert_same(found, expected)


@pytest.mark.parametrize("on_nonfinite", ["skip", "ignore"])
def test_a_split_backward_forgets_a_batch_that_is_left_out(on_nonfinite: str) -> None:
    """Half an accumulation, then a batch whose loss is not finite."""
    batches = make_batches("plain", [8] * 4)
    batches[1] = (batches[1][0] / 0, batches[1][1])

    def run(schedule: Schedule) -> Result:
        options: dict[str, Any] = {"optimizer": adam, "accumulate": 2, "on_nonfinite": on_nonfinite}
        return train(compiled("plain", 4, "bp", schedule=schedule, executor="inline", **options), batches)

    assert_same(run(ZeroBubble(3)), run(OneFOneB(3)))


# --- halves --------------------------------------------------------------------------------------------------------

WIDTH = 3


class Piece(nn.Module):
    """A random piece of a network: steps that join values which depend on its inputs, its weights, both or neither."""

    def __init__(self, steps: list[tuple[str, int, int]], ends: list[int], num_inputs: int) -> None:
        super().__init__()
        self.steps, self.ends, self.num_inputs = steps, ends, num_inputs
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = [*inputs, torch.eye(WIDTH, dtype=torch.float64)]
        for name, first, second in self.steps:
            x, y = values[first % len(values)], values[second % len(values)]
            weight = self.weights[second % len(self.weights)]
            made = {"product": x @ weight, "sum": x + y, "gate": x * y.tanh(), "view": x.t(), "weight": weight.sin()}
            values.append(made[name])
        return [values[end % len(values)] for end in self.ends]


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    number = st.integers(0, 9)
    kinds = st.sampled_from(["product", "sum", "gate", "view", "weight"])
    steps = draw(st.lists(st.tuples(kinds, number, number), min_size=1, max_size=8))
    torch.manual_seed(draw(number))
    ends = draw(st.lists(number, min_size=1, max_size=3, unique=True))
    return Piece(steps, [-1, *ends], draw(st.integers(0, 2)))


def fresh(piece: Piece) -> tuple[list[Tensor], list[Tensor]]:
    """Its inputs, and those of its outputs that carry a gradient."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(piece.num_inputs)
    ]
    return inputs, [y for y in piece(*inputs) if y.requires_grad]


@given(pieces())
@settings(max_examples=150)
def test_two_halves_are_a_whole_backward(piece: Piece) -> None:
    """Of any graph: the inputs' gradients after the first half, the weights' after the second, and none before."""
    other = copy.deepcopy(piece)
    inputs, outputs = fresh(piece)
    expected, plain = fresh(other)
    gradients = [torch.full_like(y, 1.0 + index) for index, y in enumerate(outputs)]
    if plain:
        torch.autograd.backward(plain, gradients)
    weights = list(piece.parameters())
    rest = backward_inputs(outputs, gradients, inputs)
    assert all(weight.grad is None for weight in weights)
    for found, known in zip(inputs, expected, strict=True):
        assert_close(found.grad, known.grad)
    rest()
    for found, known in zip(weights, other.parameters(), strict=True):
        assert_close(found.grad, known.grad)
    for found, known in zip(inputs, expected, strict=True):
        assert_close(found.grad, known.grad)


def assert_close(found: Tensor | None, expected: Tensor | None) -> None:
    """A missing gradient is a gradient of zeros."""
    shape = (WIDTH, WIDTH)
    zeros = torch.zeros(shape, dtype=torch.float64)
    torch.testing.assert_close(zeros if found is None else found, zeros if expected is None else expected)


def test_hooks_see_gradients_of_weights_once() -> None:
    """A hook on a gradient changes it as in a whole backward; one that waits for its accumulation is called once."""
    x = torch.randn(4, WIDTH).requires_grad_()
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    whole = torch.autograd.grad(layer(x).sum(), [layer.weight])[0]
    rest = backward_inputs([layer(x)], [torch.ones(4, WIDTH)], [x])
    rest()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, whole)
    seen: list[Tensor] = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight))
    backward_inputs([layer(x)], [torch.ones(4, WIDTH)], [x])()
    assert len(seen) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_may_be_used_several_times_on_one_way(bias: bool) -> None:
    """torch.distributed.pipelining splits such graphs wrongly: up to 2.12 it counts the second use twice
    (pytorch#180952), and in 2.13 it fails where another weight lies between two uses."""
    x = torch.randn(4, WIDTH, dtype=torch.float64).requires_grad_()
    one, two, shared = (torch.randn(WIDTH, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(3))

    def run() -> Tensor:
        h = x
        for weight in (one, shared, two, shared):
            h = (h @ weight).tanh() + (shared[0] if bias else 0)
        return h

    leaves = [x, one, two, shared]
    y = run()
    expected = torch.autograd.grad(y.sum(), leaves)
    rest = backward_inputs([run()], [torch.ones_like(y)], [x])
    assert x.grad is not None and all(weight.grad is None for weight in (one, two, shared))
    rest()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, gradient)


def test_the_weights_half_does_not_go_along_the_way_again() -> None:
    """Only branches: of ten layers' activations none is passed by twice. A hook on a value counts."""
    x = torch.randn(4, WIDTH).requires_grad_()
    passed: list[int] = []
    h, layers = x, [nn.Linear(WIDTH, WIDTH) for _ in range(10)]
    for index, layer in enumerate(layers):
        h = layer(h).tanh()
        h.register_hook(lambda _, index=index: passed.append(index))
    rest = backward_inputs([h], [torch.ones_like(h)], [x])
    assert passed == list(range(9, -1, -1))
    rest()
    assert len(passed) == 10 and all(layer.weight.grad is not None for layer in layers)
