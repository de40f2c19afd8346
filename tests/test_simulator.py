"""Laws of predicted time: the papers' figures, every wait kept, nobody idle without a reason, bounds and monotony."""

from __future__ import annotations

import dataclasses
import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodecouple import simulator
from autodecouple.cost import FlopCost, TableCost, measured
from autodecouple.errors import InputError, ScheduleError
from autodecouple.plans import Plan
from autodecouple.schedules import Action, GPipe, Lane, MicroBatched, OneFOneB, Op, Schedule, Sequential, Streaming
from autodecouple.timeline import Span, Timeline
from tests.plan_strategies import costs, make_plan, plans


def table(forward: list[float], loss: float, backward: list[float], update: float) -> TableCost:
    """Seconds per action: forward and backward by stage, loss and update alike on all."""
    per_stage = [
        {(k, Op.FORWARD): f, (k, Op.LOSS): loss, (k, Op.BACKWARD): b, (k, Op.UPDATE): update}
        for k, (f, b) in enumerate(zip(forward, backward, strict=True))
    ]
    return TableCost({key: seconds for entries in per_stage for key, seconds in entries.items()})


def balanced(num_stages: int, backward: float = 2.0) -> TableCost:
    """Forward 1, backward as given, loss and update free: the convention of the 3K/(K+2) and K limits."""
    return table([1.0] * num_stages, 0.0, [backward] * num_stages, 0.0)


def makespan(plan: Plan, schedule: Schedule, cost: TableCost | FlopCost, batches: int = 1) -> float:
    return simulator.run(plan, schedule, cost, batches).makespan


FOUR, FOUR_COUPLED = make_plan([0, 1, 2, 3]), make_plan([0, 1, 2, 3], detached=False)


# --- the papers' figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "schedule", "cost", "seconds"),
    [
        # One iteration, four devices.
        pytest.param(make_plan([0]), Streaming(), table([4], 1, [11], 1), 17, id="BP"),
        pytest.param(FOUR_COUPLED, GPipe(1), table([1] * 4, 1, [4, 4, 2, 1], 1), 17, id="naive model parallelism"),
        pytest.param(FOUR, Streaming(), table([1] * 4, 1, [4, 4, 2, 1], 1), 8, id="SCPL"),
        # Three micro-batches of the same costs; the loss is over the whole batch.
        pytest.param(FOUR, Streaming(), table([3] * 4, 3, [12, 12, 6, 3], 3), 24, id="SCPL, three"),
        pytest.param(FOUR_COUPLED, GPipe(3), table([1] * 4, 3, [4, 4, 2, 1], 3), 31, id="GPipe, three"),
        pytest.param(FOUR, MicroBatched(3), table([1] * 4, 3, [4, 4, 2, 1], 3), 22, id="SCPL+GPipe, three"),
    ],
)
def test_one_iteration_takes_the_time_that_the_papers_give(
    plan: Plan, schedule: Schedule, cost: TableCost, seconds: float
):
    assert makespan(plan, schedule, cost) == seconds


@pytest.mark.parametrize(("num_stages", "speedup"), [(2, 1.997), (4, 3.98), (8, 7.91)])
def test_streaming_reaches_the_number_of_stages(num_stages: int, speedup: float):
    """Two hundred batches over balanced stages, against the same work on one lane (methods.md)."""
    plan, cost = make_plan(list(range(num_stages))), balanced(num_stages)
    found = makespan(plan, Sequential(), cost, 200) / makespan(plan, Streaming(), cost, 200)
    assert found == pytest.approx(speedup, abs=0.5 * 10 ** -len(str(speedup).partition(".")[2]))
    assert found == pytest.approx(3 * num_stages * 200 / (3 * 200 + num_stages - 1))


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_a_barrier_caps_the_speedup_at_3k_over_k_plus_2(num_stages: int):
    plan, cost = make_plan(list(range(num_stages))), balanced(num_stages)
    found = makespan(plan, Sequential(), cost, 50) / makespan(plan, Streaming(barrier=True), cost, 50)
    assert found == pytest.approx(3 * num_stages / (num_stages + 2))


@pytest.mark.parametrize("schedule", [GPipe, OneFOneB])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("micro", [1, 2, 4, 16])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_the_bubble_of_one_coupled_batch(
    schedule: type[GPipe | OneFOneB], num_stages: int, micro: int, backward: float
):
    """(K-1) / (M+K-1) for balanced stages, whatever backward costs (GPipe, section 2.3; PipeDream-flush alike)."""
    plan = make_plan(list(range(num_stages)), detached=False)
    timeline = simulator.run(plan, schedule(micro), balanced(num_stages, backward), 1)
    assert timeline.bubble == pytest.approx((num_stages - 1) / (micro + num_stages - 1))


