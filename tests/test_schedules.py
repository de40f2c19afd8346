"""Laws of schedules: whole, in place, free of deadlock, and refused by name when they are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodecouple.errors import ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules import (
    SCHEDULES,
    Action,
    GPipe,
    Interleaved,
    Lane,
    MicroBatched,
    OneFOneB,
    Op,
    PipeDream,
    Program,
    Schedule,
    Sequential,
    Streaming,
    ZeroBubble,
    check,
    order,
    placed,
    resolve,
)
from tests.plan_strategies import make_plan, plans

CHAIN = make_plan([0, 1, 2])
COUPLED = make_plan([0, 1, 2], detached=False)


def lane(text: str) -> Lane:
    return tuple(map(Action.parse, text.split()))


def spelled(lanes: tuple[Lane, ...]) -> list[str]:
    return [" ".join(map(str, actions)) for actions in lanes]


@st.composite
def schedules_on_plans(draw: st.DrawFn) -> tuple[Schedule, Plan]:
    """A schedule with random fields, and a plan that suits it."""
    micro, depth, barrier = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.booleans())
    kinds = [Sequential, Streaming, MicroBatched, GPipe, OneFOneB, Interleaved, ZeroBubble, PipeDream]
    kind = draw(st.sampled_from(kinds))
    if kind is PipeDream:
        return PipeDream(depth), draw(plans(detached=False))
    fields = {"queue_depth": depth, "barrier": barrier}
    schedule = kind(**fields) if kind is Streaming else kind(num_micro_batches=micro, **fields)
    if kind in (Interleaved, ZeroBubble):
        # Of one micro-batch a weight that is taken out is no weight taken apart.
        schedule = dataclasses.replace(schedule, num_micro_batches=micro + 1)  # type: ignore[type-var]
        return schedule, make_plan(list(range(draw(st.integers(1, 3)))) * draw(st.integers(1, 3)), detached=False)
    return schedule, draw(plans(detached=False if kind in (GPipe, OneFOneB) else None))


# --- the orders, written out ---------------------------------------------------------------------------------------


def test_streaming_gives_each_lane_its_stage_in_the_sequential_order():
    assert spelled(Streaming()(CHAIN)) == ["0F0 0L 0B0 0U", "1F0 1L 1B0 1U", "2F0 2L 2B0 2U"]


def test_sequential_finishes_a_stage_before_the_next_and_a_coupled_group_as_a_whole():
    plan = make_plan([0, 1, 2], detached=[True, False])
    assert spelled(Sequential()(plan)) == ["0F0 0L 0B0 0U 1F0 2F0 2L 2B0 1B0 2U 1U"]


def test_micro_batches_go_forward_then_the_loss_sees_the_whole_batch_then_each_goes_backward():
    assert spelled(MicroBatched(2)(make_plan([0, 1]))) == ["0F0 0F1 0L 0B0 0B1 0U", "1F0 1F1 1L 1B0 1B1 1U"]


def test_gpipe_runs_all_forwards_before_all_backwards():
    assert spelled(GPipe(2)(COUPLED)) == ["0F0 0F1 0B0 0B1 0U", "1F0 1F1 1B0 1B1 1U", "2F0 2F1 2L 2B0 2B1 2U"]


def test_1f1b_warms_up_by_the_lanes_behind_then_alternates_then_drains():
    assert spelled(OneFOneB(4)(COUPLED)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3 0U",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3 1U",
        "2F0 2L0 2B0 2F1 2L1 2B1 2F2 2L2 2B2 2F3 2L3 2B3 2U",
    ]


def test_1f1b_takes_the_stages_of_a_lane_together():
    lanes = OneFOneB(2)(make_plan([0, 0, 1], detached=False))
    assert spelled(lanes) == ["0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1 1U 0U", "2F0 2L0 2B0 2F1 2L1 2B1 2U"]


# --- laws ----------------------------------------------------------------------------------------------------------


@given(schedules_on_plans())
def test_every_schedule_on_every_plan_is_whole_and_cannot_deadlock(pair: tuple[Schedule, Plan]):
    schedule, plan = pair
    program = Program(plan, schedule)
    assert len(program.lanes) == (1 if isinstance(schedule, Sequential) else len(plan.lanes))
    place = {action: i for i, action in enumerate(program.actions)}
    assert sorted(map(str, program.actions)) == sorted(str(a) for actions in program.lanes for a in actions)
    for actions in program.lanes:
        assert [place[a] for a in actions] == sorted(place[a] for a in actions)
    for action, waits in program.waits.items():
        assert all(place[other] < place[action] for other in waits)


@given(schedules_on_plans())
def test_micro_batches_of_a_stage_go_in_ascending_order_in_every_schedule(pair: tuple[Schedule, Plan]):
    """So gradients are summed in the same order, and losses agree to the bit."""
    schedule, plan = pair
    for actions in schedule(plan):
        for stage in range(len(plan.stages)):
            for op in (Op.FORWARD, Op.BACKWARD):
                found = [a.micro_batch for a in actions if (a.stage, a.op) == (stage, op)]
                assert found in ([], list(range(schedule.num_micro_batches)))


@given(plans(detached=False), st.integers(1, 8))
def test_1f1b_holds_at_most_as_many_micro_batches_as_lanes_from_there_to_the_end(plan: Plan, micro: int):
    lanes = OneFOneB(micro)(plan)
    for index, actions in enumerate(lanes):
        held = 0
        for action in actions:
            if action.stage == plan.lanes[index][0]:
                held += {Op.FORWARD: 1, Op.BACKWARD: -1}.get(action.op, 0)
                assert held <= min(micro, len(lanes) - index)


def test_a_lane_without_stages_has_nothing_to_do():
    plan = make_plan([0, 2], detached=False)
    for schedule in (GPipe(2), OneFOneB(2), MicroBatched(2), Streaming()):
        assert Program(plan, schedule).lanes[1] == ()


# --- what check refuses --------------------------------------------------------------------------------------------


@given(schedules_on_plans(), st.data())
def test_an_action_taken_out_is_named(pair: tuple[Schedule, Plan], data: st.DataObject):
    schedule, plan = pair
    lanes, where, i = _pick(schedule(plan), data)
    action = lanes[where][i]
    broken = _replaced(lanes, where, (*lanes[where][:i], *lanes[where][i + 1 :]))
    with pytest.raises(ScheduleError, match="missing") as caught:
        check(broken, plan)
    assert str(action) in str(caught.value)


@given(schedules_on_plans(), st.data())
def test_an_action_put_in_twice_is_named(pair: tuple[Schedule, Plan], data: st.DataObject):
    schedule, plan = pair
    lanes, where, i = _pick(schedule(plan), data)
    action = lanes[where][i]
    with pytest.raises(ScheduleError, match=f"^{action} stands 2 times"):
        check(_replaced(lanes, where, (*lanes[where], action)), plan)


@given(schedules_on_plans(), st.data())
def test_an_update_moved_before_its_forward_is_named_as_a_deadlock(pair: tuple[Schedule, Plan], data: st.DataObject):
    schedule, plan = pair
    lanes, where, i = _pick(schedule(plan), data)
    update = Action(lanes[where][i].stage, Op.UPDATE)
    rest = tuple(action for action in lanes[where] if action != update)
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        check(_replaced(lanes, where, (update, *rest)), plan)
    assert str(update) in str(caught.value)


def test_a_deadlock_between_lanes_is_told_as_the_ring_of_waits():
    lanes = (lane("0F0 0B0 0F1 0B1 0U"), lane("1F0 1F1 1L 1B0 1B1 1U"))
    with pytest.raises(ScheduleError) as caught:
        check(lanes, make_plan([0, 1], detached=False))
    ring = str(caught.value).removeprefix("deadlock: ").partition(";")[0]
    named = ring.replace(" waits for", "").replace(", which", "").split()
    assert named[0] == named[-1] and len(named) > 2
    # 0B0 needs 1B0, behind 1L, which needs 1F1, which needs 0F1, which stands behind 0B0
    assert {"0B0", "1B0", "1L", "1F1", "0F1"} == set(named)


def test_a_loss_that_waits_for_the_signal_of_the_stage_before_can_deadlock():
    plan = make_plan([0, 0, 0], encodes=True)
    with pytest.raises(ScheduleError, match=r"deadlock: .*1L(, which)? waits for 0L"):
        check((lane("0F0 1F0 2F0 1L 1B0 1U 0L 0B0 0U 2L 2B0 2U"),), plan)


def test_the_criterion_and_heads_that_encode_nothing_wait_for_no_signal():
    """They compare with the target itself: stage 1 with a head of its own, and the last stage."""
    plan = make_plan([0, 0, 0], encodes=[True, False])
    check((lane("0F0 1F0 2F0 2L 2B0 2U 1L 1B0 1U 0L 0B0 0U"),), plan)


def test_a_loss_waits_for_the_nearest_head_before_it_that_encodes_a_signal():
    """Stage 1 has no head, so the loss of stage 2 waits for that of stage 0."""
    plan = make_plan([0, 0, 0, 0], detached=[True, False, True], encodes=[True, False, True])
    check((lane("0F0 1F0 2F0 3F0 3L 3B0 3U 0L 2L 2B0 1B0 2U 1U 0B0 0U"),), plan)
    with pytest.raises(ScheduleError, match=r"deadlock: .*2L(, which)? waits for 0L"):
        check((lane("0F0 1F0 2F0 3F0 3L 3B0 3U 2L 2B0 1B0 2U 1U 0L 0B0 0U"),), plan)


def test_an_update_waits_for_the_gradients_of_all_micro_batches():
    with pytest.raises(ScheduleError, match=r"deadlock: .*0U(, which)? waits for 0B1"):
        check((lane("0F0 0F1 0L 0B0 0U 0B1"),), make_plan([0]))


def test_an_action_on_another_stages_lane_is_refused_but_one_lane_may_hold_all():
    plan = make_plan([0, 1])
    first, second = lane("0F0 0L 0B0 0U"), lane("1F0 1L 1B0 1U")
    check((first + second,), plan)
    with pytest.raises(ScheduleError, match="1F0 stands on lane 0, but the plan puts its stage on lane 1"):
        check((first + second, ()), plan)
    with pytest.raises(ScheduleError, match="3 lanes for a plan of 2"):
        check((first, second, ()), plan)


@pytest.mark.parametrize("foreign", ["2F0", "0L", "1L0", "0F", "1U0"])
def test_an_action_that_the_plan_does_not_need_is_named(foreign: str):
    lanes = (lane("0F0 0B0 0U " + foreign), lane("1F0 1L 1B0 1U"))
    with pytest.raises(ScheduleError) as caught:
        check(lanes, make_plan([0, 1], detached=False))
    # Beside a loss per micro-batch it is the loss of the whole batch that is one too many.
    assert ("1L" if foreign == "1L0" else foreign) + " has no place here" in str(caught.value)


def test_order_alone_finds_a_deadlock():
    with pytest.raises(ScheduleError, match=r"0B0 waits for 0L, which waits for 0B0|0L waits for 0B0, which"):
        order((lane("0F0 0B0 0L 0U"),), make_plan([0]))


@pytest.mark.parametrize("schedule", [GPipe(), OneFOneB(), PipeDream()])
def test_schedules_of_backpropagation_refuse_detached_cuts_and_say_the_way_out(schedule: Schedule):
    with pytest.raises(ScheduleError, match=r'between stages 1 and 2 .*"micro_batched".*loss="bp"'):
        schedule(make_plan([0, 1, 2], detached=[False, True]))


@pytest.mark.parametrize("kind", [Sequential, MicroBatched, GPipe, OneFOneB, Interleaved, ZeroBubble])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_micro_batches_are_a_whole_number_from_one(kind: Callable[..., Schedule], value: object):
    with pytest.raises(ScheduleError, match=f"num_micro_batches={value}"):
        kind(num_micro_batches=value)


@pytest.mark.parametrize("kind", [Sequential, Streaming, MicroBatched, GPipe, OneFOneB, PipeDream])
def test_a_queue_holds_at_least_one_batch(kind: Callable[..., Schedule]):
    with pytest.raises(ScheduleError, match="queue_depth=0"):
        kind(queue_depth=0)


def test_a_program_refuses_a_schedule_whose_lanes_hold_another_number_of_micro_batches():
    @dataclasses.dataclass(frozen=True)
    class Liar(MicroBatched):
        def __call__(self, plan: Plan) -> tuple[Lane, ...]:
            return MicroBatched(3)(plan)

    with pytest.raises(ScheduleError, match="says 2 micro-batches, but its lanes hold 3"):
        Program(CHAIN, Liar(2))


# --- names ---------------------------------------------------------------------------------------------------------


def test_every_name_resolves_to_a_schedule_that_runs_on_some_plan():
    coupled = ["gpipe", "1f1b", "interleaved", "zero_bubble", "pipedream"]
    assert list(SCHEDULES) == ["sequential", "streaming", "barrier", "micro_batched", *coupled]
    for name in SCHEDULES:
        plan = COUPLED if name in coupled else CHAIN
        assert Program(placed(plan, resolve(name)), resolve(name)).actions


def test_barrier_is_streaming_with_a_barrier_and_a_schedule_resolves_to_itself():
    assert resolve("barrier") == Streaming(barrier=True)
    assert resolve(own := MicroBatched(8)) is own


@pytest.mark.parametrize("wrong", ["fast", Streaming, 4])
def test_what_is_no_schedule_is_answered_with_the_names(wrong: object):
    with pytest.raises(ScheduleError, match="sequential, streaming, barrier, micro_batched, gpipe, 1f1b"):
        resolve(wrong)  # type: ignore[arg-type]


def _pick(lanes: tuple[Lane, ...], data: st.DataObject) -> tuple[tuple[Lane, ...], int, int]:
    """The lanes, and the place of one action in them."""
    where = data.draw(st.sampled_from([i for i, actions in enumerate(lanes) if actions]))
    return lanes, where, data.draw(st.integers(0, len(lanes[where]) - 1))


def _replaced(lanes: tuple[Lane, ...], where: int, actions: Lane) -> tuple[Lane, ...]:
    return (*lanes[:where], actions, *lanes[where + 1 :])