# --- every wait is kept, and nobody idles without a reason ------------------------------------------------------------


@st.composite
def simulations(draw: st.DrawFn) -> tuple[Plan, Schedule, TableCost, int]:
    kind = draw(st.sampled_from([Sequential, Streaming, MicroBatched, GPipe, OneFOneB]))
    fields = {"queue_depth": draw(st.integers(1, 3)), "barrier": draw(st.booleans())}
    if kind is not Streaming:
        fields["num_micro_batches"] = draw(st.integers(1, 4))
    plan = draw(plans(detached=False if kind in (GPipe, OneFOneB) else None))
    return plan, kind(**fields), draw(costs(plan)), draw(st.integers(1, 5))


class Verifier:
    """The rules of time in prose (design.md), span against span; shares no code with the simulator."""

    def __init__(self, timeline: Timeline, plan: Plan, schedule: Schedule, cost: TableCost):
        self.spans, self.plan, self.schedule, self.cost = timeline.spans, plan, schedule, cost

    def find(self, stage: int, op: str, batch: int, micro_batch: int | None = None) -> list[Span]:
        """A stage's spans of one op: those of all micro-batches, or those that hold the given one."""
        return [
            s
            for s in self.spans
            if (s.action.stage, str(s.action.op), s.batch) == (stage, op, batch)
            and (None in (micro_batch, s.action.micro_batch) or s.action.micro_batch == micro_batch)
        ]

    def awaited(self, span: Span) -> list[tuple[Span, float]]:
        """Every span that must be over before this one, and how long its result travels."""
        stage, micro, batch = span.action.stage, span.action.micro_batch, span.batch
        last = stage == len(self.plan.stages) - 1
        coupled = not last and not self.plan.cuts[stage].detached
        if span.action.op == "F":
            # the activations of the same rows; room in the queue; the stage's own update of the batch before,
            # or with a barrier the whole batch before
            found = self.travelled(span, self.find(stage - 1, "F", batch, micro), stage - 1)
            found += self.at_once([] if last else self.find(stage + 1, "F", batch - self.schedule.queue_depth))
            everyone = range(len(self.plan.stages)) if self.schedule.barrier else [stage]
            return found + self.at_once([s for k in everyone for s in self.find(k, "U", batch - 1)])
        if span.action.op == "L":
            # the features of all its rows, and for a head that makes a signal that of the nearest such head before it
            encoders = [k for k in range(stage) if not last and self.plan.cuts[stage].encodes]
            encoders = [k for k in encoders if self.plan.cuts[k].encodes]
            signal = self.find(encoders[-1], "L", batch, micro) if encoders else []
            return self.at_once(self.find(stage, "F", batch, micro) + signal)
        if span.action.op == "B":
            # the gradient: from the next stage through a coupled cut, else from the stage's own loss
            if coupled:
                found = self.travelled(span, self.find(stage + 1, "B", batch, micro), stage)
                return found + self.at_once(self.find(stage, "F", batch, micro))
            return self.at_once(self.find(stage, "L", batch, micro))
        if span.action.op == "W":
            # the own way back first; where the stage overlaps the next, that one's, too, and nothing behind it
            found = self.at_once(self.find(stage, "B", batch, micro))
            overlaps = not last and self.plan.cuts[stage].overlaps
            return found + (self.travelled(span, self.find(stage + 1, "B", batch, micro), stage) if overlaps else [])
        # the gradients of all micro-batches
        return self.at_once(self.find(stage, "B", batch) + self.find(stage, "W", batch))

    @staticmethod
    def at_once(spans: list[Span]) -> list[tuple[Span, float]]:
        return [(span, 0.0) for span in spans]

    def travelled(self, span: Span, sources: list[Span], cut: int) -> list[tuple[Span, float]]:
        return [(s, self.cost.transfers[cut] if s.lane != span.lane else 0.0) for s in sources]

    def on_lane(self, lane: int) -> list[Span]:
        return [span for span in self.spans if span.lane == lane]


def simulate(case: tuple[Plan, Schedule, TableCost, int]) -> tuple[Timeline, Verifier]:
    plan, schedule, cost, batches = case
    timeline = simulator.run(plan, schedule, cost, batches)
    return timeline, Verifier(timeline, plan, schedule, cost)


@given(simulations())
def test_every_span_starts_after_all_that_it_waits_for(case: tuple[Plan, Schedule, TableCost, int]):
    timeline, verifier = simulate(case)
    for span in timeline.spans:
        for before, travel in verifier.awaited(span):
            assert before.stop + travel <= span.start, f"{before} must be over before {span}"


@given(simulations())
def test_no_span_starts_later_than_it_must(case: tuple[Plan, Schedule, TableCost, int]):
    """It starts at 0, or the moment that its lane or something it waits for is done."""
    timeline, verifier = simulate(case)
    for span in timeline.spans:
        lane_stops = {s.stop for s in verifier.on_lane(span.lane) if s is not span}
        assert span.start in {0.0, *lane_stops, *(s.stop + travel for s, travel in verifier.awaited(span))}


@given(simulations())
def test_a_lane_does_one_thing_at_a_time_and_the_oldest_batch_first(case: tuple[Plan, Schedule, TableCost, int]):
    timeline, verifier = simulate(case)
    for lane in range(timeline.num_lanes):
        spans = verifier.on_lane(lane)
        for before, after in pairwise(spans):
            assert before.stop <= after.start
            assert before.batch <= after.batch


@given(simulations())
def test_every_batch_does_the_same_work_at_its_cost(case: tuple[Plan, Schedule, TableCost, int]):
    plan, schedule, cost, batches = case
    timeline, verifier = simulate(case)
    micro = schedule.num_micro_batches
    for batch in range(batches):
        for stage in range(len(plan.stages)):
            has_loss = stage == len(plan.stages) - 1 or plan.cuts[stage].detached
            losses = (micro if isinstance(schedule, OneFOneB) else 1) if has_loss else 0
            halves = micro if any(cut.overlaps for cut in plan.cuts[max(0, stage - 1) : stage + 1]) else 0
            for op, count in (("F", micro), ("L", losses), ("B", micro), ("W", halves), ("U", 1)):
                assert len(verifier.find(stage, op, batch)) == count
    assert all(span.seconds == cost.table[span.action.stage, span.action.op] for span in timeline.spans)


# --- bounds and monotony ---------------------------------------------------------------------------------------------


@given(simulations())
def test_the_makespan_is_at_least_the_busiest_lane_and_at_most_all_work_and_travel(
    case: tuple[Plan, Schedule, TableCost, int],
):
    timeline, _ = simulate(case)
    _, schedule, cost, batches = case
    travel = 2 * batches * schedule.num_micro_batches * sum(cost.transfers)  # forward and backward
    assert max(timeline.busy) <= timeline.makespan <= sum(timeline.busy) + travel
    assert 0 <= timeline.bubble < 1


@given(plans(), st.data())
def test_one_lane_takes_exactly_the_sum_of_all_work(plan: Plan, data: st.DataObject):
    cost = data.draw(costs(plan))
    timeline = simulator.run(plan, Sequential(), cost, 3)
    assert timeline.bubble == 0
    assert timeline.makespan == sum(span.seconds for span in timeline.spans)


@given(plans(), st.data(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_a_deeper_queue_is_never_slower(plan: Plan, data: st.DataObject, micro: int, depth: int, barrier: bool):
    cost = data.draw(costs(plan))
    shallow = MicroBatched(micro, depth, barrier)
    deep = dataclasses.replace(shallow, queue_depth=depth + 1)
    assert makespan(plan, deep, cost, 6) <= makespan(plan, shallow, cost, 6)


@given(plans(), st.data(), st.integers(1, 3))
def test_streaming_is_never_slower_than_a_barrier(plan: Plan, data: st.DataObject, depth: int):
    cost = data.draw(costs(plan))
    barrier = makespan(plan, Streaming(queue_depth=depth, barrier=True), cost, 6)
    assert makespan(plan, Streaming(queue_depth=depth), cost, 6) <= barrier


@given(plans(detached=True, one_stage_per_lane=True), st.data(), st.integers(1, 12))
def test_a_queue_of_two_streams_at_the_rate_of_the_slowest_stage(plan: Plan, data: st.DataObject, batches: int):
    """After one pass to fill the lanes; a queue of one would add the next stage's forward to each batch."""
    cost = data.draw(costs(plan, transfers=False))
    per_stage = [sum(cost.table[stage, op] for op in Op if op is not Op.WEIGHT) for stage in range(len(plan.stages))]
    found = makespan(plan, Streaming(queue_depth=2), cost, batches)
    assert batches * max(per_stage) <= found <= batches * max(per_stage) + sum(per_stage)


def test_a_queue_of_one_can_halve_the_rate():
    """Stages of forwards only: each waits till the next one has taken what it made before."""
    plan, cost = make_plan([0, 1]), table([1, 1], 0, [0, 0], 0)
    rates = [makespan(plan, Streaming(queue_depth=d), cost, 101) - makespan(plan, Streaming(queue_depth=d), cost, 1)
             for d in (1, 2)]  # fmt: skip
    assert rates == [200, 100]


@given(plans(detached=True, one_stage_per_lane=True))
def test_streaming_over_flops_tends_to_the_speedup_that_the_plan_says(plan: Plan):
    batches = 100
    sequential, streaming = (makespan(plan, s, FlopCost(plan), batches) for s in (Sequential(), Streaming()))
    if sequential > 0:
        fill = len(plan.stages) / batches
        assert plan.speedup / (1 + fill) <= sequential / streaming * (1 + 1e-9) <= plan.speedup * (1 + 2e-9)


# --- transfers and costs ---------------------------------------------------------------------------------------------


def test_travel_is_counted_between_lanes_only_and_both_ways_across_a_coupled_cut():
    cost = TableCost(balanced(3).table, transfers=(10.0, 100.0))
    work = 3 + 6
    assert makespan(make_plan([0, 0, 0], detached=False), GPipe(1), cost) == work
    assert makespan(make_plan([0, 0, 1], detached=False), GPipe(1), cost) == work + 2 * 100
    assert makespan(make_plan([0, 1, 2], detached=False), GPipe(1), cost) == work + 2 * 110
    assert makespan(make_plan([0, 1, 2]), Streaming(), cost) == 3 + 2 + 110  # nothing comes back


def test_flops_and_bytes_become_seconds():
    plan = make_plan([0, 1], flops=[(80, 40, 160), (8, 4, 16)])
    cost = FlopCost(plan, num_micro_batches=2, flops_per_second=20, bytes_per_second=16, latency=0.5)
    whole = {a: cost.seconds(Action.parse(a)) for a in ("0F0", "0L", "0L1", "0B1", "0U", "1F0")}
    assert whole == {"0F0": 2.0, "0L": 2.0, "0L1": 1.0, "0B1": 4.0, "0U": 0.0, "1F0": 0.2}
    assert cost.transfer(0) == 0.5 + 2 * 8 * 4 / 2 / 16  # two rows of eight float32, half of them in a micro-batch


@given(simulations())
def test_splitting_into_micro_batches_leaves_the_work_as_it_is(case: tuple[Plan, Schedule, TableCost, int]):
    plan, schedule, _, batches = case
    cost = FlopCost(plan, schedule.num_micro_batches, flops_per_second=1.0)
    busy = sum(simulator.run(plan, schedule, cost, batches).busy)
    heads = [s.head_flops for s in plan.stages if not plan.coupled_after(s.index)]
    assert busy == pytest.approx(batches * (sum(heads) + sum(s.forward_flops + s.backward_flops for s in plan.stages)))


@given(simulations())
def test_costs_measured_from_a_timeline_predict_its_makespan(case: tuple[Plan, Schedule, TableCost, int]):
    plan, schedule, cost, batches = case
    timeline = simulator.run(plan, schedule, TableCost(cost.table), batches)
    assert makespan(plan, schedule, measured(timeline), batches) == timeline.makespan


def test_a_gap_in_a_cost_table_is_named_with_its_key():
    with pytest.raises(InputError, match=r"no seconds for 0L; add the key \(0, Op.LOSS\)"):
        simulator.run(make_plan([0]), Streaming(), TableCost({(0, Op.FORWARD): 1.0}), 1)


@pytest.mark.parametrize("field", ["num_micro_batches", "flops_per_second", "bytes_per_second"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_speeds_and_counts_are_above_zero(field: str, value: float):
    with pytest.raises(InputError, match=field):
        FlopCost(FOUR, **{field: value})


# --- the simulator itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, -3])
def test_less_than_one_batch_is_refused(batches: int):
    with pytest.raises(InputError, match=f"batches={batches}"):
        simulator.run(FOUR, Streaming(), balanced(4), batches)


def test_lanes_that_would_deadlock_are_refused_before_anything_runs():
    @dataclasses.dataclass(frozen=True)
    class Backwards(Streaming):
        def __call__(self, plan: Plan) -> tuple[Lane, ...]:
            return tuple(lane[::-1] for lane in super().__call__(plan))

    with pytest.raises(ScheduleError, match="deadlock"):
        simulator.run(FOUR, Backwards(), balanced(4), 1)


def test_spans_come_in_the_order_of_their_start_and_the_title_says_what_ran():
    timeline = simulator.run(FOUR, Streaming(), balanced(4), 32)
    assert [s.start for s in timeline.spans] == sorted(s.start for s in timeline.spans)
    assert timeline.title == "Streaming, 32 batches, predicted"


def test_time_grows_with_the_number_of_actions_and_no_faster():
    """40,000 actions in seconds: a search over pending actions would take minutes."""
    plan, cost = make_plan(list(range(8)), detached=False), balanced(8)
    began = time.perf_counter()
    timeline = simulator.run(plan, OneFOneB(32), cost, 50)
    assert len(timeline.spans) == 50 * (8 * 32 * 2 + 32 + 8)
    assert time.perf_counter() - began < 5
